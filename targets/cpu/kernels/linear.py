"""y = x @ W.T over repacked weights: which inner loop runs, by the precision and the rows of x.

The kernels take x twice, as it is and as `activations.prepare` leaves it (which for a float weight
and few rows is nothing), and `mode` int32[1], which the runtime sets: HIGH multiplies x itself, LOW
its int8 codes, TILES the bf16 tiles of many rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qcc.quant_schemes.attributes import LINEAR, ROLE
from qcc.quant_schemes.format import WeightFormat
from qcc.targets.cpu.isa import Isa
from qcc.targets.cpu.kernels.activations import (
    HIGH,
    TILES,
    TILES_FROM,
    Activations,
    arguments,
    emit_prepare,
    split,
)
from qcc.targets.cpu.kernels.gemm import Rows, multiply_panel
from qcc.targets.cpu.kernels.gemv import products, store_lanes, sums_of
from qcc.targets.cpu.kernels.integer import integer_products
from qcc.targets.cpu.kernels.layout import packed_parts, row_blocks
from qcc.targets.cpu.kernels.row_sources import Gated
from qcc.targets.cpu.kernels.tiles import gated_tile_gemm, tile_gemm
from qcc.targets.cpu.kernels.tir import i64, kernel, parallel, serial

ROW_TILES = (4, 8)  # rows of x that share unpacked codes; the last for any number


def _arguments(fmt: WeightFormat, n: int, k: int, isa: Isa, rows: Any) -> list[Any]:
    found = arguments(Activations.of(fmt, k, rows == 1, isa), k, rows)
    return [*found, *packed_parts(fmt, n, k, isa), ("y", (rows, n), "float32")]


@cache
def gemv(fmt: WeightFormat, n: int, k: int, isa: Isa) -> tirx.PrimFunc:
    """PrimFunc (x f32[1, k], [prepared, mode], parts) -> y f32[1, n]."""
    blocks = -(-n // isa.lanes)

    def high(x: Any, parts: list[Any], out: Any) -> None:
        sums = sums_of(fmt, x, i64(0), 1, k)
        with parallel(blocks) as block:
            value = products(isa, fmt, k, parts, block, x, i64(0), sums, i64(0))
            store_lanes(isa, out, i64(0), block * isa.lanes, n, value)

    def body(x: Any, *rest: Any) -> None:
        *given, out = rest
        prepared, mode, parts = split(Activations.of(fmt, k, True, isa), given)
        if mode is None:
            high(x, parts, out)
            return
        with T.If(mode[0] == HIGH):
            with T.Then():
                high(x, parts, out)
            with T.Else(), parallel(blocks) as block:
                (value,) = integer_products(isa, fmt, k, parts, block, prepared, [i64(0)])
                store_lanes(isa, out, i64(0), block * isa.lanes, n, value)

    return kernel("gemv", _arguments(fmt, n, k, isa, 1), body, {ROLE: LINEAR})


@cache
def gemm(fmt: WeightFormat, n: int, k: int, isa: Isa) -> tirx.PrimFunc:
    """PrimFunc (x f32[m, k], [prepared, mode], parts) -> y f32[m, n], any m."""
    rows = tirx.Var("m", "int64")
    work = _Gemm(fmt, n, k, isa, rows)

    def body(x: Any, *rest: Any) -> None:
        *given, out = rest
        prepared, mode, parts = split(work.kind, given)
        if mode is None:
            work.high(x, parts, out)
            return
        choices = [(mode[0] == HIGH, lambda: work.high(x, parts, out))]
        if work.kind and work.kind.tiles:
            many = tirx.all(mode[0] == TILES, rows >= TILES_FROM)
            choices.append(
                (many, lambda: tile_gemm(isa, fmt, n, k, prepared[-1], parts, out, rows))
            )
        _choose(choices, lambda: work.low(x, prepared, parts, out))

    return kernel("gemm", _arguments(fmt, n, k, isa, rows), body, {ROLE: LINEAR})


@cache
def gated_gemm(
    fmt: WeightFormat, k: int, gated: Gated, following: Activations, isa: Isa
) -> tirx.PrimFunc:
    """PrimFunc (x f32[m, k], prepared, mode, parts) -> both f32[m, 2 f], y f32[m, f], prepared y.

    A GEMM with a weight [2 f, k] and `prepare` of the gated halves in one: of many rows as tiles
    nothing is written but the tiles of y, which is `following.parts`' last; f = gated.k.
    """
    rows, n = tirx.Var("m", "int64"), 2 * gated.k
    work = _Gemm(fmt, n, k, isa, rows)
    *inputs, both = _arguments(fmt, n, k, isa, rows)
    outputs = [("both", both[1], both[2]), ("y", (rows, gated.k), "float32")]
    outputs += following.parts(rows)

    def body(x: Any, *rest: Any) -> None:
        given, (out, y, *made) = rest[: -len(outputs)], rest[-len(outputs) :]
        prepared, mode, parts = split(work.kind, given)
        assert mode is not None, "tiles need a mode"

        def apart() -> None:
            with T.If(mode[0] == HIGH):
                with T.Then():
                    work.high(x, parts, out)
                with T.Else():
                    work.low(x, prepared, parts, out)
            emit_prepare(following, isa, gated, [out], mode, rows, y, made, tiles=False)

        with T.If(tirx.all(mode[0] == TILES, rows >= TILES_FROM)):
            with T.Then():
                gated_tile_gemm(isa, fmt, k, gated, prepared[-1], parts, made[-1], rows)
            with T.Else():
                apart()

    args = [*inputs, *outputs]
    return kernel("gated_gemm", args, body, {ROLE: LINEAR}, outputs=len(outputs))


class _Gemm:
    """How any number of rows are multiplied but by tiles."""

    def __init__(self, fmt: WeightFormat, n: int, k: int, isa: Isa, rows: Any) -> None:
        self.fmt, self.n, self.k, self.isa, self.rows = fmt, n, k, isa, rows
        self.kind = Activations.of(fmt, k, False, isa)

    def high(self, x: Any, parts: list[Any], out: Any) -> None:
        """By float32."""
        isa, rows = self.isa, Rows(self.rows)
        with parallel(row_blocks(self.n, isa) // isa.tile_n) as panel:
            block = panel * isa.tile_n
            multiply_panel(isa, self.fmt, self.n, self.k, parts, x, out, panel, block, rows)

    def low(self, x: Any, prepared: list[Any], parts: list[Any], out: Any) -> None:
        """By int8, where the weight has codes."""
        if self.kind is None or self.kind.sums is None:
            self.high(x, parts, out)
            return
        few, many = ROW_TILES
        with T.If(self.rows <= few):
            with T.Then():
                self._by_rows(few, prepared[:3], parts, out)
            with T.Else():
                self._by_rows(many, prepared[:3], parts, out)

    def _by_rows(self, tile: int, codes: list[Any], parts: list[Any], out: Any) -> None:
        isa, rows, n = self.isa, self.rows, self.n
        with parallel(-(-n // isa.lanes)) as block:
            with serial(tirx.floordiv(rows + tile - 1, tile)) as number:
                first = number * tile
                sources = [T.bind(T.min(first + i, rows - 1)) for i in range(tile)]
                values = integer_products(isa, self.fmt, self.k, parts, block, codes, sources)
                _store_rows(isa, out, first, rows, block * isa.lanes, n, values)


def _choose(choices: Sequence[tuple[Any, Callable[[], None]]], last: Callable[[], None]) -> None:
    """Emit the first whose condition holds, or the last."""
    if not choices:
        last()
        return
    (condition, emit), *others = choices
    with T.If(condition):
        with T.Then():
            emit()
        with T.Else():
            _choose(others, last)


def _store_rows(
    isa: Isa, out: Any, first: Any, rows: Any, column: Any, n: int, values: Sequence[Any]
) -> None:
    """Store vectors of rows first, first + 1, ... as far as there are so many."""
    for i, value in enumerate(values):
        with T.If(first + i < rows), T.Then():
            store_lanes(isa, out, first + i, column, n, value)
