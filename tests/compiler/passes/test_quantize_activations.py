"""QuantizeActivations: Before/Expected, and the rounding against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from qcc.compiler.passes.quantize_activations import QuantizeActivations, quantize_activation_func
from qcc.compiler.passes.quantize_weights import QuantizeWeights, dequantize_func
from qcc.compiler.weights.spec import WeightSpec
from qcc.quant_schemes.errors import SchemeError
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


def quantized() -> tvm.IRModule:
    shapes = (("w.weight", (6, 40), Q4), ("v.weight", (6, 40), Q4), ("u.weight", (8, 6), F32))
    specs = [WeightSpec(name, shape, fmt, ()) for name, shape, fmt in shapes]
    return QuantizeWeights(specs, "float32")(Float)


def test_dynamic_rounds_what_quantized_weights_multiply() -> None:
    """Once for all weights that take it."""
    found = QuantizeActivations("dynamic")(quantized())
    tvm.relax.analysis.well_formed(found)
    expected = Expected.clone()
    made = {
        "dequantize": dequantize_func(Q4, 6, 40, "float32"),
        "quantize_activation": quantize_activation_func((1, 4), 40, "float32"),
    }
    for gv in expected.get_global_vars():
        if gv.name_hint in made:
            expected.update_func(gv, made[gv.name_hint])
            assert str(expected[gv].attrs["qcc.role"]) == gv.name_hint
    tvm.ir.assert_structural_equal(found, expected)


def test_none_changes_nothing() -> None:
    module = quantized()
    tvm.ir.assert_structural_equal(QuantizeActivations("none")(module), module)


def test_static_is_refused() -> None:
    with pytest.raises(SchemeError, match="static is not supported yet; use dynamic or none"):
        QuantizeActivations("static")


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
