"""QuantizeActivations: Before/Expected, and the rounding against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from qcc.compiler.passes.quantize_activations import (
    QuantizeActivations,
    quantize_activation_func,
    quantize_by_scale_func,
)
from qcc.compiler.passes.quantize_weights import QuantizeWeights, dequantize_func
from qcc.compiler.weights.spec import WeightSpec
from qcc.quant_schemes.format import WeightFormat

Q4, F32 = WeightFormat(4, "float16", 32), WeightFormat(32, "float32")


@I.ir_module(s_tir=True)
class Float:
    """Weights 0 and 1 are quantized and share their x; 2 stays floating."""

    @R.function
    def main(
        x: R.Tensor((1, 4, 40), "float32"),
        p: R.Tuple(
            R.Tensor((6, 40), "float32"), R.Tensor((6, 40), "float32"), R.Tensor((8, 6), "float32")
        ),
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            w = p[0]
            v = p[1]
            u = p[2]
            a = R.matmul(x, R.permute_dims(w))
            b = R.matmul(x, R.permute_dims(v))
            c = R.matmul(R.add(a, b), R.permute_dims(u))
            R.output(c)
        return c


@I.ir_module(s_tir=True)
class Expected:
    @T.prim_func(private=True, s_tir=True)
    def dequantize(
        q: T.Buffer((T.int64(6), T.int64(8)), "uint32"),
        s: T.Buffer((T.int64(6), T.int64(2)), "float16"),
        w: T.Buffer((T.int64(6), T.int64(40)), "float32"),
    ):
        T.evaluate(0)  # stands for what dequantize_func makes

    @T.prim_func(private=True, s_tir=True)
    def quantize_activation(
        x: T.Buffer((T.int64(1), T.int64(4), T.int64(40)), "float32"),
        y: T.Buffer((T.int64(1), T.int64(4), T.int64(40)), "float32"),
    ):
        T.evaluate(0)  # stands for what quantize_activation_func makes

    @R.function
    def main(
        x: R.Tensor((1, 4, 40), "float32"),
        p: R.Tuple(
            R.Tensor((6, 8), "uint32"),
            R.Tensor((6, 2), "float16"),
            R.Tensor((6, 8), "uint32"),
            R.Tensor((6, 2), "float16"),
            R.Tensor((8, 6), "float32"),
        ),
    ):
        R.func_attr({"num_input": 1})
        cls = Expected
        with R.dataflow():
            q0 = p[0]
            s0 = p[1]
            w = R.call_tir(cls.dequantize, (q0, s0), out_ty=R.Tensor((6, 40), "float32"))
            q1 = p[2]
            s1 = p[3]
            v = R.call_tir(cls.dequantize, (q1, s1), out_ty=R.Tensor((6, 40), "float32"))
            u = p[4]
            wt = R.permute_dims(w)
            r = R.call_tir(cls.quantize_activation, (x,), out_ty=R.Tensor((1, 4, 40), "float32"))
            a = R.matmul(r, wt)
            vt = R.permute_dims(v)
            b = R.matmul(r, vt)
            c = R.add(a, b)
            ut = R.permute_dims(u)
            d = R.matmul(c, ut)
            R.output(d)
        return d


@I.ir_module(s_tir=True)
class ExpectedStatic:
    """Weight 0 has a scale of its inputs; 1 has none, as a table that is the embedding too."""

    @T.prim_func(private=True, s_tir=True)
    def dequantize(
        q: T.Buffer((T.int64(6), T.int64(8)), "uint32"),
        s: T.Buffer((T.int64(6), T.int64(2)), "float16"),
        w: T.Buffer((T.int64(6), T.int64(40)), "float32"),
    ):
        T.evaluate(0)  # stands for what dequantize_func makes

    @T.prim_func(private=True, s_tir=True)
    def quantize_activation(
        x: T.Buffer((T.int64(1), T.int64(4), T.int64(40)), "float32"),
        s: T.Buffer((T.int64(1),), "float32"),
        y: T.Buffer((T.int64(1), T.int64(4), T.int64(40)), "float32"),
    ):
        T.evaluate(0)  # stands for what quantize_by_scale_func makes

    @R.function
    def main(
        x: R.Tensor((1, 4, 40), "float32"),
        p: R.Tuple(
            R.Tensor((6, 8), "uint32"),
            R.Tensor((6, 2), "float16"),
            R.Tensor((1,), "float32"),
            R.Tensor((6, 8), "uint32"),
            R.Tensor((6, 2), "float16"),
            R.Tensor((8, 6), "float32"),
        ),
    ):
        R.func_attr({"num_input": 1})
        cls = ExpectedStatic
        with R.dataflow():
            q0 = p[0]
            s0 = p[1]
            w = R.call_tir(cls.dequantize, (q0, s0), out_ty=R.Tensor((6, 40), "float32"))
            q1 = p[3]
            s1 = p[4]
            v = R.call_tir(cls.dequantize, (q1, s1), out_ty=R.Tensor((6, 40), "float32"))
            u = p[5]
            wt = R.permute_dims(w)
            i = p[2]
            r = R.call_tir(cls.quantize_activation, (x, i), out_ty=R.Tensor((1, 4, 40), "float32"))
            a = R.matmul(r, wt)
            vt = R.permute_dims(v)
            b = R.matmul(x, vt)
            c = R.add(a, b)
            ut = R.permute_dims(u)
            d = R.matmul(c, ut)
            R.output(d)
        return d


def specs_of(scaled: bool = False) -> list[WeightSpec]:
    return [
        WeightSpec("w.weight", (6, 40), Q4, (), input_scale=scaled),
        WeightSpec("v.weight", (6, 40), Q4, ()),
        WeightSpec("u.weight", (8, 6), F32, ()),
    ]


def quantized(scaled: bool = False) -> tvm.IRModule:
    return QuantizeWeights(specs_of(scaled), "float32")(Float)


def assert_is(found: tvm.IRModule, expected: tvm.IRModule, rounding: Any) -> None:
    """`expected` with its two PrimFuncs put in."""
    tvm.relax.analysis.well_formed(found)
    expected = expected.clone()
    made = {
        "dequantize": dequantize_func(Q4, 6, 40, "float32"),
        "quantize_activation": rounding((1, 4), 40, "float32"),
    }
    for gv in expected.get_global_vars():
        if gv.name_hint in made:
            expected.update_func(gv, made[gv.name_hint])
            assert str(expected[gv].attrs["qcc.role"]) == gv.name_hint
    tvm.ir.assert_structural_equal(found, expected)


def test_dynamic_rounds_what_quantized_weights_multiply() -> None:
    """Once for all weights that take it."""
    found = QuantizeActivations("dynamic", specs_of())(quantized())
    assert_is(found, Expected, quantize_activation_func)


def test_static_takes_the_scale_beside_the_weight() -> None:
    """Which is no part of the weight; what has none is multiplied with x as it is."""
    w = specs_of(scaled=True)[0]
    assert [part.name for part in w.stored] == ["w.q_weight", "w.q_scale", "w.q_input_scale"]
    assert (w.stored[-1].shape, w.stored[-1].dtype) == ((1,), "float32")
    found = QuantizeActivations("static", specs_of(scaled=True))(quantized(scaled=True))
    assert_is(found, ExpectedStatic, quantize_by_scale_func)


def test_none_changes_nothing() -> None:
    module = quantized()
    tvm.ir.assert_structural_equal(QuantizeActivations("none")(module), module)


def rounded(x: Any) -> Any:
    """The docstring's formula in numpy f32, a group at a time."""
    found = np.empty_like(x)
    for start in range(0, x.shape[-1], 32):
        group = x[..., start : start + 32].astype("f4")
        scale = np.abs(group).max(axis=-1, keepdims=True) / np.float32(127)
        codes = np.rint(group / np.where(scale == 0, np.float32(1), scale)).clip(-127, 127)
        found[..., start : start + 32] = (codes * scale).astype(x.dtype)
    return found


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("k", [172, 64, 7])
def test_rounding_to_the_bit(k: int, dtype: str) -> None:
    x = np.random.default_rng(0).standard_normal((1, 5, k)).astype(dtype)
    x[0, 1] = 0
    x[0, 2] = np.arange(k) % 255 - 127.0 + 0.5  # ties of rounding
    x[0, 2, ::32] = 127.0
    x[0, 3, : k // 2] *= 1000
    func = quantize_activation_func((1, None), k, dtype).with_attr("global_symbol", "main")
    out = tvm.runtime.tensor(np.full_like(x, np.nan))
    tvm.compile(func, "llvm")(tvm.runtime.tensor(x), out)
    np.testing.assert_array_equal(out.numpy(), rounded(x))
    error, scale = np.abs(out.numpy() - x)[0, 0].astype("f4"), np.abs(x[0, 0]).max() / 127
    assert 0 < error.max() <= scale * 0.51


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rounding_by_a_stored_scale_to_the_bit(dtype: str) -> None:
    """What is beyond 127 scales is cut; a scale of 0, of inputs that were all 0, gives 0."""
    scale = np.float32(2 / 127)
    x = np.random.default_rng(0).standard_normal((1, 5, 172)).astype(dtype)
    x[0, 2] = (np.arange(172) - 86 + 0.5) * scale  # ties of rounding
    assert (np.abs(x) > 2).any()
    func = quantize_by_scale_func((1, None), 172, dtype).with_attr("global_symbol", "main")
    library = tvm.compile(func, "llvm")
    for s in (scale, np.float32(0)):
        codes = np.rint(x.astype("f4") / np.float32(s or 1)).clip(-127, 127)
        out = tvm.runtime.tensor(np.full_like(x, np.nan))
        library(tvm.runtime.tensor(x), tvm.runtime.tensor(np.array([s], "f4")), out)
        np.testing.assert_array_equal(out.numpy(), (codes * s).astype(dtype))
    assert (out.numpy() == 0).all()
