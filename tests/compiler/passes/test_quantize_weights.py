"""QuantizeWeights: Before/Expected, and the PrimFuncs that it adds against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from qcc.compiler.passes.quantize_weights import (
    QuantizeWeights,
    dequantize_func,
    dequantize_rows_func,
)
from qcc.compiler.weights.spec import WeightSpec
from qcc.quant_schemes.format import WeightFormat
from qcc.quant_schemes.packing import dequantize, store
from qcc.quant_schemes.rounding import rtn

Q4 = WeightFormat(4, "float16", 32)
F16, F32 = WeightFormat(16, "float16"), WeightFormat(32, "float32")


def specs(*weights: tuple[str, tuple[int, ...], WeightFormat]) -> list[WeightSpec]:
    return [WeightSpec(name, shape, fmt, ()) for name, shape, fmt in weights]


@I.ir_module(s_tir=True)
class Before:
    @R.function
    def main(
        x: R.Tensor((1, 40), "float32"),
        p: R.Tuple(R.Tensor((6, 40), "float32"), R.Tensor((40,), "float32")),
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            w = p[0]
            norm = p[1]
            scaled = R.multiply(x, norm)
            wt = R.permute_dims(w)
            y = R.matmul(scaled, wt)
            R.output(y)
        return y


@I.ir_module(s_tir=True)
class Expected:
    @T.prim_func(private=True, s_tir=True)
    def dequantize(
        q: T.Buffer((T.int64(6), T.int64(8)), "uint32"),
        s: T.Buffer((T.int64(6), T.int64(2)), "float16"),
        w: T.Buffer((T.int64(6), T.int64(40)), "float32"),
    ):
        T.evaluate(0)  # stands for what dequantize_func makes; its numbers are tested below

    @R.function
    def main(
        x: R.Tensor((1, 40), "float32"),
        p: R.Tuple(
            R.Tensor((6, 8), "uint32"), R.Tensor((6, 2), "float16"), R.Tensor((40,), "float16")
        ),
    ):
        R.func_attr({"num_input": 1})
        cls = Expected
        with R.dataflow():
            q = p[0]
            s = p[1]
            w = R.call_tir(cls.dequantize, (q, s), out_ty=R.Tensor((6, 40), "float32"))
            norm16 = p[2]
            norm = R.astype(norm16, "float32")
            scaled = R.multiply(x, norm)
            wt = R.permute_dims(w)
            y = R.matmul(scaled, wt)
            R.output(y)
        return y


def test_a_matrix_is_dequantized_and_a_norm_is_cast() -> None:
    found = QuantizeWeights(specs(("w.weight", (6, 40), Q4), ("n", (40,), F16)), "float32")(Before)
    tvm.relax.analysis.well_formed(found)
    expected = Expected.clone()
    (gv,) = (gv for gv in expected.get_global_vars() if gv.name_hint == "dequantize")
    expected.update_func(gv, dequantize_func(Q4, 6, 40, "float32"))
    tvm.ir.assert_structural_equal(found, expected)
    attrs = expected[gv].attrs
    assert str(attrs["qcc.role"]) == "dequantize"
    assert WeightFormat.from_dict(attrs["qcc.format"]) == Q4


def test_floating_weights_of_the_graphs_dtype_stay() -> None:
    found = QuantizeWeights(specs(("w.weight", (6, 40), F32), ("n", (40,), F32)), "float32")(Before)
    tvm.ir.assert_structural_equal(found, Before)


@I.ir_module(s_tir=True)
class Lookup:
    @R.function
    def embed(ids: R.Tensor(("n",), "int32"), p: R.Tuple(R.Tensor((6, 40), "float32"))):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            w = p[0]
            rows = R.take(w, ids, axis=0, mode="clip")
            R.output(rows)
        return rows


def test_a_lookup_dequantizes_its_rows_only() -> None:
    n = tvm.tirx.Var("n", "int64")
    builder = tvm.relax.BlockBuilder()
    rows = dequantize_rows_func(Q4, 6, 40, "float32")
    ids = tvm.relax.Var("ids", R.Tensor((n,), "int32"))
    packed = tvm.relax.Var("p", R.Tuple(R.Tensor((6, 8), "uint32"), R.Tensor((6, 2), "float16")))
    with builder.function("embed", [ids, packed], attrs={"num_input": 1}):
        with builder.dataflow():
            q, s = builder.emit(packed[0]), builder.emit(packed[1])
            gv = builder.add_func(rows, "dequantize_rows")
            out = R.Tensor((n, 40), "float32")
            y = builder.emit_output(tvm.relax.call_tir(gv, (q, s, ids), out_ty=out))
        builder.emit_func_output(y)
    found = QuantizeWeights(specs(("w.weight", (6, 40), Q4)), "float32")(Lookup)
    tvm.ir.assert_structural_equal(found, builder.get())


@I.ir_module(s_tir=True)
class Fused:
    @R.function
    def main(
        x: R.Tensor((1, 40), "float32"),
        p: R.Tuple(R.Tensor((10, 40), "float32"), R.Tensor((10,), "float32")),
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            w = p[0]
            bias = p[1]
            wt = R.permute_dims(w)
            y = R.matmul(x, wt)
            z = R.add(y, bias)
            R.output(z)
        return z


@I.ir_module(s_tir=True)
class Split:
    @T.prim_func(private=True, s_tir=True)
    def dequantize(
        q: T.Buffer((T.int64(6), T.int64(8)), "uint32"),
        s: T.Buffer((T.int64(6), T.int64(2)), "float16"),
        w: T.Buffer((T.int64(6), T.int64(40)), "float32"),
    ):
        T.evaluate(0)  # stands for what dequantize_func makes

    @R.function
    def main(
        x: R.Tensor((1, 40), "float32"),
        p: R.Tuple(
            R.Tensor((6, 8), "uint32"),
            R.Tensor((6, 2), "float16"),
            R.Tensor((4, 40), "float32"),
            R.Tensor((10,), "float32"),
        ),
    ):
        R.func_attr({"num_input": 1})
        cls = Split
        with R.dataflow():
            bias = p[3]
            q = p[0]
            s = p[1]
            a = R.call_tir(cls.dequantize, (q, s), out_ty=R.Tensor((6, 40), "float32"))
            at = R.permute_dims(a)
            ya = R.matmul(x, at)
            b = p[2]
            bt = R.permute_dims(b)
            yb = R.matmul(x, bt)
            y = R.concat((ya, yb), axis=-1)
            z = R.add(y, bias)
            R.output(z)
        return z


def test_a_fused_weight_is_multiplied_part_by_part() -> None:
    """In the order of its rows; what follows takes the whole."""
    stored = [
        WeightSpec("a.weight", (6, 40), Q4, (), fused="ab.weight"),
        WeightSpec("b.weight", (4, 40), F32, (), fused="ab.weight"),
        WeightSpec("ab.bias", (10,), F32, ()),
    ]
    found = QuantizeWeights(stored, "float32")(Fused)
    tvm.relax.analysis.well_formed(found)
    expected = Split.clone()
    (gv,) = (gv for gv in expected.get_global_vars() if gv.name_hint == "dequantize")
    expected.update_func(gv, dequantize_func(Q4, 6, 40, "float32"))
    tvm.ir.assert_structural_equal(found, expected)


@I.ir_module(s_tir=True)
class Neighbours:
    @R.function
    def main(
        x: R.Tensor((1, 40), "float32"),
        p: R.Tuple(R.Tensor((40, 40), "float32"), R.Tensor((40, 40), "float32")),
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            w = p[0]
            v = p[1]
            y = R.matmul(R.matmul(x, R.permute_dims(w)), R.permute_dims(v))
            R.output(y)
        return y


def test_fused_weights_in_a_row_stay_apart() -> None:
    """The weights of the next parameter begin where its name does."""
    names = (("a", "x"), ("b", "x"), ("c", "y"), ("d", "y"))
    stored = [WeightSpec(name, (20, 40), F32, (), fused=fused) for name, fused in names]
    module = QuantizeWeights(stored, "float32")(Neighbours)
    random = np.random.default_rng(0)
    w = [random.normal(size=(20, 40)).astype("f4") for _ in names]
    x = random.normal(size=(1, 40)).astype("f4")
    vm = tvm.relax.VirtualMachine(tvm.relax.build(module, "llvm"), tvm.cpu())
    found = vm["main"](_tensor(x), [_tensor(each) for each in w]).numpy()
    expected = x @ np.concatenate(w[:2]).T @ np.concatenate(w[2:]).T
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


FORMATS = [
    *(WeightFormat(bits, "float16", 32) for bits in (2, 3, 4, 5, 6, 8)),
    WeightFormat(3, "float16", 40, "KN"),
    WeightFormat(4, "bfloat16", 32),
    WeightFormat(8, "float32", 32, "KN"),
    WeightFormat(4, "float16", 128, zero=8),
    WeightFormat(6, "bfloat16", "row", "KN"),
    WeightFormat(8, "float16", "tensor"),
    WeightFormat(5, "float16", 24, "NK", "asymmetric"),
    WeightFormat(4, "float16", 64, "KN", "zero_point"),
    WeightFormat(2, "float16", 16, "NK", "asymmetric", scale_bits=4),
    WeightFormat(3, "bfloat16", 32, "KN", "symmetric", scale_bits=6),
]


def _tensor(array: Any) -> Any:
    return tvm.runtime.tensor(array)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_dequantize_to_the_bit(fmt: WeightFormat) -> None:
    """As packing.dequantize, which tests/quant_schemes checks."""
    n, k = 5, 172
    weights = np.random.default_rng(0).normal(size=(n, k)).astype(np.float32)
    stored = store(rtn.quantize(weights, fmt), fmt)
    parts = [_tensor(stored[part.suffix]) for part in fmt.stored(n, k)]
    expected = dequantize(stored, fmt, n, k)
    ids = np.array([4, 0, 3, -5, 99], np.int32)
    whole, rows = dequantize_func(fmt, n, k, "float32"), dequantize_rows_func(fmt, n, k, "float32")
    module = tvm.IRModule(
        {
            "whole": whole.with_attr("global_symbol", "whole"),
            "rows": rows.with_attr("global_symbol", "rows"),
        }
    )
    built = tvm.compile(module, "llvm")
    out, picked = _tensor(np.empty((n, k), "f4")), _tensor(np.empty((5, k), "f4"))
    built["whole"](*parts, out)
    np.testing.assert_array_equal(out.numpy(), expected)
    built["rows"](*parts, _tensor(ids), picked)
    np.testing.assert_array_equal(picked.numpy(), expected[[4, 0, 3, 0, 4]])
