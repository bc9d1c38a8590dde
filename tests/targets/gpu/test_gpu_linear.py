"""GPU kernels of linear layers on a software adapter, against numpy in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qcc.quant_schemes.format import WeightFormat, float_format, mxfp4
from qcc.targets.gpu.kernels.epilogue import Epilogue
from qcc.targets.gpu.kernels.gemm import gemm
from qcc.targets.gpu.kernels.gemv import Norm, experts_gemv, gemv
from qcc.targets.gpu.limits import Limits

from ..linear_weights import RELATIVE, asymmetric, q, stored
from ..wgsl import ADAPTERS, garbage, run_wgsl, validate_f16, wgsl_of

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
SOME = ["f16", "3/40", "4/32", "4/32 KN", "2/16k", "5/64a"]  # a way of reading words each
TAILS = 17, 331  # n, k


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


def multiply_row(fmt: WeightFormat, n: int, k: int, adapter: str = "lavapipe") -> None:
    x, parts, exact, size = case(fmt, 1, n, k)
    func = gemv(fmt, n, k, "float32", PLAIN, None, LIMITS)
    (y,) = run_wgsl(func, [x, *parts, garbage((1, n), "float32")], adapter=adapter)
    close(y, exact, size)


def multiply_rows(fmt: WeightFormat, n: int, k: int, adapter: str = "lavapipe") -> None:
    x, parts, exact, size = case(fmt, 67, n, k)
    func = gemm(fmt, n, k, "float32", PLAIN, LIMITS)
    (y,) = run_wgsl(func, [x, *parts, garbage((67, n), "float32")], adapter=adapter)
    close(y, exact, size)


@pytest.mark.parametrize("k", [TAILS[1], 352])
@pytest.mark.parametrize("name", FORMATS)
def test_gemv_of_every_format(name: str, k: int) -> None:
    """By numbers, and by vectors."""
    multiply_row(FORMATS[name], TAILS[0], k)


@pytest.mark.parametrize("k", [32, 64, 256])
def test_rows_of_few_units(k: int) -> None:
    """Fewer than the threads that share a longer row."""
    multiply_row(FORMATS["4/32"], TAILS[0], k)
    multiply_row(FORMATS["4/32"], 300, k)


@pytest.mark.parametrize("name", FORMATS)
def test_gemv_in_the_browsers_compiler(name: str) -> None:
    """Dawn's, where a shader needs no f16."""
    fmt = FORMATS[name]
    if not fmt.is_float:
        fmt = replace(fmt, dtype="float32")
    multiply_row(fmt if fmt.dtype == "float32" else float_format("float32"), 40, 352, "dawn")


@pytest.mark.parametrize("name", ["f32", "f16", "5/24"])
def test_vectors_end_within_a_unit(name: str) -> None:
    multiply_row(FORMATS[name], TAILS[0], 340)


@pytest.mark.parametrize("name", SOME)
def test_gemm_of_formats(name: str) -> None:
    multiply_rows(FORMATS[name], *TAILS)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_whole_tiles(adapter: str) -> None:
    fmt = q(4, 32, "float32")
    multiply_row(fmt, 128, 1024, adapter)
    multiply_rows(fmt, 128, 512, adapter)


def end(exact: np.ndarray, epilogue: Epilogue, added: list[np.ndarray]) -> np.ndarray:
    """What an epilogue makes of exact sums, in float64."""
    if epilogue.gate:
        gate, up = np.split(exact, 2, axis=1)
        inner = gate if epilogue.gate == "silu" else GELU * (gate + 0.044715 * gate**3)
        exact = gate / (1 + np.exp(-inner)) * up
    return exact + sum(array.astype(np.float64) for array in added)


