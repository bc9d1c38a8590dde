"""Many rows of float activations times a panel of repacked weights, in high precision.

A panel of L * tile_n rows and about CHUNK columns is expanded to f32 in cache, then a register tile
runs over all rows of x. All arithmetic is f32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qcc.quant_schemes.format import WeightFormat
from qcc.targets.cpu.isa import Isa, vector
from qcc.targets.cpu.kernels.steps import Step, steps_of
from qcc.targets.cpu.kernels.tir import fma, lanes_from, registers, serial, splat, zeros
from qcc.targets.kernel import extents, i64

CHUNK = 128  # columns of a panel: 128 x 64 f32 is 32 KiB


@dataclass(frozen=True)
class Rows:
    """The rows of x that a panel multiplies: `count` of them, and where they come from and go to.

    Number i is row `source(i)` of x and row `target(i)` of y.
    """

    count: Any
    source: Callable[[Any], Any] = lambda i: i
    target: Callable[[Any], Any] = lambda i: i


def multiply_panel(
    isa: Isa,
    fmt: WeightFormat,
    n: int,
    k: int,
    parts: list[Any],
    x: Any,
    out: Any,
    panel: Any,
    block: Any,
    rows: Rows,
    added: Any | None = None,
) -> None:
    """Set columns of panel number `panel` of `out`: rows of x times blocks `block`...

    What `added`, a buffer like `out`, has there is added.
    """
    step = steps_of(fmt, k).step
    chunk = min(max(CHUNK // step, 1), -(-k // step)) * step
    expanded = T.alloc_buffer(
        extents((chunk, isa.lanes * isa.tile_n)), "float32", scope="global", layout=None
    )  # [column of the chunk, row of the panel]

    def one_chunk(index: Any, columns: int) -> None:
        with serial(isa.tile_n) as v:

            def expand(s: Any, count: int) -> None:
                number = index * (chunk // step) + s
                _expand(isa, fmt, k, parts, expanded, block + v, v, number, s * step, count)

            if columns >= step:
                with serial(columns // step) as s:
                    expand(s, step)
            if columns % step:
                expand(i64(columns // step), columns % step)
        with serial(tirx.floordiv(rows.count + isa.tile_m - 1, isa.tile_m)) as tile:
            first = tile * isa.tile_m
            micro = isa, x, expanded, out, first, rows, panel, index, chunk, columns, n, added
            _micro_tile(*micro)

    if k >= chunk:
        with serial(k // chunk) as index:
            one_chunk(index, chunk)
    if k % chunk:
        one_chunk(i64(k // chunk), k % chunk)


def _expand(
    isa: Isa,
    fmt: WeightFormat,
    k: int,
    parts: list[Any],
    expanded: Any,
    block: Any,
    v: Any,
    index: Any,
    row: Any,
    count: int,
) -> None:
    """Expand `count` columns of step `index`, rows of `block`, to rows `row`... of the panel."""
    step = Step(isa, fmt, k, parts, block, index)
    for first, columns in step.steps.segments(count):
        numbers = None if fmt.is_float else step.numbers(first)
        for column in range(first, first + columns):
            value = step.number(column) if numbers is None else step.weight(column, numbers)
            T.buffer_store(expanded, value, [row + column, lanes_from(v * isa.lanes, isa.lanes)])


def _micro_tile(
    isa: Isa,
    x: Any,
    expanded: Any,
    out: Any,
    first: Any,
    rows: Rows,
    panel: Any,
    chunk_index: Any,
    chunk: int,
    columns: int,
    n: int,
    added: Any | None,
) -> None:
    """tile_m rows of x times one chunk of a panel, added to out (set in the first chunk)."""
    vtype = vector(isa, "float32")
    last = rows.count - 1
    sources = [T.bind(rows.source(T.min(first + i, last))) for i in range(isa.tile_m)]
    sums = registers(isa.tile_m * isa.tile_n, isa.lanes)
    for acc in sums:
        T.buffer_store(acc, zeros(isa.lanes), [0])
    with serial(columns) as column:
        weights = [
            T.bind(expanded[column, lanes_from(v * isa.lanes, isa.lanes)])
            for v in range(isa.tile_n)
        ]
        for i in range(isa.tile_m):
            xk = T.bind(splat(x[sources[i], chunk_index * chunk + column], isa.lanes))
            for v in range(isa.tile_n):
                acc = sums[i * isa.tile_n + v]
                T.buffer_store(acc, fma(xk, weights[v], acc[0], vtype), [0])
    for i in range(isa.tile_m):
        with T.If(first + i < rows.count), T.Then():
            of_row = [acc[0] for acc in sums[i * isa.tile_n : (i + 1) * isa.tile_n]]
            target = rows.target(first + i)
            before = _Before(out, added, chunk_index == 0)
            _accumulate(isa, before, target, panel, n, of_row)


@dataclass(frozen=True)
class _Before:
    """What a chunk's products are added to: those before, or what the first one begins with."""

    out: Any
    added: Any | None
    is_first: Any

    def add(self, at: list[Any], value: Any) -> None:
        """out[at] = before + value."""
        first = value if self.added is None else self.added[tuple(at)] + value
        with T.If(self.is_first):
            with T.Then():
                T.buffer_store(self.out, first, at)
            with T.Else():
                T.buffer_store(self.out, self.out[tuple(at)] + value, at)


def _accumulate(isa: Isa, before: _Before, row: Any, panel: Any, n: int, values: list[Any]) -> None:
    """Add values to a row's columns of the panel, where they exist."""
    width = isa.lanes * isa.tile_n
    start = panel * width

    def vectors() -> None:
        for v, value in enumerate(values):
            before.add([row, lanes_from(start + v * isa.lanes, isa.lanes)], value)

    if n % width == 0:
        vectors()
        return
    with T.If(start + width <= n):
        with T.Then():
            vectors()
        with T.Else():
            spill = T.alloc_buffer((width,), "float32", scope="local", layout=None)
            for v, value in enumerate(values):
                T.buffer_store(spill, value, [lanes_from(v * isa.lanes, isa.lanes)])
            with serial(tirx.min(i64(n) - start, i64(width))) as column:
                before.add([row, start + column], spill[column])
