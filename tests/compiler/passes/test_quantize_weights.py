"""QuantizeWeights: Before/Expected, and the PrimFuncs that it adds against numpy."""

from __future__ import annotations

from typing import Any

import ml_dtypes
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
from qcc.quant_schemes.scheme import WeightFormat

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


FORMATS = [
    WeightFormat(bits, dtype, group, layout)
    for bits, group in ((3, 40), (4, 32), (8, 32), (4, 128))
    for dtype in ("float16", "bfloat16", "float32")
    for layout in ("NK", "KN")
]


def _stored(fmt: WeightFormat, n: int, k: int) -> tuple[Any, Any, Any]:
    """(words, scales, weights f32[n, k]) with random codes; formula of CONTRACTS section 1."""
    random = np.random.default_rng(0)
    each, top = 32 // fmt.bits, 2 ** (fmt.bits - 1) - 1
    groups = -(-k // fmt.group)
    codes = random.integers(0, 2 * top + 1, (n, groups * fmt.group)).astype(np.uint32)
    scales = random.uniform(0.01, 1, (n, groups)).astype(
        ml_dtypes.bfloat16 if fmt.dtype == "bfloat16" else fmt.dtype
    )
    shifts = np.arange(each, dtype=np.uint32) * np.uint32(fmt.bits)
    words = (codes.reshape(n, -1, each) << shifts).sum(axis=2, dtype=np.uint32)
    wide = np.repeat(scales.astype(np.float32), fmt.group, axis=1)
    weights = (codes.astype(np.float32) - top) * wide
    if fmt.layout == "KN":
        words, scales = np.ascontiguousarray(words.T), np.ascontiguousarray(scales.T)
    return words, scales, weights[:, :k]


def _tensor(array: Any) -> Any:
    return tvm.runtime.tensor(array)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_dequantize_to_the_bit(fmt: WeightFormat) -> None:
    n, k = 5, 172
    words, scales, weights = _stored(fmt, n, k)
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
    built["whole"](_tensor(words), _tensor(scales), out)
    np.testing.assert_array_equal(out.numpy(), weights)
    built["rows"](_tensor(words), _tensor(scales), _tensor(ids), picked)
    np.testing.assert_array_equal(picked.numpy(), weights[[4, 0, 3, 0, 4]])