GELU = 2 * np.sqrt(2 / np.pi)
ENDS = {
    "bias": Epilogue("float32", "", (("float32", False),)),
    "bias and residual": Epilogue("float32", "", (("float32", False), ("float32", True))),
    "silu": Epilogue("float32", "silu"),
    "gelu and residual": Epilogue("float32", "gelu_tanh", (("float32", True),)),
    "f16": Epilogue("float16", "", (("float16", True),)),
    "f16 gate": Epilogue("float16", "silu"),
}


@pytest.mark.parametrize("rows", [1, 67])
@pytest.mark.parametrize("name", ENDS)
def test_what_follows(name: str, rows: int) -> None:
    epilogue, fmt, n, k = ENDS[name], q(4, 32), 2 * TAILS[0], TAILS[1]
    dtype = epilogue.out_dtype
    x, parts, exact, size = case(fmt, rows, n, k, dtype)
    width = epilogue.rows(n)
    random = np.random.default_rng(1)
    added = [
        random.normal(size=(rows, width) if whole else width).astype(kind)
        for kind, whole in epilogue.summands
    ]
    make = (gemm,) if rows > 1 else (gemv, None)
    func = make[0](fmt, n, k, dtype, epilogue, *make[1:], LIMITS)
    (y,) = run_wgsl(func, [x, *parts, *added, garbage((rows, width), dtype)])
    wanted = end(exact, epilogue, added)
    if dtype == "float16":
        # its own rounding, 2^-11, and where tiles are f16 that of the weights
        assert np.all(np.abs(y - wanted) <= 2**-11 * np.abs(wanted) + 2**-11 * size[:, :1])
    elif epilogue.gate:
        assert np.allclose(y, wanted, rtol=1e-5, atol=RELATIVE * size.max() * np.abs(exact).max())
    else:
        close(y, wanted, size)


@pytest.mark.parametrize("k", [TAILS[1], 340, 352])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_norm_of_the_row(dtype: str, k: int) -> None:
    fmt, n, eps = q(4, 32), TAILS[0], 1e-5
    x, parts, _, _ = case(fmt, 1, n, k, dtype)
    norm = np.random.default_rng(2).normal(size=k).astype(dtype)
    func = gemv(fmt, n, k, dtype, PLAIN, Norm(eps, dtype), LIMITS)
    (y,) = run_wgsl(func, [x, norm, *parts, garbage((1, n), "float32")])
    wide = x.astype(np.float64)
    normed = wide / np.sqrt(np.mean(wide**2) + eps) * norm.astype(np.float64)
    weights = stored(fmt, n, k)[1]
    close(y, normed @ weights.T, np.abs(normed) @ np.abs(weights).T)


def test_f16_shaders_are_valid() -> None:
    for dtype in ("float16", "float32"):
        for func in (
            gemv(q(3, 40), 32, 80, dtype, Epilogue(dtype), Norm(1e-5, dtype), LIMITS),
            gemm(q(4, 32), 32, 64, dtype, Epilogue(dtype, "silu"), LIMITS),
        ):
            for shader in wgsl_of(func):
                validate_f16(shader.source)


@pytest.mark.parametrize("name", ["4/32", "4/32 KN", "mxfp4", "f16"])
def test_experts(name: str) -> None:
    """Three experts, two for each token; x shared by a token's experts, and its own for each."""
    fmt, experts, (n, k) = FORMATS[name], 3, TAILS
    ids = np.array([2, 0, 0, 1, 2, 1, 1, 0, 0, 2], np.int32)
    for each in (2, 1):
        rows = len(ids) // each
        x = np.random.default_rng(each).normal(size=(rows, k)).astype(np.float32)
        parts, weights, _ = stored(fmt, experts * n, k)
        func = experts_gemv(fmt, experts, n, k, "float32", each, LIMITS)
        (y,) = run_wgsl(func, [x, *parts, ids, garbage((len(ids), n), "float32")])
        for pair, expert in enumerate(ids):
            row, own = x[pair // each].astype(np.float64), slice(expert * n, (expert + 1) * n)
            close(y[pair], weights[own] @ row, np.abs(weights[own]) @ np.abs(row))
