"""Blocks of attention by AMX tiles of bf16, for caches that keep less than f32.

Q K and P V go through tiles of 16 rows by 32 numbers times 32 by 16, their sums being f32; scores,
maxima and masses stay f32. Of the second factor a tile holds 16 pairs of rows, interleaved.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from qcc.targets.cpu.kernels import amx
from qcc.targets.cpu.kernels import vectors as vx
from qcc.targets.cpu.kernels.amx import COLUMNS as DEPTH
from qcc.targets.cpu.kernels.amx import ROWS
from qcc.targets.cpu.kernels.attention import MASKED, ScoreRule, Tile, when
from qcc.targets.cpu.kernels.attention_mask import RowMask

ON = 2.0  # the cache's rope_scale where tiles may be used, which the kernels have no use for else
BLOCK = 2 * ROWS  # rows of a block
KEYS = 256  # staged at once: the work on a row beside its products is for so many keys
_CURRENT = 4  # rounding as the processor is set


def fits(dim: int) -> bool:
    """Whether heads of `dim` numbers can be cut into tiles."""
    return dim % ROWS == 0


class TileBlocks:
    """What a task needs besides: queries and staged keys as bf16, weights of a block."""

    def __init__(self, tile: Tile, rule: ScoreRule, mask: RowMask) -> None:
        self.tile, self.rule, self.mask, self.dim = tile, rule, mask, tile.dim
        self.depth = -(-tile.dim // DEPTH) * DEPTH
        keys = tile.keys
        self.queries = T.alloc_buffer((tile.rows * self.depth,), "uint16")
        self.k = T.alloc_buffer((keys * self.depth // 2,), "uint32")
        self.v = T.alloc_buffer((keys * tile.dim // 2,), "uint32")
        self.scores = T.alloc_buffer((BLOCK * keys,), "float32")
        self.weights = T.alloc_buffer((BLOCK * keys,), "uint16")

    def load_queries(self, rows: Any, source: Any) -> None:
        """The task's queries, f32 [rows, d], as bf16 [rows, depth]."""
        with T.serial(0, rows) as r:
            with T.serial(0, self.dim // ROWS) as i:
                value = vx.load(source, r * self.dim + i * ROWS, ROWS)
                at = vx.index(r * self.depth + i * ROWS, ROWS)
                T.buffer_store(self.queries, _halves(value), [at])
            if self.depth > self.dim:
                at = vx.index(r * self.depth + self.dim, ROWS)
                T.buffer_store(self.queries, T.broadcast(T.uint16(0), ROWS), [at])

    def stage(self, panels: Any, k: Any, v: Any, low: Any, high: Any) -> None:
        """Staged panels as bf16; values of places outside of low .. high - 1 become 0.

        k [panels, depth / 2, 16, 2] from [panels, d, 16]; v [d / 16, keys / 2, 16, 2].
        """
        dim, pairs = self.dim, self.tile.keys // 2
        with T.serial(0, panels) as p:
            with T.serial(0, dim // 2) as i:
                a = vx.load(k, (p * dim + 2 * i) * ROWS, ROWS)
                b = vx.load(k, (p * dim + 2 * i + 1) * ROWS, ROWS)
                at = (p * (self.depth // 2) + i) * ROWS
                T.buffer_store(self.k, amx.pair(a, b), [vx.index(at, ROWS)])
            with T.serial(dim // 2, self.depth // 2) as i:
                at = vx.index((p * (self.depth // 2) + i) * ROWS, ROWS)
                T.buffer_store(self.k, T.broadcast(T.uint32(0), ROWS), [at])
        zero = vx.splat(0.0, ROWS)

        def row(key: Any, i: Any) -> Any:
            place = vx.splat(key, ROWS)
            there = T.bitwise_and(place >= vx.splat(low, ROWS), place < vx.splat(high, ROWS))
            return vx.keep(T.Select(there, vx.load(v, key * dim + i * ROWS, ROWS), zero), ROWS)

        with T.serial(0, (panels + 1) // 2 * ROWS) as j:
            with T.serial(0, dim // ROWS) as i:
                word = amx.pair(row(2 * j, i), row(2 * j + 1, i))
                T.buffer_store(self.v, word, [vx.index((i * pairs + j) * ROWS, ROWS)])

    def block(self, state: dict[str, Any], row: Any, first: Any, low: Any, high: Any) -> None:
        """Take the keys low .. high - 1 of the tile into the block of 32 rows from `row` on.

        `state`: sums [rows, d], top [rows], mass [rows, 16].
        """
        begin, end = T.bind(low // DEPTH), T.bind((high + DEPTH - 1) // DEPTH)
        with T.serial(begin, end) as step:
            self._score(row, step)
        with T.serial(0, BLOCK) as r:
            self._softmax(row + r, r, first, begin * 2, end * 2, state)
        blocks = self.dim // ROWS
        with T.serial(0, blocks // 2) as i:
            self._values(row, i * 2, 2, begin, end, state["sums"])
        if blocks % 2:
            self._values(row, blocks - 1, 1, begin, end, state["sums"])

    def _score(self, row: Any, step: Any) -> None:
        """scores[32, 32 keys] = Q K."""
        corners = [(r, v) for r in range(2) for v in range(2)]
        for r, v in corners:
            amx.call(amx.ZERO, r * 2 + v)
        half = self.depth // 2
        with T.serial(0, self.depth // DEPTH) as s:
            for r in range(2):
                where = self.queries[(row + r * ROWS) * self.depth + s * DEPTH]
                amx.move(amx.LOAD, amx.A[r], where, 2 * self.depth)
            for v in range(2):
                where = self.k[((step * 2 + v) * half + s * ROWS) * ROWS]
                amx.move(amx.LOAD, amx.B[v], where, 64)
            for r, v in corners:
                amx.call(amx.PRODUCT, r * 2 + v, amx.A[r], amx.B[v])
        for r, v in corners:
            where = self.scores[r * ROWS * self.tile.keys + step * DEPTH + v * ROWS]
            amx.move(amx.STORE, r * 2 + v, where, 4 * self.tile.keys)

    def _softmax(
        self, row: Any, r: Any, first: Any, begin: Any, end: Any, state: dict[str, Any]
    ) -> None:
        """Weights of a row as bf16, relative to the new maximum; its old sums are scaled to it."""
        tile, top = self.tile, state["top"]
        scores = T.bind(r * tile.keys)
        old = vx.keep(vx.load(top, row, 1), 1)
        highest = vx.Reg(ROWS, vx.splat(old, ROWS))
        with T.serial(begin, end) as v:
            place = T.bind(v * ROWS)
            score = self.rule.capped(vx.load(self.scores, scores + place, ROWS), ROWS)
            seen = self.mask.seen(row, first + place, place)
            score = vx.keep(T.Select(seen, score, vx.splat(MASKED, ROWS)), ROWS)
            vx.store(self.scores, scores + place, score, ROWS)
            highest.set(T.max(highest.get(), score))
        highest.set(vx.across(T.bind(highest.get()), ROWS, T.max))
        new = vx.keep(vx.load(highest.buffer, 0, 1), 1)
        at = T.bind(row * ROWS)
        with when(new > old):
            decay = vx.keep(_exp2(vx.splat(old - new, ROWS)), ROWS)
            vx.store(state["mass"], at, vx.load(state["mass"], at, ROWS) * decay, ROWS)
            with T.serial(0, self.dim // ROWS) as i:
                where = T.bind(row * self.dim + i * ROWS)
                vx.store(state["sums"], where, vx.load(state["sums"], where, ROWS) * decay, ROWS)
            vx.store(top, row, new, 1)
        mass = vx.Reg(ROWS, vx.load(state["mass"], at, ROWS))
        with T.serial(begin, end) as v:
            weight = vx.keep(
                _exp2(vx.load(self.scores, scores + v * ROWS, ROWS) - highest.get()), ROWS
            )
            mass.set(mass.get() + weight)
            T.buffer_store(self.weights, _halves(weight), [vx.index(scores + v * ROWS, ROWS)])
        vx.store(state["mass"], at, mass.get(), ROWS)

    def _values(self, row: Any, block: Any, count: int, begin: Any, end: Any, sums: Any) -> None:
        """sums[32, 16 numbers of each of `count` blocks] += weights V."""
        corners = [(r, v) for r in range(2) for v in range(count)]
        keys = self.tile.keys

        def each(name: str) -> None:
            for r, v in corners:
                where = sums[(row + r * ROWS) * self.dim + (block + v) * ROWS]
                amx.move(name, r * 2 + v, where, 4 * self.dim)

        each(amx.LOAD)
        with T.serial(begin, end) as step:
            for r in range(2):
                where = self.weights[r * ROWS * keys + step * DEPTH]
                amx.move(amx.LOAD, amx.A[r], where, 2 * keys)
            for v in range(count):
                where = self.v[((block + v) * (keys // 2) + step * ROWS) * ROWS]
                amx.move(amx.LOAD, amx.B[v], where, 64)
            for r, v in corners:
                amx.call(amx.PRODUCT, r * 2 + v, amx.A[r], amx.B[v])
        each(amx.STORE)


# 2^f on [-1/2, 1/2], relative error 1e-4: weights are rounded to bf16 next.
_ROUGH = tuple(
    float(c)
    for c in np.polynomial.chebyshev.Chebyshev.interpolate(np.exp2, 3, domain=[-0.5, 0.5])
    .convert(kind=np.polynomial.Polynomial)
    .coef
)


def _exp2(x: Any) -> Any:
    """2^x of 16 numbers for x <= 0, in AVX-512's own instructions."""
    x = vx.keep(x, ROWS)
    near = vx.keep(vx.nearest_even(x, ROWS), ROWS)
    value = vx.horner(vx.keep(x - near, ROWS), _ROUGH, ROWS)
    return T.call_llvm_pure_intrin(
        "float32x16",
        "llvm.x86.avx512.mask.scalef.ps.512",
        value,
        near,
        vx.splat(0.0, ROWS),
        tirx.IntImm("int16", -1),
        tirx.IntImm("int32", _CURRENT),
    )


def _halves(value: Any) -> Any:
    """uint16 bits of 16 bf16."""
    return vx.cast(amx.rounded(value) >> T.broadcast(T.uint32(16), ROWS), "uint16", ROWS)
