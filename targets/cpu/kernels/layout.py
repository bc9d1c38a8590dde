"""The weight layout of the CPU kernels, and the repack functions from the stored layout.

Stored (canonical):  q_weight uint32[n, w], q_scale[n, g] (KN: transposed), float weight [n, k]
Here (lanes L):      words uint32[n', w, L], scales[n', g, L], float weight [n', k, L]
with row = block * L + lane and n' = ceil(n / L) rounded up to whole GEMM panels, padded with 0. So
one aligned vector load takes one word (or number) of L rows. Scales stay f16 or f32; bf16 scales
become f32, and bf16 weights travel as their bits in uint16.
"""

from __future__ import annotations

from functools import cache

from tvm import te, tirx

from qcc.quant_schemes.attributes import REPACK, ROLE
from qcc.quant_schemes.scheme import WeightFormat
from qcc.targets.cpu.isa import Isa


def row_blocks(n: int, isa: Isa) -> int:
    """Blocks of L rows, whole GEMM panels of tile_n blocks."""
    return -(-n // (isa.lanes * isa.tile_n)) * isa.tile_n


def packed_dtype(suffix: str, dtype: str) -> str:
    """What a stored part's dtype becomes in the kernels' layout."""
    if dtype != "bfloat16":
        return dtype
    return "uint16" if suffix == "weight" else "float32"


def packed_parts(
    fmt: WeightFormat, n: int, k: int, isa: Isa
) -> list[tuple[str, tuple[int, int, int], str]]:
    """(suffix, shape [n', columns, L], dtype) of each part in the kernels' layout."""
    found = []
    for part in fmt.stored(n, k):
        columns = part.shape[0] if _transposed(fmt) else part.shape[1]
        shape = (row_blocks(n, isa), columns, isa.lanes)
        found.append((part.suffix, shape, packed_dtype(part.suffix, part.dtype)))
    return found


def _transposed(fmt: WeightFormat) -> bool:
    return not fmt.is_float and fmt.layout == "KN"


@cache
def repack_func(fmt: WeightFormat, n: int, k: int, part: int, isa: Isa) -> tirx.PrimFunc:
    """PrimFunc (stored part) -> the same part in the kernels' layout; role `repack`."""
    stored = fmt.stored(n, k)[part]
    _, shape, dtype = packed_parts(fmt, n, k, isa)[part]
    source = te.placeholder(
        [tirx.IntImm("int64", d) for d in stored.shape], stored.dtype, name=stored.suffix
    )

    def element(block: tirx.Var, column: tirx.Var, lane: tirx.Var) -> tirx.Expr:
        row = block * isa.lanes + lane
        inside = tirx.min(row, tirx.IntImm("int64", n - 1))
        value = source[column, inside] if _transposed(fmt) else source[inside, column]
        if stored.dtype == "bfloat16":
            value = (
                tirx.reinterpret("uint16", value) if dtype == "uint16" else value.astype("float32")
            )
        return tirx.if_then_else(row < n, value, tirx.const(0, dtype))

    out = te.compute([tirx.IntImm("int64", d) for d in shape], element, name="repack")
    return te.create_prim_func([source, out]).without_attr("global_symbol").with_attr(ROLE, REPACK)


@cache
def cast_func(extent: int, source: str, target: str) -> tirx.PrimFunc:
    """PrimFunc (source[extent]) -> target[extent]; role `repack`."""
    x = te.placeholder([tirx.IntImm("int64", extent)], source, name="stored")
    out = te.compute(x.shape, lambda i: x[i].astype(target), name="cast")
    return te.create_prim_func([x, out]).without_attr("global_symbol").with_attr(ROLE, REPACK)
