"""Random weights in every format, and the processors whose kernels multiply them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import tvm

from qcc.quant_schemes.format import WeightFormat
from qcc.quant_schemes.packing import Grid, Quantized, dequantize, store
from qcc.targets.cpu.isa import (
    AVX2,
    AVX2_VNNI,
    AVX512,
    AVX512_AMX,
    AVX512_VNNI,
    NEON,
    NEON_DOT,
    NEON_I8MM,
    SSE,
    Isa,
)

from .aarch64 import lacking

# |y - exact| <= this * sum |x|(|w - b| + |b|), b the bias of w' = q*s + b. Each f32 rounding adds
# 2^-24 = 6e-8 of a partial sum; the chains are a few dozen terms long, and errors average out. A
# lost or doubled column makes 1e-2 or more.
RELATIVE = 1e-6

AARCH64 = {"kind": "llvm", "mtriple": "aarch64-unknown-linux-gnu"}
PROCESSORS: dict[str, tuple[Isa, dict[str, Any]]] = {
    "avx512": (AVX512, {"kind": "llvm", "mcpu": "skylake-avx512"}),
    "vnni": (AVX512_VNNI, {"kind": "llvm", "mcpu": "cascadelake"}),
    "amx": (AVX512_AMX, {"kind": "llvm", "mcpu": "sapphirerapids"}),
    "avx2_vnni": (AVX2_VNNI, {"kind": "llvm", "mcpu": "alderlake"}),
    "avx2": (AVX2, {"kind": "llvm", "mcpu": "x86-64-v3"}),
    "sse": (SSE, {"kind": "llvm", "mcpu": "x86-64-v2"}),
    "neon": (NEON, AARCH64 | {"mcpu": "cortex-a53"}),
    "neon_dot": (NEON_DOT, AARCH64 | {"mcpu": "cortex-a76"}),
    "neon_i8mm": (NEON_I8MM, AARCH64 | {"mcpu": "neoverse-v1"}),
}


def q(bits: int, group: Any, dtype: str = "float16", layout: str = "NK", **grid: Any) -> Any:
    return WeightFormat(bits, dtype, group, layout, **grid)


def asymmetric(*args: Any, scale_bits: int | None = None) -> Any:
    return q(*args, grid="asymmetric", scale_bits=scale_bits)


def _flags() -> set[str]:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        line = next((line for line in file if line.startswith("flags")), ":")
    return set(line.split(":", 1)[1].split())


def lacks(name: str) -> str:
    """Why a processor's kernels cannot run here, or an empty string."""
    if name.startswith("neon"):
        return lacking()
    avx512 = {"avx512f", "avx512bw", "avx512vl"}
    avx2 = {"avx2", "fma"}
    needed = {
        "avx512": avx512,
        "vnni": avx512 | {"avx512_vnni"},
        "amx": avx512 | {"avx512_vnni", "amx_tile", "amx_bf16"},
        "avx2_vnni": avx2 | {"avx_vnni"},
        "avx2": avx2,
        "sse": {"sse4_2"},
    }
    missing = sorted(needed[name] - _flags())
    return f"this machine has no {', '.join(missing)}" if missing else ""


def stored(fmt: WeightFormat, n: int, k: int) -> tuple[list[Any], Any, Any]:
    """(stored parts, weights f64[n, k], their biases or 0) of random codes; padding is junk."""
    random = np.random.default_rng(n * k)
    kind = np.dtype(ml_dtypes.bfloat16 if fmt.dtype == "bfloat16" else fmt.dtype)
    if fmt.is_float:
        weights = random.normal(size=(n, k)).astype(kind)
        return [weights], weights.astype(np.float64), 0.0
    rows = 1 if fmt.group == "tensor" else n
    groups, made = fmt.num_groups(k), {}
    for part in fmt.stored(n, k)[1:]:
        name = part.suffix.removeprefix("q_")
        bits = fmt.bits if name == "zero" else fmt.scale_bits
        if fmt.grid == "mxfp4":
            made[name] = random.integers(120, 127, (rows, groups)).astype(np.uint8)
        elif bits and not name.startswith("block"):
            made[name] = random.integers(0, 2**bits, (rows, groups)).astype(np.uint8)
        else:
            count = fmt.num_blocks(k) if name.startswith("block") else groups
            signs = random.choice([-1, 1], (rows, count))
            made[name] = (signs * random.uniform(0.01, 0.1, (rows, count))).astype(kind)
    codes = random.integers(0, 2**fmt.bits, (n, groups * fmt.group_size(k))).astype(np.uint8)
    parts = store(Quantized(codes, Grid(**made)), fmt)
    if fmt.sparse_words:
        parts["q_weight"] |= np.uint32(3 << 30)  # the unused bits
    # packing.py is checked bit by bit in tests/quant_schemes; its products are exact in f64.
    weights = dequantize(parts, fmt, n, k, "float64")
    zeros = store(Quantized(codes * np.uint8(0), Grid(**made)), fmt)
    bias = 0.0 if fmt.grid in ("symmetric", "mxfp4") else dequantize(zeros, fmt, n, k, "float64")
    return [parts[part.suffix] for part in fmt.stored(n, k)], weights, bias


def tensor(array: Any) -> Any:
    return tvm.runtime.tensor(array)
