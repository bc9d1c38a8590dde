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
from qcc.targets.cpu.kernels.tir import parallel, serial
from qcc.targets.kernel import i64, kernel

ROW_TILES = (4, 8)  # rows of x that share unpacked codes; the last for any number


def _arguments(
    fmt: WeightFormat, n: int, k: int, isa: Isa, rows: Any, adds: bool = False
) -> list[Any]:
    found = arguments(Activations.of(fmt, k, rows == 1, isa), k, rows)
    names = ("added", "y") if adds else ("y",)
    return [
        *found,
        *packed_parts(fmt, n, k, isa),
        *((name, (rows, n), "float32") for name in names),
    ]


@cache
def gemv(fmt: WeightFormat, n: int, k: int, isa: Isa, adds: bool = False) -> tirx.PrimFunc:
    """PrimFunc (x f32[1, k], [prepared, mode], parts, [added f32[1, n]]) -> y f32[1, n].

    `adds`: y is what the last argument has besides.
    """
    blocks = -(-n // isa.lanes)

    def body(x: Any, *rest: Any) -> None:
        *given, out = rest
        added = given.pop() if adds else None
        prepared, mode, parts = split(Activations.of(fmt, k, True, isa), given)

        def store(block: Any, value: Any) -> None:
            store_lanes(isa, out, i64(0), block * isa.lanes, n, value, added)

        def high() -> None:
            sums = sums_of(fmt, x, i64(0), 1, k)
            with parallel(blocks) as block:
                store(block, products(isa, fmt, k, parts, block, x, i64(0), sums, i64(0)))

        if mode is None:
            high()
            return
        with T.If(mode[0] == HIGH):
            with T.Then():
                high()
            with T.Else(), parallel(blocks) as block:
                (value,) = integer_products(isa, fmt, k, parts, block, prepared, [i64(0)])
                store(block, value)

    return kernel("gemv", _arguments(fmt, n, k, isa, 1, adds), body, {ROLE: LINEAR})


@cache
def gemm(fmt: WeightFormat, n: int, k: int, isa: Isa, adds: bool = False) -> tirx.PrimFunc:
    """PrimFunc (x f32[m, k], [prepared, mode], parts, [added f32[m, n]]) -> y f32[m, n], any m.

    `adds`: as gemv does.
    """
    rows = tirx.Var("m", "int64")
    work = _Gemm(fmt, n, k, isa, rows)

    def body(x: Any, *rest: Any) -> None:
        *given, out = rest
        added = given.pop() if adds else None
        prepared, mode, parts = split(work.kind, given)
        if mode is None:
            work.high(x, parts, out, added)
            return
        choices = [(mode[0] == HIGH, lambda: work.high(x, parts, out, added))]
        if work.kind and work.kind.tiles:
            many = tirx.all(mode[0] == TILES, rows >= TILES_FROM)
            tiles = isa, fmt, n, k, prepared[-1], parts, out, rows, added
            choices.append((many, lambda: tile_gemm(*tiles)))
        _choose(choices, lambda: work.low(x, prepared, parts, out, added))

    return kernel("gemm", _arguments(fmt, n, k, isa, rows, adds), body, {ROLE: LINEAR})


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

    def high(self, x: Any, parts: list[Any], out: Any, added: Any | None = None) -> None:
        """By float32."""
        isa, rows = self.isa, Rows(self.rows)
        with parallel(row_blocks(self.n, isa) // isa.tile_n) as panel:
            block = panel * isa.tile_n
            work = self.fmt, self.n, self.k, parts, x, out, panel, block, rows, added
            multiply_panel(isa, *work)

    def low(
        self, x: Any, prepared: list[Any], parts: list[Any], out: Any, added: Any | None = None
    ) -> None:
        """By int8, where the weight has codes."""
        if self.kind is None or self.kind.sums is None:
            self.high(x, parts, out, added)
            return
        few, many = ROW_TILES
        with T.If(self.rows <= few):
            with T.Then():
                self._by_rows(few, prepared[:3], parts, out, added)
            with T.Else():
                self._by_rows(many, prepared[:3], parts, out, added)

    def _by_rows(
        self, tile: int, codes: list[Any], parts: list[Any], out: Any, added: Any | None
    ) -> None:
        isa, rows, n = self.isa, self.rows, self.n
        with parallel(-(-n // isa.lanes)) as block:
            with serial(tirx.floordiv(rows + tile - 1, tile)) as number:
                first = number * tile
                sources = [T.bind(T.min(first + i, rows - 1)) for i in range(tile)]
                values = integer_products(isa, self.fmt, self.k, parts, block, codes, sources)
                for i, value in enumerate(values):
                    with T.If(first + i < rows), T.Then():
                        store_lanes(isa, out, first + i, block * isa.lanes, n, value, added)


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
