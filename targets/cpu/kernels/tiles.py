"""Many rows of bf16 activations times weights expanded to bf16, by AMX tiles; sums are f32.

A tile has 16 rows of 64 bytes. Of x: 16 rows, 32 columns. Of the weight: 16 pairs of columns, and
for each of 16 rows the two numbers of the pair, which is one block of the kernels' layout. Weights
are expanded once for a slab of rows of x, two blocks and a chunk of columns at a time, which stay
in the first cache; the second one holds the slab's columns of x and its sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qcc.quant_schemes.format import WeightFormat
from qcc.targets.cpu.isa import Isa
from qcc.targets.cpu.kernels import amx
from qcc.targets.cpu.kernels.amx import COLUMNS, ROWS, WORDS
from qcc.targets.cpu.kernels.gemv import store_lanes
from qcc.targets.cpu.kernels.layout import row_blocks
from qcc.targets.cpu.kernels.row_sources import Gated
from qcc.targets.cpu.kernels.steps import Step, steps_of
from qcc.targets.cpu.kernels.tir import extents, i64, lanes_from, parallel, serial, splat, zeros

CHUNK = 256  # most columns of a chunk: with two blocks 16 KiB, a third of the first cache
PANEL = 16  # most blocks of a panel
SLAB = 32  # tiles of rows of x whose sums are held at once: a panel of them is 512 KiB
IMBALANCE = 1.05  # of the work of two threads, that a wide panel may cost


def panel_blocks(blocks: int) -> int:
    """Blocks of a panel, a multiple of 4: many, but two threads shall have about the same work."""
    panel = PANEL
    while panel > 4:
        panels = -(-blocks // panel)
        if 2 * panel * -(-panels // 2) <= IMBALANCE * blocks:
            break
        panel //= 2
    return panel


def tile_gemm(
    isa: Isa, fmt: WeightFormat, n: int, k: int, tiles: Any, parts: list[Any], out: Any, m: Any
) -> None:
    """Set out f32[m, n]: rows of x, given as tiles uint32[ceil(m / 16), ceil(k / 32), WORDS]."""
    blocks = row_blocks(n, isa)
    panel = panel_blocks(blocks)
    _for_panels(blocks // 2, _Panel(isa, fmt, n, k, tiles, parts, out, m, panel))


def gated_tile_gemm(
    isa: Isa,
    fmt: WeightFormat,
    k: int,
    gated: Gated,
    tiles: Any,
    parts: list[Any],
    out: Any,
    m: Any,
) -> None:
    """Set out, tiles of act(gate) * up: gate and up are x, given as tiles, times the two halves.

    The weight is [2 gated.k, k]; gated.k is a multiple of COLUMNS.
    """
    pairs, n = gated.k // ROWS, 2 * gated.k
    panel = panel_blocks(2 * pairs)
    _for_panels(pairs, _GatedPanel(isa, fmt, n, k, tiles, parts, out, m, panel, gated))


def _for_panels(pairs: int, work: _Panel) -> None:
    """Let each thread multiply a panel of `pairs` pairs of blocks at a time with all rows."""
    most = work.panel // 2
    with parallel(-(-pairs // most)) as number:
        first = T.bind(number * most)
        count = T.bind(T.min(i64(most), i64(pairs) - first))
        work.enter()
        row_tiles = tirx.floordiv(work.m + ROWS - 1, ROWS)
        with serial(tirx.floordiv(row_tiles + SLAB - 1, SLAB)) as slab:
            start = T.bind(slab * SLAB)
            work.slab(first, count, start, T.bind(T.min(i64(SLAB), row_tiles - start)))
        amx.call(amx.RELEASE)


@dataclass
class _Panel:
    """Pairs of blocks of a task: room for a pair's weights and for the sums of a slab."""

    isa: Isa
    fmt: WeightFormat
    n: int
    k: int
    tiles: Any
    parts: list[Any]
    out: Any
    m: Any
    panel: int  # blocks

    def enter(self) -> None:
        """At the start of a task."""
        step = steps_of(self.fmt, self.k).step
        self.columns = max(CHUNK // step, 1) * step  # steps are whole tiles
        shape = extents((2, -(-self.columns // COLUMNS), WORDS))
        self.weights = T.alloc_buffer(shape, "uint32", scope="global", layout=None)
        shape = extents((SLAB, self.panel, ROWS * ROWS))
        self.sums = T.alloc_buffer(shape, "float32", scope="global", layout=None)
        amx.configure()

    def slab(self, first: Any, count: Any, start: Any, row_tiles: Any) -> None:
        """Multiply pairs first, ... with row tiles start, ...; the last chunk sets `out`."""
        before = -(-self.k // self.columns) - 1
        if before:
            with serial(before) as index:
                self._chunk(first, count, start, row_tiles, index, self.columns)
        rest = self.k - before * self.columns
        self._chunk(first, count, start, row_tiles, i64(before), rest, last=True)

    def _chunk(
        self,
        first: Any,
        count: Any,
        start: Any,
        row_tiles: Any,
        index: Any,
        columns: int,
        last: bool = False,
    ) -> None:
        """Add chunk `index` of the columns; the first one sets the sums."""
        with serial(count) as pair:
            block = T.bind(pair * 2)
            with serial(2) as v:
                self._expand(self.block(first + pair, v), v, index, columns)

            def multiply(size: int, row_tile: Any, block: Any = block) -> None:
                row_tile = T.bind(row_tile)
                corners = [(r, v) for r in range(size) for v in range(2)]
                self._multiply(size, start, row_tile, block, index, columns)
                if last:
                    self._set(start + row_tile, first + pair, row_tile, block, corners)
                    return
                for r, v in corners:
                    self._sum(amx.STORE, row_tile, block, r, v)

            with serial(tirx.floordiv(row_tiles, 2)) as rows:
                multiply(2, rows * 2)
            with T.If(tirx.floormod(row_tiles, 2) == 1), T.Then():
                multiply(1, row_tiles - 1)

    def block(self, pair: Any, v: Any) -> Any:
        """The number of block `v` of a pair in the weight."""
        return pair * 2 + v

    def _multiply(
        self, size: int, start: Any, row_tile: Any, block: Any, index: Any, columns: int
    ) -> None:
        """Leave `size` by 2 tiles of sums up to a chunk in the tile registers."""
        corners = [(r, v) for r in range(size) for v in range(2)]
        with T.If(index > 0):
            with T.Then():
                for r, v in corners:
                    self._sum(amx.LOAD, row_tile, block, r, v)
            with T.Else():
                for r, v in corners:
                    amx.call(amx.ZERO, r * 2 + v)
        first = index * (self.columns // COLUMNS)
        with serial(-(-columns // COLUMNS)) as s:
            for r in range(size):
                amx.move(amx.LOAD, amx.A[r], self.tiles[start + row_tile + r, first + s, 0])
            for v in range(2):
                amx.move(amx.LOAD, amx.B[v], self.weights[v, s, 0])
            for r, v in corners:
                amx.call(amx.PRODUCT, r * 2 + v, amx.A[r], amx.B[v])

    def _sum(self, name: str, row_tile: Any, block: Any, r: int, v: int) -> None:
        amx.move(name, r * 2 + v, self.sums[row_tile + r, block + v, 0])

    def _set(self, out_tile: Any, pair: Any, row_tile: Any, block: Any, corners: list[Any]) -> None:
        """Store tiles of sums where they belong in `out`, as far as there are rows and columns."""
        out_block = T.bind(pair * 2)
        rows, _ = corners[-1]
        fits = tirx.all((out_tile + rows + 1) * ROWS <= self.m, (out_block + 2) * ROWS <= self.n)
        with T.If(fits):
            with T.Then():
                for r, v in corners:
                    where = self.out[(out_tile + r) * ROWS, (out_block + v) * ROWS]
                    amx.move(amx.STORE, r * 2 + v, where, 4 * self.n)
            with T.Else():
                for r, v in corners:
                    self._sum(amx.STORE, row_tile, block, r, v)
                with serial(rows + 1) as r, serial(2) as v, serial(ROWS) as row:
                    target = T.bind((out_tile + r) * ROWS + row)
                    column = T.bind((out_block + v) * ROWS)
                    with T.If(tirx.all(target < self.m, column < self.n)), T.Then():
                        at = lanes_from(row * ROWS, ROWS)
                        value = T.bind(self.sums[row_tile + r, block + v, at])
                        store_lanes(self.isa, self.out, target, column, self.n, value)

    def _expand(self, block: Any, v: Any, index: Any, columns: int) -> None:
        """The weights of a block and chunk as tiles."""
        step = steps_of(self.fmt, self.k).step

        def one_step(s: Any, count: int) -> None:
            values = self._values(block, index * (self.columns // step) + s, count)
            for pair in range(-(-count // 2)):
                word = amx.pair(values(2 * pair), values(2 * pair + 1))
                column = s * step + 2 * pair
                tile = tirx.floordiv(column, COLUMNS)
                at = tirx.floormod(column, COLUMNS) * (ROWS // 2)
                T.buffer_store(self.weights, word, [v, tile, lanes_from(at, ROWS)])

        if columns >= step:
            with serial(columns // step) as s:
                one_step(s, step)
        if columns % step:
            one_step(i64(columns // step), columns % step)
        used = -(-columns // 2) * 2
        for column in range(used, -(-used // COLUMNS) * COLUMNS, 2):
            at = column % COLUMNS * (ROWS // 2)
            none = splat(T.uint32(0), ROWS)
            T.buffer_store(self.weights, none, [v, column // COLUMNS, lanes_from(at, ROWS)])

    def _values(self, block: Any, number: Any, count: int) -> Callable[[int], Any]:
        """Column of a step -> f32 vector of its weights; 0 past its `count` columns."""
        step = Step(self.isa, self.fmt, self.k, self.parts, block, number)
        numbers: dict[int, Any] = {}

        def value(column: int) -> Any:
            if column >= count:
                return zeros(self.isa.lanes)
            if self.fmt.is_float:
                return step.number(column)
            segment = column - column % step.steps.segment
            if segment not in numbers:
                numbers[segment] = step.numbers(segment)
            return step.weight(column, numbers[segment])

        return value


@dataclass
class _GatedPanel(_Panel):
    """Pairs of a block of gates and the block of what they gate; results are tiles."""

    gated: Gated

    def block(self, pair: Any, v: Any) -> Any:
        """See _Panel."""
        return pair + v * (self.gated.k // ROWS)

    def _set(self, out_tile: Any, pair: Any, row_tile: Any, block: Any, corners: list[Any]) -> None:
        """Gate two tiles of sums; the result is half a tile. Rows past the last one do no harm."""
        for r, v in corners:
            self._sum(amx.STORE, row_tile, block, r, v)
        rows, _ = corners[-1]
        half = ROWS // 2
        with serial(rows + 1) as r, serial(ROWS) as row:
            at = lanes_from(row * ROWS, ROWS)
            gate, up = (self.sums[row_tile + r, block + v, at] for v in range(2))
            value = self.gated.apply(gate, up, ROWS)
            name = "llvm.x86.avx512bf16.cvtneps2bf16.512"
            words = T.reinterpret("uint32x8", T.call_llvm_pure_intrin("bfloat16x16", name, value))
            column = T.bind(row * ROWS + tirx.floormod(pair, 2) * half)
            where = [out_tile + r, tirx.floordiv(pair, 2), lanes_from(column, half)]
            T.buffer_store(self.out, words, where)
