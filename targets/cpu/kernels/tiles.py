"""Many rows of bf16 activations times weights expanded to bf16, by AMX tiles; sums are f32.

A tile has 16 rows of 64 bytes. Of x: 16 rows, 32 columns. Of the weight: 16 pairs of columns, and
for each of 16 rows the two numbers of the pair, which is one block of the kernels' layout. Weights
are expanded once for a slab of rows of x, two blocks and a chunk of columns at a time, a job. Those
of one job stay in the first cache, past which x and the sums are streamed from the second one.
Tile products, of 16 cycles each, leave the vector units free: between them the next job's weights
are expanded, a piece at a time.
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
from qcc.targets.cpu.kernels.tir import lanes_from, parallel, serial, zeros
from qcc.targets.kernel import extents, i64

CHUNK = 512  # most columns of a chunk: with two blocks 32 KiB, two thirds of the first cache
PANEL = 16  # most blocks of a panel
SLAB = 16  # tiles of rows of x whose sums are held at once: a panel of them is 256 KiB
PIECE = 16  # columns that are expanded at once: more fill the window of instructions in flight
SPARSE = 8  # pairs of row tiles from which every other product leaves time enough


def panel_blocks(blocks: int) -> int:
    """Blocks of a panel, a multiple of 2: as many as may be of an even number of panels.

    So two threads, or any even number, have about the same work.
    """
    pairs = -(-blocks // 2)
    panels = 2 * -(-pairs // PANEL)
    return 2 * -(-pairs // panels)


def tile_gemm(
    isa: Isa,
    fmt: WeightFormat,
    n: int,
    k: int,
    tiles: Any,
    parts: list[Any],
    out: Any,
    m: Any,
    added: Any | None = None,
) -> None:
    """Set out f32[m, n]: rows of x, given as tiles uint32[ceil(m / 16), ceil(k / 32), WORDS].

    What `added`, a buffer like `out`, has is added.
    """
    blocks = row_blocks(n, isa)
    panel = panel_blocks(blocks)
    _for_panels(blocks // 2, _Panel(isa, fmt, n, k, tiles, parts, out, m, panel, added))


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
    _for_panels(pairs, _GatedPanel(isa, fmt, n, k, tiles, parts, out, m, panel, None, gated))


def _for_panels(pairs: int, work: _Panel) -> None:
    """Let each thread multiply a panel of `pairs` pairs of blocks at a time with all rows.

    Slabs side by side would divide by their number, over which TVM's simplifier takes 20 seconds.
    """
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
class _Job:
    """The weights of a pair of blocks and a chunk of columns."""

    chunk: Any
    pair: Any
    half: Any  # of the room for weights

    @classmethod
    def bind(cls, number: Any, first: Any, count: Any) -> _Job:
        """Job `number` of pairs first, ..., first + count - 1: chunk by chunk."""
        chunk, pair = tirx.floordiv(number, count), first + tirx.floormod(number, count)
        return cls(T.bind(chunk), T.bind(pair), T.bind(tirx.floormod(number, 2)))


@dataclass
class _Panel:
    """Pairs of blocks of a task: room for the weights of two jobs and for the sums of a slab."""

    isa: Isa
    fmt: WeightFormat
    n: int
    k: int
    tiles: Any
    parts: list[Any]
    out: Any
    m: Any
    panel: int  # blocks
    added: Any | None

    def enter(self) -> None:
        """At the start of a task."""
        self.step = steps_of(self.fmt, self.k).step  # whole tiles
        self.steps = max(CHUNK // self.step, 1)  # of a chunk
        self.chunks = -(-self.k // (self.steps * self.step))
        shape = extents((2, 2, self.steps * self.step // COLUMNS, WORDS))
        self.weights = T.alloc_buffer(shape, "uint32", scope="global", layout=None)
        shape = extents((SLAB, self.panel, ROWS * ROWS))
        self.sums = T.alloc_buffer(shape, "float32", scope="global", layout=None)
        self.expanded = T.alloc_buffer((1,), "int64", layout=None)  # pieces of the next job
        amx.configure()

    def slab(self, first: Any, count: Any, start: Any, row_tiles: Any) -> None:
        """Multiply pairs first, ... with row tiles start, ...; the last chunk sets `out`."""
        jobs = T.bind(count * self.chunks)
        with serial(jobs + 1) as number:
            job, following = (_Job.bind(number - i, first, count) for i in (1, 0))
            left = -(-self.k // self.step) - following.chunk * self.steps
            pieces = T.min(i64(self.steps), left) * (2 * self.step // PIECE)
            pieces = T.bind(T.if_then_else(number < jobs, pieces, i64(0)))
            T.buffer_store(self.expanded, i64(0), [0])
            with T.If(number > 0), T.Then():
                self._job(job, first, start, row_tiles, following, pieces)
            left = T.bind(pieces - self.expanded[0])  # expanding counts on
            with serial(left):
                self._expand(following)

    def _job(
        self, job: _Job, first: Any, start: Any, row_tiles: Any, following: _Job, pieces: Any
    ) -> None:
        """Multiply, and expand as many of the following job's pieces as there is time for."""
        block = T.bind((job.pair - first) * 2)

        def multiply(size: int, row_tile: Any, meanwhile: Callable[[Any], None]) -> None:
            row_tile = T.bind(row_tile)
            corners = [(r, v) for r in range(size) for v in range(2)]
            self._multiply(job, corners, start, row_tile, block, meanwhile)
            with T.If(job.chunk == self.chunks - 1):
                with T.Then():
                    self._set(start + row_tile, job.pair, row_tile, block, corners)
                with T.Else():
                    for r, v in corners:
                        self._sum(amx.STORE, row_tile, block, r, v)

        row_pairs = T.bind(tirx.floordiv(row_tiles, 2))
        # As far apart as they fit between the products.
        mask = T.bind(T.if_then_else(row_pairs >= SPARSE, i64(1), i64(0)))

        def expand(s: Any) -> None:
            due = tirx.all(self.expanded[0] < pieces, tirx.bitwise_and(s, mask) == 0)
            with T.If(due), T.Then():
                self._expand(following)

        with serial(row_pairs) as rows:
            multiply(2, rows * 2, expand)
        with T.If(tirx.floormod(row_tiles, 2) == 1), T.Then():
            multiply(1, row_tiles - 1, lambda s: None)

    def block(self, pair: Any, v: Any) -> Any:
        """The number of block `v` of a pair in the weight."""
        return pair * 2 + v

    def _multiply(
        self,
        job: _Job,
        corners: list[tuple[int, int]],
        start: Any,
        row_tile: Any,
        block: Any,
        meanwhile: Callable[[Any], None],
    ) -> None:
        """Leave tiles of sums up to a job's chunk in the tile registers."""
        with T.If(job.chunk > 0):
            with T.Then():
                for r, v in corners:
                    self._sum(amx.STREAM, row_tile, block, r, v)
            with T.Else():
                self._begin(start + row_tile, job.pair, corners)
        each = self.steps * self.step // COLUMNS
        first = T.bind(job.chunk * each)
        with serial(T.min(i64(each), -(-self.k // COLUMNS) - first)) as s:
            for r in range(corners[-1][0] + 1):
                amx.move(amx.STREAM, amx.A[r], self.tiles[start + row_tile + r, first + s, 0])
            for v in range(2):
                amx.move(amx.LOAD, amx.B[v], self.weights[job.half, v, s, 0])
            for r, v in corners:
                amx.call(amx.PRODUCT, r * 2 + v, amx.A[r], amx.B[v])
            meanwhile(s)

    def _sum(self, name: str, row_tile: Any, block: Any, r: int, v: int) -> None:
        amx.move(name, r * 2 + v, self.sums[row_tile + r, block + v, 0])

    def _begin(self, out_tile: Any, pair: Any, corners: list[tuple[int, int]]) -> None:
        """Sums of nothing: 0, or what is added where whole tiles of it exist."""

        def zero() -> None:
            for r, v in corners:
                amx.call(amx.ZERO, r * 2 + v)

        if self.added is None:
            zero()
            return
        with T.If(self._fits(out_tile, pair, corners)):
            with T.Then():
                self._move(amx.STREAM, self.added, out_tile, pair, corners)
            with T.Else():
                zero()

    def _fits(self, out_tile: Any, pair: Any, corners: list[tuple[int, int]]) -> Any:
        """Whether all rows and columns of tiles exist in `out`."""
        rows, _ = corners[-1]
        return tirx.all((out_tile + rows + 1) * ROWS <= self.m, (pair + 1) * 2 * ROWS <= self.n)

    def _move(
        self, name: str, matrix: Any, out_tile: Any, pair: Any, corners: list[tuple[int, int]]
    ) -> None:
        """Load or store tiles of `out`, or of a buffer like it."""
        for r, v in corners:
            where = matrix[(out_tile + r) * ROWS, (pair * 2 + v) * ROWS]
            amx.move(name, r * 2 + v, where, 4 * self.n)

    def _set(
        self, out_tile: Any, pair: Any, row_tile: Any, block: Any, corners: list[tuple[int, int]]
    ) -> None:
        """Store tiles of sums where they belong in `out`, as far as there are rows and columns."""
        with T.If(self._fits(out_tile, pair, corners)):
            with T.Then():
                self._move(amx.STORE, self.out, out_tile, pair, corners)
            with T.Else():
                for r, v in corners:
                    self._sum(amx.STORE, row_tile, block, r, v)
                rows, _ = corners[-1]
                with serial(rows + 1) as r, serial(2) as v, serial(ROWS) as row:
                    target = T.bind((out_tile + r) * ROWS + row)
                    column = T.bind((pair * 2 + v) * ROWS)
                    with T.If(tirx.all(target < self.m, column < self.n)), T.Then():
                        at = lanes_from(row * ROWS, ROWS)
                        value = T.bind(self.sums[row_tile + r, block + v, at])
                        store_lanes(self.isa, self.out, target, column, self.n, value, self.added)

    def _expand(self, job: _Job) -> None:
        """The next piece of a job's weights as tiles."""
        pieces = self.step // PIECE
        rest, piece = (T.bind(f(self.expanded[0], pieces)) for f in (tirx.floordiv, tirx.floormod))
        s, v = (T.bind(f(rest, 2)) for f in (tirx.floordiv, tirx.floormod))
        number = T.bind(job.chunk * self.steps + s)

        def emit(first: int, count: int) -> None:
            """Columns first, ... of a step that has `count`."""
            values = self._values(self.block(job.pair, v), number, count)
            for column in range(first, first + PIECE, 2):
                word = amx.pair(values(column), values(column + 1))
                tile = s * (self.step // COLUMNS) + column // COLUMNS
                at = lanes_from(column % COLUMNS * (ROWS // 2), ROWS)
                T.buffer_store(self.weights, word, [job.half, v, tile, at])

        def choose(first: int, count: int) -> None:
            """The piece that begins at column `first`, or a later one."""
            if first + PIECE == self.step:
                emit(first, count)
                return
            with T.If(piece == first // PIECE):
                with T.Then():
                    emit(first, count)
                with T.Else():
                    choose(first + PIECE, count)

        whole, left = divmod(self.k, self.step)
        if left:
            with T.If(number < whole):
                with T.Then():
                    choose(0, self.step)
                with T.Else():
                    choose(0, left)
        else:
            choose(0, self.step)
        T.buffer_store(self.expanded, self.expanded[0] + 1, [0])

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

    def _set(
        self, out_tile: Any, pair: Any, row_tile: Any, block: Any, corners: list[tuple[int, int]]
    ) -> None:
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
