"""LowerLinear: which calls become kernels, and which weights are repacked."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax as rx
from tvm import tirx
from tvm.script import ir as I
from tvm.script import relax as R

from qcc.compiler.passes.quantize_weights import QuantizeWeights
from qcc.compiler.weights.spec import WeightSpec
from qcc.quant_schemes.format import WeightFormat
from qcc.targets.cpu.isa import AVX2, AVX512_AMX
from qcc.targets.cpu.passes.lower_linear import LowerLinear

Q4, F16, F32 = (
    WeightFormat(4, "float16", 32),
    WeightFormat(16, "float16"),
    WeightFormat(32, "float32"),
)


@I.ir_module(s_tir=True)
class Model:
    """Weight 0 is a tied table, 1 is multiplied with, 2 is a norm, 3 is looked up alone."""

    @R.function
    def embed(
        ids: R.Tensor(("n",), "int32"),
        p: R.Tuple(
            R.Tensor((24, 64), "float32"),
            R.Tensor((64, 64), "float32"),
            R.Tensor((64,), "float32"),
            R.Tensor((24, 64), "float32"),
        ),
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            w = p[0]
            other = p[3]
            rows = R.take(w, ids, axis=0, mode="clip")
            more = R.take(other, ids, axis=0, mode="clip")
            y = R.add(rows, more)
            R.output(y)
        return y

    @R.function
    def decode(
        x: R.Tensor((1, 1, 64), "float32"),
        p: R.Tuple(
            R.Tensor((24, 64), "float32"),
            R.Tensor((64, 64), "float32"),
            R.Tensor((64,), "float32"),
            R.Tensor((24, 64), "float32"),
        ),
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            head = p[0]
            inner = p[1]
            norm = p[2]
            h = R.matmul(x, R.permute_dims(inner))
            scaled = R.multiply(h, norm)
            y = R.matmul(scaled, R.permute_dims(head))
            R.output(y)
        return y

    @R.function
    def prefill(
        x: R.Tensor((1, "n", 64), "float32"),
        p: R.Tuple(
            R.Tensor((24, 64), "float32"),
            R.Tensor((64, 64), "float32"),
            R.Tensor((64,), "float32"),
            R.Tensor((24, 64), "float32"),
        ),
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            inner = p[1]
            y = R.matmul(x, R.permute_dims(inner))
            again = R.matmul(y, R.permute_dims(y, axes=[0, 2, 1]))  # no weight: stays
            out = R.matmul(again, y)
            R.output(out)
        return out


def lowered(fmt: WeightFormat, norm: WeightFormat) -> tvm.IRModule:
    shapes = {
        "embed.weight": (24, 64),
        "inner.weight": (64, 64),
        "norm": (64,),
        "b.weight": (24, 64),
    }
    specs = [
        WeightSpec(name, shape, fmt if len(shape) == 2 else norm, ())
        for name, shape in shapes.items()
    ]
    module = LowerLinear(AVX2)(QuantizeWeights(specs, "float32")(Model))
    rx.analysis.well_formed(module)
    return module


ROUNDED = "quantize_activation"
PREPARED = {ROUNDED: 1, "setting": 1}


def calls(module: tvm.IRModule, function: str) -> Counter[str]:
    """How often each role of PrimFunc is called by a function, and each operator of interest."""
    found: Counter[str] = Counter()

    def visit(expr: Any) -> None:
        if not isinstance(expr, rx.Call):
            return
        if expr.op == tvm.ir.Op.get("relax.call_tir"):
            gv = expr.args[0]
            role = str(module[gv].attrs["qcc.role"])
            kind = gv.name_hint.rstrip("0123456789") if role == "linear" else role
            found[kind] += 1
        elif str(expr.op.name) in ("relax.matmul", "relax.take", "relax.astype"):
            found[str(expr.op.name)] += 1

    rx.analysis.post_order_visit(module[function], visit)
    return found


def test_quantized_weights() -> None:
    module = lowered(Q4, F16)
    # Of a quantized weight words and scales are repacked; a norm in f16 is widened once.
    # What is multiplied becomes int8 once, if the setting says so.
    assert calls(module, "decode") == {"gemv": 2, "repack": 5, **PREPARED, ROUNDED: 2}
    assert calls(module, "prefill") == {"gemm": 1, "repack": 2, "relax.matmul": 2, **PREPARED}
    # The tied table is read as repacked, once in memory; the other one as stored.
    assert calls(module, "embed") == {"table_rows": 1, "repack": 2, "dequantize_rows": 1}


def test_every_part_of_a_format_is_repacked() -> None:
    two = WeightFormat(2, "float16", 16, "NK", "asymmetric", scale_bits=4)
    module = lowered(two, F32)
    assert calls(module, "decode") == {"gemv": 2, "repack": 2 * 5, **PREPARED, ROUNDED: 2}
    assert calls(module, "embed") == {"table_rows": 1, "repack": 5, "dequantize_rows": 1}


def test_parts_of_a_fused_weight() -> None:
    """Each is a kernel of its own."""
    specs = [
        WeightSpec("embed.weight", (24, 64), Q4, ()),
        WeightSpec("q.weight", (48, 64), Q4, (), fused="inner.weight"),
        WeightSpec("k.weight", (16, 64), WeightFormat(5, "float16", 32), (), fused="inner.weight"),
        WeightSpec("norm", (64,), F32, ()),
        WeightSpec("b.weight", (24, 64), Q4, ()),
    ]
    module = LowerLinear(AVX2)(QuantizeWeights(specs, "float32")(Model))
    rx.analysis.well_formed(module)
    # Both parts take the same x: it is rounded once for them.
    assert calls(module, "decode") == {"gemv": 3, "repack": 6, **PREPARED, ROUNDED: 2}
    assert calls(module, "prefill") == {"gemm": 2, "repack": 4, "relax.matmul": 2, **PREPARED}


def test_floating_weights() -> None:
    module = lowered(F32, F32)
    assert calls(module, "decode") == {"gemv": 2, "repack": 2}
    assert calls(module, "prefill") == {"gemm": 1, "repack": 1, "relax.matmul": 2}
    assert calls(module, "embed") == {"table_rows": 1, "repack": 1, "dequantize_rows": 1}


@pytest.mark.parametrize("fmt", [Q4, F16, F32], ids=str)
def test_equal_kernels_are_one(fmt: WeightFormat) -> None:
    """A weight that several functions use has one repack function a part, one kernel a shape."""
    module = lowered(fmt, F16)
    roles = Counter(
        str(func.attrs["qcc.role"])
        for func in module.functions.values()
        if isinstance(func, tirx.PrimFunc)
    )
    parts = 1 if fmt.is_float else 2
    assert roles["linear"] == 3, "two GEMV, one GEMM"
    assert roles["repack"] == 2 * parts + 1, "of two weights and the norm"


def test_kernels_say_that_they_are_scheduled() -> None:
    """The generic scheduler and fusion leave them alone."""
    for func in lowered(Q4, F16).functions.values():
        if isinstance(func, tirx.PrimFunc) and str(func.attrs["qcc.role"]) in (
            "linear",
            "table_rows",
        ):
            assert bool(func.attrs["tirx.is_scheduled"]) and int(func.attrs["op_pattern"]) == 8


def test_lowered_functions_compute_the_same() -> None:
    """Through TVM's own pipeline, repacking within the functions, against numpy."""
    random = np.random.default_rng(0)
    weights = [random.normal(size=s).astype("f4") for s in ((24, 64), (64, 64), (64,), (24, 64))]
    target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"})
    with target:
        vm = rx.VirtualMachine(rx.build(lowered(F32, F32), target), tvm.cpu())
    params = [tvm.runtime.tensor(w) for w in weights]
    x = random.normal(size=(1, 1, 64)).astype("f4")
    expected = (x.astype("f8") @ weights[1].T) * weights[2] @ weights[0].T
    found = vm["decode"](tvm.runtime.tensor(x), params).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    ids = np.array([3, 0, 23], "int32")
    rows = vm["embed"](tvm.runtime.tensor(ids), params).numpy()
    np.testing.assert_array_equal(rows, weights[0][ids] + weights[3][ids])


