"""AttachLogitProcessing: what clients do to logits f32[b, V] before they sample, in place.

Before:  the model's functions
After:   and apply_logit_bias_inplace(logits, pos2seq i32[t], token_ids i32[t], bias f32[t])
             apply_penalty_inplace(logits, seq_ids i32[s], pos2seq i32[t], token_ids i32[t],
                                   token_cnt i32[t], penalties f32[s, 3])
             apply_bitmask_inplace(logits, seq_ids i32[s], bitmask i32[b, ceil(V/32)])

Each is a Relax function around one kernel (call_tir_inplace) and returns `logits` itself. An
exported PrimFunc would do for clients that also search the VM's imported modules, as WebLLM does,
but `vm[name]` searches the VM alone. Tokens are taken in order, so one listed twice counts twice;
the kernels' `qcc.role` (the function's name) lets a GPU target put its own in place. Ids are
trusted: one outside the batch or the vocabulary touches foreign memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm
from tvm import relax as rx
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from qcc.quant_schemes.attributes import OP_PATTERN, OPAQUE, ROLE, SCHEDULED

Args = Sequence[tuple[str, tuple[int | str, ...], str]]  # name, extents (a name: symbolic), dtype
WORD = 32  # tokens in a word of the bitmask


@tvm.transform.module_pass(opt_level=0, name="AttachLogitProcessing")
class AttachLogitProcessing:
    """The pass for logits of width `vocab_size`."""

    def __init__(self, vocab_size: int) -> None:
        """Keep the width."""
        self.vocab_size = vocab_size

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Add the three functions."""
        builder = rx.BlockBuilder(mod)
        for attach in (_attach_logit_bias, _attach_penalty, _attach_bitmask):
            attach(builder, self.vocab_size)
        return builder.finalize()


def _attach(builder: rx.BlockBuilder, name: str, args: Args, body: Callable[..., None]) -> None:
    """Add the kernel whose statements `body` emits, and the Relax function `name` around it."""
    kernel = builder.add_func(_kernel(name, args, body), name.removesuffix("_inplace"))
    params = [rx.Var(arg, rx.TensorType(shape, dtype)) for arg, shape, dtype in _symbolic(args)]
    with builder.function(name, params):
        with builder.dataflow():
            call = rx.op.call_tir_inplace(kernel, params, inplace_indices=0, out_ty=params[0].ty)
            out = builder.emit_output(call)
        builder.emit_func_output(out)


def _kernel(name: str, args: Args, body: Callable[..., None]) -> tirx.PrimFunc:
    """A scheduled, opaque PrimFunc of role `name`; its first argument is updated in place."""
    attrs = {"tirx.noalias": True, SCHEDULED: True, OP_PATTERN: OPAQUE, ROLE: name}
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True, private=True):
            T.func_attr(attrs)
            buffers = [
                T.arg(arg, T.buffer(shape, dtype, layout=None))
                for arg, shape, dtype in _symbolic(args)
            ]
            with T.sblock("root"):
                with T.sblock(name):
                    T.reads(*(_whole(buffer) for buffer in buffers))
                    T.writes(_whole(buffers[0]))
                    body(*buffers)
    return builder.get()


def _symbolic(args: Args) -> list[tuple[str, list[Any], str]]:
    """The arguments with int64 extents, one variable a name."""
    every = [extent for _, shape, _ in args for extent in shape]
    made: dict[int | str, Any] = {
        e: tirx.Var(e, "int64") if isinstance(e, str) else tirx.IntImm("int64", e) for e in every
    }
    return [(arg, [made[extent] for extent in shape], dtype) for arg, shape, dtype in args]


def _whole(buffer: Any) -> Any:
    return buffer[tuple(slice(0, extent) for extent in buffer.shape)]


def _attach_logit_bias(builder: rx.BlockBuilder, vocab_size: int) -> None:
    """logits[pos2seq[i], token_ids[i]] += bias[i]."""

    def body(logits: Any, pos2seq: Any, token_ids: Any, bias: Any) -> None:
        with T.serial(0, token_ids.shape[0]) as i:
            row, token = T.bind(pos2seq[i]), T.bind(token_ids[i])
            T.buffer_store(logits, logits[row, token] + bias[i], [row, token])

    args = [
        ("logits", ("b", vocab_size), "float32"),
        ("pos2seq", ("t",), "int32"),
        ("token_ids", ("t",), "int32"),
        ("bias", ("t",), "float32"),
    ]
    _attach(builder, "apply_logit_bias_inplace", args, body)


def _attach_penalty(builder: rx.BlockBuilder, vocab_size: int) -> None:
    """The three penalties of OpenAI's and CTRL's kind, for the tokens that appeared.

    With l = logits[seq_ids[pos2seq[i]], token_ids[i]] and (presence, frequency, repetition) =
    penalties[pos2seq[i]]: l -= presence + token_cnt[i]*frequency; then l*repetition where l < 0,
    else l/repetition.
    """

    def body(
        logits: Any, seq_ids: Any, pos2seq: Any, token_ids: Any, token_cnt: Any, penalties: Any
    ) -> None:
        with T.serial(0, token_ids.shape[0]) as i:
            seq, token = T.bind(pos2seq[i]), T.bind(token_ids[i])
            row = T.bind(seq_ids[seq])
            count = T.cast(token_cnt[i], "float32")
            lowered = T.bind(logits[row, token] - (penalties[seq, 0] + count * penalties[seq, 1]))
            repetition = T.bind(penalties[seq, 2])
            scaled = T.Select(lowered < 0, lowered * repetition, lowered / repetition)
            T.buffer_store(logits, scaled, [row, token])

    args = [
        ("logits", ("b", vocab_size), "float32"),
        ("seq_ids", ("s",), "int32"),
        ("pos2seq", ("t",), "int32"),
        ("token_ids", ("t",), "int32"),
        ("token_cnt", ("t",), "int32"),
        ("penalties", ("s", 3), "float32"),
    ]
    _attach(builder, "apply_penalty_inplace", args, body)


def _attach_bitmask(builder: rx.BlockBuilder, vocab_size: int) -> None:
    """Logit v of row r = seq_ids[i]: the lowest f32 where bit v%32 of bitmask[r, v//32] is 0."""
    whole, rest = divmod(vocab_size, WORD)

    def word(logits: Any, row: Any, index: Any, bits: Any, tokens: int) -> None:
        with T.vectorized(0, tokens) as bit:
            token = index * WORD + bit
            allowed = (bits >> bit & 1) == 1
            value = T.Select(allowed, logits[row, token], T.min_value("float32"))
            T.buffer_store(logits, value, [row, token])

    def body(logits: Any, seq_ids: Any, bitmask: Any) -> None:
        with T.serial(0, seq_ids.shape[0]) as i:
            row = T.bind(seq_ids[i])
            with T.serial(0, whole) as index:
                word(logits, row, index, T.bind(bitmask[row, index]), WORD)
            if rest:
                word(logits, row, whole, T.bind(bitmask[row, whole]), rest)

    args = [
        ("logits", ("b", vocab_size), "float32"),
        ("seq_ids", ("s",), "int32"),
        ("bitmask", ("b", -(-vocab_size // WORD)), "int32"),
    ]
    _attach(builder, "apply_bitmask_inplace", args, body)
