"""GPU kernels of linear layers on a software adapter, against numpy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcc.quant_schemes.format import WeightFormat, float_format, mxfp4
from qcc.targets.gpu.kernels.epilogue import Epilogue
from qcc.targets.gpu.kernels.gemm import gemm
from qcc.targets.gpu.kernels.gemv import Norm, gemv
from qcc.targets.gpu.limits import Limits

from ..linear_weights import RELATIVE, asymmetric, q, stored
from ..wgsl import garbage, run_wgsl

LIMITS = Limits()
PLAIN = Epilogue("float32")
FORMATS = {
    "f32": float_format("float32"),
    "f16": float_format("float16"),
    "3/40": q(3, 40),
    "3/40 KN": q(3, 40, layout="KN"),
    "4/32": q(4, 32),
    "4/32 KN": q(4, 32, layout="KN"),
    "8/32": q(8, 32),
    "8 row": q(8, "row"),
    "4 tensor": q(4, "tensor"),
    "4 zero point": q(4, 128, grid="zero_point"),
    "mxfp4": mxfp4("float16"),
    "2/16k": asymmetric(2, 16, scale_bits=4),
    "3/16k": q(3, 16, scale_bits=6),
    **{f"{bits}/24": q(bits, 24) for bits in (2, 3, 5, 6)},
    **{f"{bits}/64a": asymmetric(bits, 64) for bits in (2, 3, 4, 5, 6, 8)},
    "5/32a KN": asymmetric(5, 32, "float16", "KN"),
}
SIZES = [(130, 512), (17, 331)]  # the second: tails everywhere


def case(fmt: WeightFormat, m: int, n: int, k: int, dtype: str = "float32") -> tuple[Any, ...]:
    """(x dtype[m, k], stored parts, y f64[m, n], what an error is measured by [m, n])."""
    x = np.random.default_rng(m + k).normal(size=(m, k)).astype(dtype)
    parts, weights, bias = stored(fmt, n, k)
    wide = x.astype(np.float64)
    size = np.abs(wide) @ (np.abs(weights - bias) + np.abs(bias)).T
    return x, parts, wide @ weights.T, size


def close(y: np.ndarray, exact: np.ndarray, size: Any) -> None:
    error = np.abs(y - exact) / size
    assert error.max() <= RELATIVE, f"{error.max():.1e}"


@pytest.mark.parametrize("n, k", SIZES)
@pytest.mark.parametrize("name", FORMATS)
def test_gemv_multiplies_a_row(name: str, n: int, k: int) -> None:
    fmt = FORMATS[name]
    x, parts, exact, size = case(fmt, 1, n, k)
    func = gemv(fmt, n, k, "float32", PLAIN, None, LIMITS)
    (y,) = run_wgsl(func, [x, *parts, garbage((1, n), "float32")])
    close(y, exact, size)


@pytest.mark.parametrize("n, k", SIZES)
@pytest.mark.parametrize("name", FORMATS)
def test_gemm_multiplies_rows(name: str, n: int, k: int) -> None:
    fmt = FORMATS[name]
    x, parts, exact, size = case(fmt, 67, n, k)
    func = gemm(fmt, n, k, "float32", PLAIN, LIMITS)
    (y,) = run_wgsl(func, [x, *parts, garbage((67, n), "float32")])
    close(y, exact, size)
