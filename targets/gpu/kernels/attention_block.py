"""A tile of rows and keys in a workgroup's memory, and the steps of flash attention over it.

In S a thread has some rows and some keys, in the softmax some keys of one row, in O some rows and
a vector of a head's numbers or several.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tvm.tirx.script import builder as T

from qcc.targets.gpu.kernels.attention_func import Plan, Reg, barrier, f32, keep, shared, when
from qcc.targets.gpu.kernels.attention_mask import RowMask
from qcc.targets.gpu.kernels.attention_score import (
    MASKED,
    NO_KEY,
    ScoreRule,
    log_sum,
    weight,
)

# Rows and keys, best first. Of f16 heads of 64 the first takes 16 KiB, so that two workgroups share
# the memory of a small GPU's core; a thread then has 4 rows of S and 2 keys.
_TILES = ((32, 32), (32, 16), (16, 16), (16, 8), (8, 8), (8, 4))
_ROW_THREADS, _KEY_THREADS = 8, 16  # along S, at most


@dataclass(frozen=True)
class Tile:
    """Sizes of a workgroup's step; `extra` are the bytes of its memory that others take."""

    plan: Plan
    extra: int

    @cached_property
    def sizes(self) -> tuple[int, int]:
        """Rows and keys: the best that fit into the memory of a workgroup."""
        fitting = (
            size for size in _TILES if self._bytes(*size) <= self.plan.limits.workgroup_bytes
        )
        found = next(fitting, None)
        assert found, f"{self.plan}: no tile of keys fits"
        return found

    def _bytes(self, rows: int, keys: int) -> int:
        size = 2 if self.plan.config.dtype == "float16" else 4
        cells = (rows + keys + 1) * self.plan.config.head_dim
        # S, what the softmax reduces, and what decay and masks have of rows and keys.
        numbers = rows * (keys + 1) + _ROW_THREADS * _KEY_THREADS + 5 * rows + 3 * keys
        return cells * size + numbers * 4 + self.extra

    @property
    def rows(self) -> int:
        return self.sizes[0]

    @property
    def keys(self) -> int:
        return self.sizes[1]

    @property
    def key_threads(self) -> int:
        return min(_KEY_THREADS, self.keys)

    @property
    def row_threads(self) -> int:
        return min(_ROW_THREADS, self.plan.limits.max_threads // self.key_threads)

    @property
    def threads(self) -> int:
        return self.key_threads * self.row_threads

    @property
    def ways(self) -> int:
        """Threads of a row in the softmax."""
        return self.threads // self.rows

    @property
    def columns(self) -> int:
        """Threads along a head's numbers in O."""
        return min(self.plan.chunks, self.threads)

    @property
    def bands(self) -> int:
        """Threads along the rows of O; those that are left over wait."""
        return self.threads // self.columns

    @property
    def per_column(self) -> int:
        return -(-self.plan.chunks // self.columns)

    @property
    def per_band(self) -> int:
        return -(-self.rows // self.bands)


class Block:
    """Emits the steps: K is staged, `score`, `maximum`, V is staged, `softmax`, `values`.

    A barrier goes before and after each, but for V, which is staged while the maximum is found.
    """

    def __init__(self, plan: Plan, tile: Tile, thread: Any, paged: bool) -> None:
        self.plan, self.tile, self.thread = plan, tile, thread
        cell, vector = plan.typed(plan.config.dtype), plan.typed("float32")
        # Of keys of the chunk neighbouring threads read neighbouring numbers, and write them far
        # apart: one place more keeps them out of the same bank.
        self.pitch = tile.keys + (not paged)
        self.queries = shared(tile.rows * plan.chunks, cell)
        self.cells = shared(plan.chunks * self.pitch, cell)
        self.scores = shared(tile.rows * (tile.keys + 1))
        self.ways = shared(tile.rows * tile.ways)
        self.decay = shared(tile.rows)
        self.sums = T.alloc_buffer((tile.per_band * tile.per_column,), vector, scope="local")
        for i in range(tile.per_band * tile.per_column):
            T.buffer_store(self.sums, plan.splat(0.0), [i])
        self.top, self.mass = Reg(f32(NO_KEY)), Reg(f32(0.0))  # of the thread's row in the softmax
        self.row, self.way = T.bind(self.thread // tile.ways), T.bind(self.thread % tile.ways)

    def score(self, first: Any, mask: RowMask, rule: ScoreRule, factor: Any) -> None:
        """scores[row, key] = q . k * factor, capped and masked, of the keys from `first` on."""
        plan, tile, thread = self.plan, self.tile, self.thread
        vector = plan.typed("float32")
        rows = [
            T.bind(thread // tile.key_threads + i * tile.row_threads)
            for i in range(tile.rows // tile.row_threads)
        ]
        keys = [
            T.bind(thread % tile.key_threads + j * tile.key_threads)
            for j in range(tile.keys // tile.key_threads)
        ]
        sums = [[Reg(plan.splat(0.0), vector) for _ in keys] for _ in rows]
        with T.serial(0, plan.chunks) as chunk:
            k = [keep(plan.load(self.cells, chunk * self.pitch + key), vector) for key in keys]
            for row, totals in zip(rows, sums, strict=True):
                q = keep(plan.load(self.queries, row * plan.chunks + chunk), vector)
                for total, column in zip(totals, k, strict=True):
                    total.set(total.get() + q * column)
        for row, totals in zip(rows, sums, strict=True):
            for key, total in zip(keys, totals, strict=True):
                score = keep(rule.capped(keep(plan.lane_sum(total.get()) * factor)))
                seen = mask.seen(row, first + key, key)
                T.buffer_store(
                    self.scores,
                    T.Select(seen, score, f32(MASKED)),
                    [row * (tile.keys + 1) + key],
                )

    def maximum(self) -> None:
        """ways[row, way] = the maximum of the thread's scores, which it keeps."""
        tile = self.tile
        base = self.row * (tile.keys + 1) + self.way
        self.places = [T.bind(base + j * tile.ways) for j in range(tile.keys // tile.ways)]
        self.own = [keep(self.scores[place]) for place in self.places]
        top = Reg(self.own[0])
        for score in self.own[1:]:
            top.set(T.max(top.get(), score))
        T.buffer_store(self.ways, top.get(), [self.thread])

    def softmax(self) -> None:
        """Scores become weights relative to the new maximum; decay is what the old sums keep."""
        old = keep(self.top.get())
        with T.serial(0, self.tile.ways) as i:
            self.top.set(T.max(self.top.get(), self.ways[self.row * self.tile.ways + i]))
        decay = keep(T.exp2(old - self.top.get()))
        self.mass.set(self.mass.get() * decay)
        for place, score in zip(self.places, self.own, strict=True):
            one = keep(weight(score, self.top.get()))
            T.buffer_store(self.scores, one, [place])
            self.mass.set(self.mass.get() + one)
        with when(self.way == 0):
            T.buffer_store(self.decay, decay, [self.row])

    def _cells_of_output(self) -> tuple[list[Any], list[Any]]:
        """The thread's rows and vectors of O; there may be fewer."""
        tile = self.tile
        band, column = T.bind(self.thread // tile.columns), T.bind(self.thread % tile.columns)
        rows = [T.bind(band + i * tile.bands) for i in range(tile.per_band)]
        return rows, [T.bind(column + j * tile.columns) for j in range(tile.per_column)]

    def values(self, count: Any) -> None:
        """O = O * decay + P V, of so many keys."""
        plan, tile = self.plan, self.tile
        rows, columns = self._cells_of_output()
        # Rows and vectors beyond the last repeat it: they are not written.
        rows = [T.min(row, tile.rows - 1) for row in rows]
        columns = [T.min(column, plan.chunks - 1) for column in columns]
        for i, row in enumerate(rows):
            decay = T.bind(self.decay[row])
            for j in range(len(columns)):
                at = i * len(columns) + j
                T.buffer_store(self.sums, self.sums[at] * plan.splat(decay), [at])
        with T.serial(0, count) as key:
            values = [
                keep(plan.load(self.cells, key * plan.chunks + column), plan.typed("float32"))
                for column in columns
            ]
            for i, row in enumerate(rows):
                one = T.bind(self.scores[row * (tile.keys + 1) + key])
                for j, value in enumerate(values):
                    at = i * len(columns) + j
                    T.buffer_store(self.sums, self.sums[at] + value * plan.splat(one), [at])

    def finish(
        self, count: Any, state: Callable[[Any, Any], None], output: Callable[[Any, Any, Any], None]
    ) -> None:
        """Divide by the weights' sums.

        Of each of the first `count` rows emit state(row, lse) once, and output(row, chunk, vector)
        for each vector.
        """
        plan, tile = self.plan, self.tile
        T.buffer_store(self.ways, self.mass.get(), [self.thread])
        barrier()
        with when(self.way == 0):
            mass = Reg(f32(0.0))
            with T.serial(0, tile.ways) as i:
                mass.set(mass.get() + self.ways[self.row * tile.ways + i])
            lse, inverse = log_sum(self.top.get(), mass.get())
            T.buffer_store(self.decay, inverse, [self.row])
            with when(self.row < count):
                state(self.row, lse)
        barrier()
        rows, columns = self._cells_of_output()
        used = self.thread < tile.columns * tile.bands
        for i, row in enumerate(rows):
            with when(T.bitwise_and(used, row < count)):
                inverse = plan.splat(T.bind(self.decay[row]))
                for j, column in enumerate(columns):
                    with when(column < plan.chunks):
                        output(row, column, self.sums[i * len(columns) + j] * inverse)
