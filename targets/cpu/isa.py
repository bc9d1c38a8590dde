"""Isa: what a processor's vector unit looks like to our kernels, read from the LLVM target."""

from __future__ import annotations

from dataclasses import dataclass

import tvm


@dataclass(frozen=True)
class Isa:
    """Vector width and register tile; the kernel family is parametrized by these alone.

    `lanes` f32 numbers in a vector; `table_bits`: codes of up to so many bits become numbers by one
    instruction, a lookup in a table in registers (AVX-512 vpermi2ps 5, AVX2 vpermps 3), 0: there is
    none. A GEMM micro-tile keeps `tile_m` x `tile_n` vectors of accumulators in registers.
    """

    lanes: int
    table_bits: int
    tile_m: int
    tile_n: int


AVX512 = Isa(lanes=16, table_bits=5, tile_m=6, tile_n=4)
AVX2 = Isa(lanes=8, table_bits=3, tile_m=6, tile_n=2)
NEON = Isa(lanes=4, table_bits=0, tile_m=6, tile_n=4)
SSE = Isa(lanes=4, table_bits=0, tile_m=6, tile_n=2)


def isa_of(target: tvm.target.Target) -> Isa:
    """The widest description whose instructions the target has."""

    def has(feature: str) -> bool:
        return bool(tvm.target.codegen.llvm_cpu_has_features(feature, target))

    triple = str(target.attrs.get("mtriple", "") or tvm.target.codegen.llvm_get_system_triple())
    if triple.startswith(("aarch64", "arm64")):
        return NEON
    if has("avx512f"):
        return AVX512
    if has("avx2") and has("fma"):
        return AVX2
    return SSE


def vector(isa: Isa, dtype: str) -> str:
    """The vector type of `dtype` with the unit's lanes, as `float32x16`."""
    return f"{dtype}x{isa.lanes}"