@I.ir_module(s_tir=True)
class Gate:
    """Weight 0 makes gate and up, weight 1 takes what they gate."""

    @R.function
    def prefill(
        x: R.Tensor((1, "n", 64), "float32"),
        p: R.Tuple(R.Tensor((128, 64), "float32"), R.Tensor((64, 64), "float32")),
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            gate_up = p[0]
            down = p[1]
            both = R.matmul(x, R.permute_dims(gate_up))
            halves = R.split(both, 2, axis=-1)
            gate = halves[0]
            up = halves[1]
            h = R.multiply(R.nn.silu(gate), up)
            y = R.matmul(h, R.permute_dims(down))
            R.output(y)
        return y


@pytest.mark.parametrize(
    ("fmt", "down", "kernels"),
    [
        (Q4, Q4, {"gated_gemm": 1, "gemm": 1, "repack": 4, **PREPARED}),
        (F32, Q4, {"gemm": 2, "repack": 3, **PREPARED}),  # float32 never becomes tiles
        (Q4, F32, {"gemm": 2, "repack": 3, **PREPARED, ROUNDED: 2}),
    ],
    ids=["both", "float_gate", "float_down"],
)
def test_gate_and_product_are_one(
    fmt: WeightFormat, down: WeightFormat, kernels: dict[str, int]
) -> None:
    """Where both weights multiply tiles; elsewhere the gated rows are computed as they round."""
    specs = [
        WeightSpec("gate_up.weight", (128, 64), fmt, ()),
        WeightSpec("down.weight", (64, 64), down, ()),
    ]
    module = LowerLinear(AVX512_AMX)(QuantizeWeights(specs, "float32")(Gate))
    rx.analysis.well_formed(module)
    assert calls(module, "prefill") == kernels


@I.ir_module(s_tir=True)
class Residual:
    """Weights 0 and 1 are added to x; of what weight 2 makes there are two uses."""

    @R.function
    def decode(
        x: R.Tensor((1, 1, 64), "float32"),
        p: R.Tuple(
            R.Tensor((64, 64), "float32"),
            R.Tensor((64, 64), "float32"),
            R.Tensor((64, 64), "float32"),
        ),
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            first = p[0]
            second = p[1]
            third = p[2]
            a = R.matmul(x, R.permute_dims(first))
            b = R.matmul(x, R.permute_dims(second))
            both = R.add(R.add(x, a), b)
            parallel = R.add(R.matmul(both, R.permute_dims(first)), a)
            c = R.matmul(parallel, R.permute_dims(third))
            y = R.multiply(R.add(parallel, c), c)
            R.output(y)
        return y


def test_sums_are_made_by_products() -> None:
    """Of a, b and the third product b and that are only added; a and c have other uses."""
    specs = [WeightSpec(f"{name}.weight", (64, 64), F32, ()) for name in "abc"]
    module = LowerLinear(AVX2)(QuantizeWeights(specs, "float32")(Residual))
    rx.analysis.well_formed(module)
    names = [gv.name_hint for gv, func in module.functions_items() if len(func.params) == 4]
    assert len(names) == 1, "x, a weight, what is added and y"
    sums: list[Any] = []
    operators: list[str] = []

    def visit(expr: Any) -> None:
        if isinstance(expr, rx.Call):
            operators.append(str(getattr(expr.op, "name", "")))
            if operators[-1] == "relax.call_tir" and expr.args[0].name_hint in names:
                sums.append(expr)

    rx.analysis.post_order_visit(module["decode"], visit)
    assert len(sums) == 2 and operators.count("relax.add") == 2

    random = np.random.default_rng(0)
    weights = [random.normal(size=(64, 64)).astype("f4") for _ in range(3)]
    target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"})
    with target:
        vm = rx.VirtualMachine(rx.build(module, target), tvm.cpu())
    x = random.normal(size=(1, 1, 64)).astype("f4")
    found = vm["decode"](tvm.runtime.tensor(x), [tvm.runtime.tensor(w) for w in weights]).numpy()
    first, second, third = (w.astype("f8").T for w in weights)
    parallel = (x + x @ first + x @ second) @ first + x @ first
    expected = (parallel + parallel @ third) * (parallel @ third)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
