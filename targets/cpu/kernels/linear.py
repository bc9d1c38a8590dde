"""y = x @ W.T over repacked weights: which inner loop runs, by the precision and the rows of x.

A quantized weight's kernels take x twice, as it is and as `activations.prepare` leaves it, and
`mode` int32[1], which the runtime sets: HIGH multiplies x itself, LOW its int8 codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qcc.quant_schemes.attributes import LINEAR, ROLE
from qcc.quant_schemes.format import WeightFormat
from qcc.targets.cpu.isa import Isa
from qcc.targets.cpu.kernels.activations import HIGH, Activations
from qcc.targets.cpu.kernels.gemm import Rows, multiply_panel
from qcc.targets.cpu.kernels.gemv import products, store_lanes, sums_of
from qcc.targets.cpu.kernels.integer import integer_products
from qcc.targets.cpu.kernels.layout import packed_parts, row_blocks
from qcc.targets.cpu.kernels.tir import i64, kernel, parallel, serial

ROW_TILES = (4, 8)  # rows of x that share unpacked codes; the last for any number


def takes_codes(fmt: WeightFormat, isa: Isa) -> bool:
    """Whether the kernels of a weight take prepared activations and `mode` after x."""
    return not fmt.is_float and isa.dot is not None


def _arguments(fmt: WeightFormat, n: int, k: int, isa: Isa, rows: Any) -> list[Any]:
    found: list[Any] = [("x", (rows, k), "float32")]
    if takes_codes(fmt, isa):
        found += [*Activations.of(fmt, k).parts(rows), ("mode", (1,), "int32")]
    return [*found, *packed_parts(fmt, n, k, isa), ("y", (rows, n), "float32")]


@cache
def gemv(fmt: WeightFormat, n: int, k: int, isa: Isa) -> tirx.PrimFunc:
    """PrimFunc (x f32[1, k], [codes, scales, sums, mode], parts) -> y f32[1, n]."""
    blocks = -(-n // isa.lanes)

    def high(x: Any, parts: list[Any], out: Any) -> None:
        sums = sums_of(fmt, x, i64(0), 1, k)
        with parallel(blocks) as block:
            value = products(isa, fmt, k, parts, block, x, i64(0), sums, i64(0))
            store_lanes(isa, out, i64(0), block * isa.lanes, n, value)

    def low(activations: list[Any], parts: list[Any], out: Any) -> None:
        with parallel(blocks) as block:
            (value,) = integer_products(isa, fmt, k, parts, block, activations, [i64(0)])
            store_lanes(isa, out, i64(0), block * isa.lanes, n, value)

    return _kernel("gemv", fmt, n, k, isa, 1, high, low)


@cache
def gemm(fmt: WeightFormat, n: int, k: int, isa: Isa) -> tirx.PrimFunc:
    """PrimFunc (x f32[m, k], [codes, scales, sums, mode], parts) -> y f32[m, n], any m."""
    rows = tirx.Var("m", "int64")

    def high(x: Any, parts: list[Any], out: Any) -> None:
        with parallel(row_blocks(n, isa) // isa.tile_n) as panel:
            multiply_panel(isa, fmt, n, k, parts, x, out, panel, panel * isa.tile_n, Rows(rows))

    def low(activations: list[Any], parts: list[Any], out: Any) -> None:
        few, many = ROW_TILES
        with T.If(rows <= few):
            with T.Then():
                by_rows(few, activations, parts, out)
            with T.Else():
                by_rows(many, activations, parts, out)

    def by_rows(tile: int, activations: list[Any], parts: list[Any], out: Any) -> None:
        with parallel(-(-n // isa.lanes)) as block:
            with serial(tirx.floordiv(rows + tile - 1, tile)) as number:
                first = number * tile
                sources = [T.bind(T.min(first + i, rows - 1)) for i in range(tile)]
                values = integer_products(isa, fmt, k, parts, block, activations, sources)
                _store_rows(isa, out, first, rows, block * isa.lanes, n, values)

    return _kernel("gemm", fmt, n, k, isa, rows, high, low)


def _store_rows(
    isa: Isa, out: Any, first: Any, rows: Any, column: Any, n: int, values: Sequence[Any]
) -> None:
    """Store vectors of rows first, first + 1, ... as far as there are so many."""
    for i, value in enumerate(values):
        with T.If(first + i < rows), T.Then():
            store_lanes(isa, out, first + i, column, n, value)


def _kernel(
    name: str, fmt: WeightFormat, n: int, k: int, isa: Isa, rows: Any, high: Any, low: Any
) -> tirx.PrimFunc:
    """The PrimFunc that runs `high` or, where there are codes and the mode says so, `low`."""

    def body(x: Any, *rest: Any) -> None:
        *given, out = rest
        if not takes_codes(fmt, isa):
            high(x, given, out)
            return
        codes, scales, sums, mode, *parts = given
        with T.If(mode[0] == HIGH):
            with T.Then():
                high(x, parts, out)
            with T.Else():
                low([codes, scales, sums], parts, out)

    return kernel(name, _arguments(fmt, n, k, isa, rows), body, {ROLE: LINEAR})
