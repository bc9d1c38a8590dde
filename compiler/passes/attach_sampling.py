"""AttachSampling: from logits to a token, as functions that clients call between two steps.

Before:  the model's functions
After:   and softmax_with_temperature(f32[b, 1, V] logits, f32[b]) -> f32[b, 1, V]
             argsort_probs(f32[b, V]) -> (f32[b, V] descending, int32[b, V] their tokens)
             sample_with_top_p(f32[b, V] sorted, int32[b, V] tokens, f32[n] u, int32[n] row,
                               f32[b] top_p) -> int32[n]

A temperature of at most 1e-5 takes the largest logit, equal ones sharing (clients clamp 0 to 1e-6).
Only TIR: no function of libtvm_runtime_extra is called. Everything is one independent block a row
or plain te, so that any target's scheduler takes it; the two row kernels and the Relax function of
the softmax also carry `qcc.role` (`argsort_probs`, `sample_with_top_p`, its name), for a target
that has something better than a thread a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm
from tvm import relax as rx
from tvm import te, tirx, topi
from tvm.tirx.script.builder import ir as T

from qcc.compiler.row_kernel import i64, local, row_kernel
from qcc.quant_schemes.attributes import ROLE

SOFTMAX = "softmax_with_temperature"
GREEDY_TEMPERATURE = 1e-5
LANES = 16  # independent partial maxima and sums: a chain of one would wait for each addition
MAX_CHUNK = 64  # vectors of LANES in a partial reduction: 128k logits make over 100 parallel parts
DIGIT_BITS, DIGITS = 8, 4  # of a 32-bit sort key
RADIX = 1 << DIGIT_BITS


@tvm.transform.module_pass(opt_level=0, name="AttachSampling")
class AttachSampling:
    """The pass for logits of width `vocab_size`, with at most `max_batch_size` rows and samples."""

    def __init__(self, vocab_size: int, max_batch_size: int) -> None:
        """`max_batch_size` bounds b and n for the memory plan."""
        self.vocab_size = vocab_size
        self.bounds = {"b": max_batch_size, "n": max_batch_size}

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Add the three functions."""
        builder = rx.BlockBuilder(mod)
        added = [
            attach(builder, self.vocab_size)
            for attach in (_attach_softmax, _attach_argsort, _attach_sample)
        ]
        result = builder.finalize()
        for gv in added:
            func = result[gv.name_hint].with_attr("tir_var_upper_bound", self.bounds)
            if gv.name_hint == SOFTMAX:
                func = func.with_attr(ROLE, SOFTMAX)
            result.update_func(result.get_global_var(gv.name_hint), func)
        return result


def _function(
    builder: rx.BlockBuilder, name: str, params: Sequence[rx.Var], body: Callable[..., rx.Expr]
) -> tvm.ir.GlobalVar:
    with builder.function(name, list(params)):
        with builder.dataflow():
            out = builder.emit_output(body(*params))
        return builder.emit_func_output(out)


def _attach_softmax(builder: rx.BlockBuilder, vocab_size: int) -> tvm.ir.GlobalVar:
    b = tirx.Var("b", "int64")
    logits = rx.Var("logits", rx.TensorType((b, 1, vocab_size), "float32"))
    temperature = rx.Var("temperature", rx.TensorType((b,), "float32"))

    def body(logits: rx.Var, temperature: rx.Var) -> rx.Expr:
        # four PrimFuncs: in one, a scheduler would inline the exponentials into both their uses
        part_max = builder.emit_te(_part_max, logits, primfunc_name_hint="softmax_part_max")
        exps = builder.emit_te(
            _exps, logits, temperature, part_max, primfunc_name_hint="softmax_exp"
        )
        part_sum = builder.emit_te(_part_sum, exps, primfunc_name_hint="softmax_part_sum")
        return builder.call_te(_normalize, exps, part_sum, primfunc_name_hint="softmax_normalize")

    return _function(builder, SOFTMAX, [logits, temperature], body)


def _part_max(x: te.Tensor) -> te.Tensor:
    return _partial(x, tirx.max, te.max, "part_max")


def _part_sum(x: te.Tensor) -> te.Tensor:
    return _partial(x, lambda a, b: a + b, te.sum, "part_sum")


