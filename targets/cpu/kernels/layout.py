"""The weight layout of the CPU kernels, and the repack functions from the stored layout.

Stored (canonical):  [n, columns] (KN: transposed), see quant_schemes/packing.py; float [n, k]
Here (lanes L):      [n', columns, L]
with row = block * L + lane and n' = ceil(n / L) rounded up to whole GEMM panels, padded with 0. So
one aligned vector load takes one word (or number) of L rows. Of a weight of several experts, one
below the other, each expert's n rows lie so: [experts * n', columns, L]. The columns of each part:
    q_weight                     words of quads (quads.py), ceil(k / 32) * bits of them
    q_scale, q_bias, q_block_*   the stored numbers; one scale of a tensor is repeated for each row
    streams of group codes       uint8 codes (q_zero, two-level q_scale and q_bias), except
        `streamed` ones          the stored words, where a step of the kernels ends at a word's end
Numbers stay f16 or f32; bf16 numbers become f32, and bf16 weights travel as bits in uint16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from tvm import te, tirx
from tvm.tirx.script.builder import ir as T

from qcc.quant_schemes.attributes import REPACK, ROLE
from qcc.quant_schemes.format import UNIT, WeightFormat
from qcc.targets.cpu.isa import Isa
from qcc.targets.cpu.kernels.decode import code_scalar
from qcc.targets.cpu.kernels.quads import row_words, words_of_codes
from qcc.targets.cpu.kernels.tir import parallel, serial
from qcc.targets.kernel import i64, kernel

STREAMED_GROUP = 16  # columns of the widest group whose 4-bit scale codes are read from words


def row_blocks(n: int, isa: Isa) -> int:
    """Blocks of L rows, whole GEMM panels of tile_n blocks."""
    return -(-n // (isa.lanes * isa.tile_n)) * isa.tile_n


def streamed(fmt: WeightFormat) -> bool:
    """Whether the kernels read two-level scale codes from the stored words: 8 codes in each."""
    return fmt.scale_bits == 4 and isinstance(fmt.group, int) and fmt.group <= STREAMED_GROUP


def _code_bits(fmt: WeightFormat, suffix: str) -> int | None:
    """Bits of the codes of a part that holds one code a group; None: it holds something else."""
    if suffix == "q_zero":
        return fmt.bits
    return fmt.scale_bits if suffix in ("q_scale", "q_bias") else None


def packed_parts(
    fmt: WeightFormat, n: int, k: int, isa: Isa, experts: int = 1
) -> list[tuple[str, tuple[int, int, int], str]]:
    """(suffix, shape [experts * n', columns, L], dtype) of each part in the kernels' layout."""
    found = []
    for part in fmt.stored(n, k):
        columns, dtype = part.shape[0] if _transposed(fmt) else part.shape[1], part.dtype
        if part.suffix == "q_weight":
            columns = row_words(k, fmt.bits)
        elif _code_bits(fmt, part.suffix) and not streamed(fmt):
            columns, dtype = fmt.num_groups(k), "uint8"
        if dtype == "bfloat16":
            dtype = "uint16" if part.suffix == "weight" else "float32"
        found.append((part.suffix, (experts * row_blocks(n, isa), columns, isa.lanes), dtype))
    return found


def _transposed(fmt: WeightFormat) -> bool:
    return not fmt.is_float and fmt.layout == "KN"


@cache
def repack_func(
    fmt: WeightFormat, n: int, k: int, part: int, isa: Isa, experts: int = 1
) -> tirx.PrimFunc:
    """PrimFunc (stored part) -> the same part in the kernels' layout; role `repack`.

    The weight is [experts * n, k].
    """
    stored = fmt.stored(experts * n, k)[part]
    _, shape, dtype = packed_parts(fmt, n, k, isa, experts)[part]
    if stored.suffix == "q_weight":
        return _repack_codes(fmt, n, k, isa, experts)
    source = te.placeholder(
        [tirx.IntImm("int64", d) for d in stored.shape], stored.dtype, name=stored.suffix
    )
    rows = stored.shape[1] if _transposed(fmt) else stored.shape[0]

    def element(block: tirx.Var, column: tirx.Var, lane: tirx.Var) -> tirx.Expr:
        row, first = _row_of(n, isa, experts, block, lane)
        inside = tirx.min(first + row, i64(rows - 1))

        def at(index: tirx.Expr) -> tirx.Expr:
            return source[index, inside] if _transposed(fmt) else source[inside, index]

        if dtype == "uint8":
            bits = _code_bits(fmt, stored.suffix)
            assert bits is not None, f"{stored.suffix} holds no codes"
            value = code_scalar(at, column, bits).astype("uint8")
        elif stored.dtype == "bfloat16":
            bf16 = at(column)
            bits16 = dtype == "uint16"
            value = tirx.reinterpret("uint16", bf16) if bits16 else bf16.astype("float32")
        else:
            value = at(column)
        return tirx.if_then_else(row < n, value, tirx.const(0, dtype))

    out = te.compute([tirx.IntImm("int64", d) for d in shape], element, name="repack")
    return te.create_prim_func([source, out]).without_attr("global_symbol").with_attr(ROLE, REPACK)


def _row_of(n: int, isa: Isa, experts: int, block: Any, lane: Any) -> tuple[Any, Any]:
    """(row of its expert's matrix, first row of that) of a lane of a block."""
    if experts == 1:
        return block * isa.lanes + lane, i64(0)
    blocks = row_blocks(n, isa)
    row = tirx.floormod(block, blocks) * isa.lanes + lane
    return row, tirx.floordiv(block, blocks) * n


def _repack_codes(fmt: WeightFormat, n: int, k: int, isa: Isa, experts: int) -> tirx.PrimFunc:
    """Stored words -> quads, a unit of columns at a time: shifts are constants but for words
    that hold whole codes only."""
    (part, *_), (_, shape, dtype) = fmt.stored(experts * n, k), packed_parts(fmt, n, k, isa)[0]
    blocks, words, lanes = experts * shape[0], fmt.num_words(k), isa.lanes

    def body(stored: Any, out: Any) -> None:
        with parallel(blocks) as block:
            with serial(-(-k // UNIT)) as unit, serial(lanes) as lane:
                row, first = _row_of(n, isa, experts, block, lane)
                exists = row < n

                def word(index: Any) -> Any:
                    inside = tirx.all(exists, index < words)
                    at = (first + row, index)
                    value = stored[at if fmt.layout == "NK" else at[::-1]]
                    return tirx.if_then_else(inside, value, tirx.const(0, "uint32"))

                for i, value in enumerate(words_of_codes(_unit_codes(fmt, word, unit), fmt.bits)):
                    T.buffer_store(out, value, [block, unit * fmt.bits + i, lane])

    args = [("stored", part.shape, "uint32"), ("repack", (blocks, *shape[1:]), dtype)]
    return kernel("repack", args, body, {ROLE: REPACK})


def _unit_codes(fmt: WeightFormat, word: Callable[[Any], Any], unit: Any) -> list[Any]:
    """The UNIT codes, uint32, of a unit of stored words."""
    if fmt.sparse_words:
        return [code_scalar(word, unit * UNIT + i, fmt.bits, sparse=True) for i in range(UNIT)]
    own = [T.bind(word(unit * fmt.bits + i)) for i in range(fmt.bits)]
    codes = []
    for column in range(UNIT):
        at, shift = divmod(column * fmt.bits, 32)
        code = own[at] >> tirx.const(shift, "uint32") if shift else own[at]
        if shift + fmt.bits > 32:
            code = code | (own[at + 1] << tirx.const(32 - shift, "uint32"))
        codes.append(code & tirx.const(2**fmt.bits - 1, "uint32"))
    return codes


@cache
def cast_func(extent: int, source: str, target: str) -> tirx.PrimFunc:
    """PrimFunc (source[extent]) -> target[extent]; role `repack`."""
    x = te.placeholder([tirx.IntImm("int64", extent)], source, name="stored")
    out = te.compute(x.shape, lambda i: x[i].astype(target), name="cast")
    return te.create_prim_func([x, out]).without_attr("global_symbol").with_attr(ROLE, REPACK)
