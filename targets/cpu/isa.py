"""Isa: what a processor's vector unit looks like to our kernels, read from the LLVM target."""

from __future__ import annotations

from dataclasses import dataclass, replace

import tvm

from qcc.targets.cpu.build import HIGH_ONLY


@dataclass(frozen=True)
class Isa:
    """Vector width, register tile and dot products; the kernel family is parametrized by these.

    `lanes` f32 numbers in a vector; `table_bits`: codes of up to so many bits become numbers by one
    instruction, a lookup in a table in registers (AVX-512 vpermi2ps 5, AVX2 vpermps 3), 0: there is
    none. A GEMM micro-tile keeps `tile_m` x `tile_n` vectors of accumulators in registers.

    `dot` adds products of four bytes to each int32 lane: vpdpbusd ("vnni": unsigned by signed),
    vpmaddubsw and vpmaddwd ("maddubs"), aarch64's "usdot" and "sdot" (signed by signed), None:
    activations stay floating. `tiles`: AMX multiplies bf16 tiles of 16 x 32 by 32 x 16.
    """

    lanes: int
    table_bits: int
    tile_m: int
    tile_n: int
    dot: str | None = None
    tiles: bool = False


AVX512 = Isa(lanes=16, table_bits=5, tile_m=6, tile_n=4, dot="maddubs")
AVX512_VNNI = replace(AVX512, dot="vnni")
AVX512_AMX = replace(AVX512_VNNI, tiles=True)
AVX2 = Isa(lanes=8, table_bits=3, tile_m=6, tile_n=2, dot="maddubs")
AVX2_VNNI = replace(AVX2, dot="vnni")
NEON = Isa(lanes=4, table_bits=0, tile_m=6, tile_n=4)
NEON_DOT = replace(NEON, dot="sdot")
NEON_I8MM = replace(NEON, dot="usdot")
SSE = Isa(lanes=4, table_bits=0, tile_m=6, tile_n=2)
# Of each machine, the narrowest first.
X86_64 = {
    "sse": SSE,
    "avx2": AVX2,
    "avx2_vnni": AVX2_VNNI,
    "avx512": AVX512,
    "avx512_vnni": AVX512_VNNI,
    "avx512_amx": AVX512_AMX,
}
AARCH64 = {"neon": NEON, "neon_dotprod": NEON_DOT, "neon_i8mm": NEON_I8MM}


def isa_of(target: tvm.target.Target) -> Isa:
    """The widest description whose instructions the target has, and is to use."""
    found = _widest(target)
    return replace(found, dot=None, tiles=False) if HIGH_ONLY in target.keys else found


def _widest(target: tvm.target.Target) -> Isa:

    def has(*features: str) -> bool:
        probe = tvm.target.codegen.llvm_cpu_has_features
        return all(probe(feature, target) for feature in features)

    triple = str(target.attrs.get("mtriple", "") or tvm.target.codegen.llvm_get_system_triple())
    if triple.startswith(("aarch64", "arm64")):
        return NEON_I8MM if has("i8mm") else NEON_DOT if has("dotprod") else NEON
    if has("avx512f", "avx512bw", "avx512vl"):
        if has("amx-tile", "amx-bf16", "avx512bf16", "avx512vnni"):
            return AVX512_AMX
        return AVX512_VNNI if has("avx512vnni") else AVX512
    if has("avx2", "fma"):
        return AVX2_VNNI if has("avxvnni") else AVX2
    return SSE


def rank_of(target: tvm.target.Target) -> tuple[str, int]:
    """The name of `isa_of` a target, and its place among those of the machine: wider is higher."""
    isa = _widest(target)
    found = (
        (name, rank)
        for names in (X86_64, AARCH64)
        for rank, (name, known) in enumerate(names.items())
        if known == isa
    )
    return next(found)


def vector(isa: Isa, dtype: str) -> str:
    """The vector type of `dtype` with the unit's lanes, as `float32x16`."""
    return f"{dtype}x{isa.lanes}"