def _partial(x: te.Tensor, pair: Any, reduce: Any, name: str) -> te.Tensor:
    """f32[b, 1, V] -> f32[b, parts], each part over consecutive elements; V = parts*chunk*lanes."""
    width = int(x.shape[2])
    lanes = LANES if width % LANES == 0 else 1
    chunk = max(c for c in range(1, MAX_CHUNK + 1) if width // lanes % c == 0)
    k = te.reduce_axis((i64(0), i64(chunk)), name="k")

    def part(i: Any, p: Any) -> Any:
        start = (p * i64(chunk) + k) * i64(lanes)
        values = [x[i, i64(0), start + i64(lane)] for lane in range(lanes)]
        while len(values) > 1:
            values = [pair(a, b) for a, b in zip(values[::2], values[1::2], strict=True)]
        return reduce(values[0], axis=k)

    return te.compute((x.shape[0], i64(width // lanes // chunk)), part, name=name)


def _exps(logits: te.Tensor, temperature: te.Tensor, part_max: te.Tensor) -> te.Tensor:
    """exp((l - max) / temperature): 1 at the maximum, exactly 0 from about -88 on."""
    k = te.reduce_axis((i64(0), part_max.shape[1]), name="k")
    peak = te.compute((logits.shape[0],), lambda i: te.max(part_max[i, k], axis=k), name="peak")

    def scaled(i: Any, j: Any, v: Any) -> Any:
        cold = temperature[i] <= tirx.const(GREEDY_TEMPERATURE, "float32")
        # the largest f32, not infinity: 0 at the maximum must stay 0
        factor = tirx.Select(
            cold, tirx.max_value("float32"), tirx.const(1.0, "float32") / temperature[i]
        )
        return (logits[i, j, v] - peak[i]) * factor

    # the polynomial vectorizes on LLVM, a call of exp does not: 49 us against 555 us at V = 128256
    return topi.fast_exp(te.compute(logits.shape, scaled, name="scaled"))


def _normalize(exps: te.Tensor, part_sum: te.Tensor) -> te.Tensor:
    k = te.reduce_axis((i64(0), part_sum.shape[1]), name="k")
    total = te.compute((exps.shape[0],), lambda i: te.sum(part_sum[i, k], axis=k), name="total")
    # a total is at least 1, or 0 where every logit is -inf: no token, no NaN
    one = tirx.const(1.0, "float32")
    return te.compute(
        exps.shape, lambda i, j, v: exps[i, j, v] / tirx.max(total[i], one), name="normalize"
    )


def _attach_argsort(builder: rx.BlockBuilder, vocab_size: int) -> tvm.ir.GlobalVar:
    b = tirx.Var("b", "int64")
    values, tokens = (rx.TensorType((b, vocab_size), dtype) for dtype in ("float32", "int32"))
    kernel = builder.add_func(_argsort_func(vocab_size), "argsort_rows")

    def body(probs: rx.Var) -> rx.Expr:
        # the last two are workspace
        out = builder.emit(rx.call_tir(kernel, [probs], out_ty=[values, tokens, values, tokens]))
        return rx.Tuple([builder.emit(out[0]), builder.emit(out[1])])

    return _function(builder, "argsort_probs", [rx.Var("probs", values)], body)


def _argsort_func(vocab_size: int) -> tirx.PrimFunc:
    """f32[b, V] -> descending f32[b, V], their columns int32[b, V], two workspaces of these types.

    A stable radix sort, least significant digit first, from the input to the workspace, to the
    output, to the workspace, to the output. Any finite values; equal ones keep their order.
    """
    b, v = tirx.Var("b", "int64"), i64(vocab_size)

    def key(value: Any) -> Any:
        # as an unsigned number it falls as the float rises; the sign bit of a negative one stays
        bits = T.reinterpret("int32", value)
        return bits ^ (~(bits >> 31) & 0x7FFFFFFF)

    def slot(digit: int, value: Any) -> Any:
        return (key(value) >> (digit * DIGIT_BITS) & (RADIX - 1)) + digit * RADIX

    def body(row: Any, probs: Any, values: Any, tokens: Any, spare: Any, spare_tokens: Any) -> None:
        # how often each digit has each value; then where its next element goes
        place = T.alloc_buffer((DIGITS * RADIX,), "int32", scope="local", layout=None)
        with T.serial(0, DIGITS * RADIX) as i:
            T.buffer_store(place, 0, [i])
        with T.serial(i64(0), v) as i:
            value = T.bind(probs[row, i])
            for digit in range(DIGITS):
                at = T.bind(slot(digit, value))
                T.buffer_store(place, place[at] + 1, [at])
        total = local("int32", 0)
        with T.serial(0, DIGITS * RADIX) as i:
            with T.If(i % RADIX == 0):
                with T.Then():
                    T.buffer_store(total, 0, [0])
            count = T.bind(place[i])
            T.buffer_store(place, total[0], [i])
            T.buffer_store(total, total[0] + count, [0])
        steps = [
            (probs, None, spare, spare_tokens),
            (spare, spare_tokens, values, tokens),
            (values, tokens, spare, spare_tokens),
            (spare, spare_tokens, values, tokens),
        ]
        for digit, (source, source_tokens, sink, sink_tokens) in enumerate(steps):
            with T.serial(i64(0), v) as i:
                value = T.bind(source[row, i])
                at = T.bind(slot(digit, value))
                to = T.bind(T.cast(place[at], "int64"))
                T.buffer_store(place, place[at] + 1, [at])
                token = T.cast(i, "int32") if source_tokens is None else source_tokens[row, i]
                T.buffer_store(sink, value, [row, to])
                T.buffer_store(sink_tokens, token, [row, to])

    outputs = [
        (name, (b, v), dtype)
        for name, dtype in (
            ("values", "float32"),
            ("tokens", "int32"),
            ("spare", "float32"),
            ("spare_tokens", "int32"),
        )
    ]
    return row_kernel("argsort_probs", b, [("probs", (b, v), "float32")], outputs, body)


def _attach_sample(builder: rx.BlockBuilder, vocab_size: int) -> tvm.ir.GlobalVar:
    b, n = tirx.Var("b", "int64"), tirx.Var("n", "int64")
    params = [
        rx.Var("sorted_probs", rx.TensorType((b, vocab_size), "float32")),
        rx.Var("sorted_indices", rx.TensorType((b, vocab_size), "int32")),
        rx.Var("uniform_samples", rx.TensorType((n,), "float32")),
        rx.Var("sample_indices", rx.TensorType((n,), "int32")),
        rx.Var("top_p", rx.TensorType((b,), "float32")),
    ]
    kernel = builder.add_func(_sample_func(vocab_size), "sample_rows")

    def body(*args: rx.Var) -> rx.Expr:
        return rx.call_tir(kernel, list(args), out_ty=rx.TensorType((n,), "int32"))

    return _function(builder, "sample_with_top_p", params, body)


def _sample_func(vocab_size: int) -> tirx.PrimFunc:
    """(f32[b, V] descending, int32[b, V], f32[n] u in [0, 1), int32[n] rows, f32[b]) -> int32[n].

    The nucleus is the shortest prefix whose sum reaches top_p, never with a probability of 0, at
    least one token; the sample is its first token whose running sum exceeds u * (sum of all).
    """
    b, n, v = tirx.Var("b", "int64"), tirx.Var("n", "int64"), i64(vocab_size)

    def body(s: Any, probs: Any, indices: Any, u: Any, rows: Any, top_p: Any, out: Any) -> None:
        row = T.bind(T.cast(rows[s], "int64"))
        # rounded sums may reach 1 too early: no limit at 1
        limit = T.bind(T.Select(top_p[row] < 1, top_p[row], T.float32(2)))
        # counters are int32: WGSL has no 64-bit integers
        size = local("int32", 1)
        mass = _RunningSum(probs[row, 0])
        # both sides of an And are evaluated: stay inside the row
        more = T.And(size[0] < vocab_size, probs[row, T.min(size[0], vocab_size - 1)] > 0)
        with T.While(T.And(more, mass.value < limit)):
            mass.add(probs[row, size[0]])
            T.buffer_store(size, size[0] + 1, [0])
        goal = T.bind(u[s] * mass.value)
        index = local("int32", 0)
        reached = _RunningSum(probs[row, 0])
        with T.While(T.And(index[0] + 1 < size[0], reached.value <= goal)):
            T.buffer_store(index, index[0] + 1, [0])
            reached.add(probs[row, index[0]])
        T.buffer_store(out, indices[row, index[0]], [s])

    inputs = [
        ("probs", (b, v), "float32"),
        ("indices", (b, v), "int32"),
        ("u", (n,), "float32"),
        ("rows", (n,), "int32"),
        ("top_p", (b,), "float32"),
    ]
    return row_kernel("sample_with_top_p", n, inputs, [("out", (n,), "int32")], body)


class _RunningSum:
    """A compensated f32 sum (Kahan 1965): 100,000 tail probabilities below 2^-25 are not lost."""

    def __init__(self, first: Any) -> None:
        self._sum, self._excess = local("float32", first), local("float32", T.float32(0))

    @property
    def value(self) -> Any:
        return self._sum[0]

    def add(self, value: Any) -> None:
        wanted = T.bind(value - self._excess[0])
        rounded = T.bind(self._sum[0] + wanted)
        T.buffer_store(self._excess, (rounded - self._sum[0]) - wanted, [0])
        T.buffer_store(self._sum, rounded, [0])
