"""y = x @ W.T for one row x, or one at a time: a workgroup holds some rows of W, its threads share
their columns.

Consecutive threads take consecutive units of a row where those lie side by side in memory (NK),
consecutive rows where those do (KN). What comes before, a norm, and after, a gated activation and
sums, is computed on the way: nothing but x, W and y passes through memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qcc.quant_schemes.attributes import EXPERT_LINEAR, LINEAR, ROLE
from qcc.quant_schemes.format import WeightFormat
from qcc.targets.gpu.kernels.epilogue import Epilogue
from qcc.targets.gpu.kernels.tir import (
    VECTOR,
    as_vectors,
    block,
    ceil_div,
    elements,
    registers,
    shared,
    threads,
    tree_reduce,
    when,
)
from qcc.targets.gpu.kernels.weights import Weights, has_wide_units, sum_of, units_of_row
from qcc.targets.gpu.limits import Limits
from qcc.targets.kernel import Arg, kernel

LANES = {"NK": 32, "KN": 8}  # threads that share a row
ROWS = 4  # a thread's, so that it reads x once for all of them


@dataclass(frozen=True)
class Norm:
    """x / sqrt(mean(x^2) + eps) * weight, of a row x, before it is multiplied."""

    eps: float
    dtype: str  # of the weight


@cache
def gemv(
    fmt: WeightFormat,
    n: int,
    k: int,
    dtype: str,
    epilogue: Epilogue,
    norm: Norm | None,
    limits: Limits,
) -> tirx.PrimFunc:
    """PrimFunc (x dtype[1, k], [weight of the norm [k]], parts, [summands]) -> y [1, rows].

    `n` are the rows of W, `epilogue.rows(n)` those of y.
    """
    work = _Gemv(fmt, n, k, epilogue, norm, limits)
    args: list[Arg] = [("x", (1, k), dtype)]
    if norm is not None:
        args.append(("norm", (k,), norm.dtype))
    args += [(part.suffix, part.shape, part.dtype) for part in fmt.stored(n, k)]
    args += epilogue.args(1, n)
    return kernel("gemv", args, work.emit, {ROLE: LINEAR})


@cache
def experts_gemv(
    fmt: WeightFormat, experts: int, n: int, k: int, dtype: str, each: int, limits: Limits
) -> tirx.PrimFunc:
    """PrimFunc (x dtype[r, k], parts [experts * n, k], ids int32[p]) -> y dtype[p, n].

    Row p of y is row p // `each` of x times the n rows of expert ids[p]; r = ceil(p / each).
    """
    work = _Gemv(fmt, n, k, Epilogue(dtype), None, limits, experts)
    pairs, rows = tirx.Var("p", "int64"), tirx.Var("r", "int64")

    def body(x: Any, *rest: Any) -> None:
        *parts, ids, y = rest
        source = work.source(x, rows, None, parts)
        with block(tirx.Cast("int32", pairs), "y") as pair:
            work.emit_row(Row(pair // each, ids[pair] * n, pair), source, [y])

    args: list[Arg] = [("x", (rows, k), dtype)]
    args += [(part.suffix, part.shape, part.dtype) for part in fmt.stored(experts * n, k)]
    args += [("ids", (pairs,), "int32"), ("y", (pairs, n), dtype)]
    return kernel("experts_gemv", args, body, {ROLE: EXPERT_LINEAR})


@dataclass(frozen=True)
class Row:
    """A row of x, the first row of W that multiplies it, and the row of y that it gives."""

    x: Any
    first: Any
    y: Any


@dataclass(frozen=True)
class Source:
    """x, the weight of its norm or None, and W; x and the norm as vectors, or by number."""

    x: Any
    norm: Any
    weights: Weights
    by_vectors: bool


class _Gemv:
    def __init__(
        self,
        fmt: WeightFormat,
        n: int,
        k: int,
        epilogue: Epilogue,
        norm: Norm | None,
        limits: Limits,
        experts: int = 1,
    ) -> None:
        self.stored_rows = experts * n
        self.fmt, self.n, self.k, self.epilogue, self.norm = fmt, n, k, epilogue, norm
        layout = "NK" if fmt.is_float else fmt.layout
        self.lanes = LANES[layout]
        while self.lanes // 2 >= units_of_row(fmt, k):
            self.lanes //= 2  # a lane without a unit would only wait for the sums
        self.rows = limits.max_threads // self.lanes  # of W side by side
        self.threads = self.rows * self.lanes
        self.lanes_inside = layout == "NK"
        # A thread's rows: gate and up of one output, or some that are `rows` apart.
        self.outputs = epilogue.rows(n)
        self.each = ROWS // epilogue.halves
        self.sources = epilogue.halves * self.each

    def emit(self, x: Any, *rest: Any) -> None:
        """The kernel's statements."""
        given = list(rest)
        weight = given.pop(0) if self.norm else None
        count = len(self.fmt.stored(self.n, self.k))
        source = self.source(x, 1, weight, given[:count])
        self.emit_row(Row(0, 0, 0), source, given[count:])

    def source(self, x: Any, rows: Any, weight: Any, parts: list[Any]) -> Source:
        """Emit, outside of every grid, how x [rows, k], a norm's weight and W are read."""
        weights = Weights(
            self.fmt, self.stored_rows, self.k, parts, has_wide_units(self.fmt, self.k)
        )
        by_vectors = self.k % VECTOR == 0 and weights.columns % VECTOR == 0
        if by_vectors:
            x = as_vectors(x, rows * self.k)
            weight = as_vectors(weight, self.k) if self.norm else None
        return Source(x, weight, weights, by_vectors)

    def emit_row(self, of: Row, source: Source, ends: list[Any]) -> None:
        """What a row of workgroups does."""
        span = self.rows * self.each
        with block(ceil_div(self.outputs, span)) as group, threads(self.threads) as thread:
            lane, row = thread % self.lanes, thread // self.lanes
            if not self.lanes_inside:
                lane, row = thread // self.rows, thread % self.rows
            squares = self._squares(of, source, thread) if self.norm else None
            sums = [shared((self.rows, self.lanes), "float32") for _ in range(self.sources)]
            first = T.bind(group * span + row)
            acc = registers(self.sources, 0.0)
            self._accumulate(of, source, first, lane, acc)
            for number, memory in enumerate(sums):
                T.buffer_store(memory, acc[number], [row, lane])
            tree_reduce(sums, lambda i: [row, i], lane, self.lanes)
            self._write(of, sums, squares, first, row, lane, ends)

    def _accumulate(self, of: Row, source: Source, first: Any, lane: Any, acc: Any) -> None:
        weights = source.weights
        steps, rest = divmod(weights.units, self.lanes)
        with T.serial(0, steps + (rest > 0)) as step:
            unit = T.bind(step * self.lanes + lane)

            def one() -> None:
                values = self._columns(of, source, unit)
                for i in range(self.sources):
                    product = weights.dot(of.first + self._row(first, i), unit, values)
                    T.buffer_store(acc, acc[i] + product, [i])

            when(True if not rest else unit < weights.units, one)

    def _squares(self, of: Row, source: Source, thread: Any) -> Any:
        """Memory that begins with the sum of the squares of x, which all threads add up."""
        width = VECTOR if source.by_vectors else 1
        own = registers(1, 0.0)
        with T.serial(0, ceil_div(self.k // width, self.threads)) as step:
            at = T.bind(step * self.threads + thread)

            def one() -> None:
                values = self._read(source, source.x, of.x * self.k, at * width, width)
                total = sum_of([value * value for value in map(T.bind, values)])
                T.buffer_store(own, own[0] + total, [0])

            when(True if self.k // width % self.threads == 0 else at < self.k // width, one)
        memory = shared((self.threads,), "float32")
        T.buffer_store(memory, own[0], [thread])
        tree_reduce([memory], lambda i: [i], thread, self.threads)
        return memory

    def _columns(self, of: Row, source: Source, unit: Any) -> list[Any]:
        """A unit of x as f32, times the weight of the norm."""
        count = source.weights.columns
        first = unit * count
        found = self._read(source, source.x, of.x * self.k, first, count)
        if self.k % count:
            found = [
                T.Select(first + j < self.k, value, T.float32(0)) for j, value in enumerate(found)
            ]
        found = [T.bind(value) for value in found]
        if source.norm is None:
            return found
        weight = self._read(source, source.norm, 0, first, count)
        return [T.bind(a * b) for a, b in zip(found, weight, strict=True)]

    def _read(self, source: Source, data: Any, row: Any, first: Any, count: int) -> list[Any]:
        """`count` columns from `first` on as f32; past the last column any numbers.

        `row` is where the row starts; a norm's weight has but one.
        """
        if not source.by_vectors:
            columns = [first + j for j in range(count)]
            if self.k % count:
                columns = [T.min(column, self.k - 1) for column in columns]
            of_row = [row // self.k] if len(data.shape) > 1 else []
            return [T.cast(data[(*of_row, column)], "float32") for column in columns]
        starts = [first + j for j in range(0, count, VECTOR)]
        if self.k % count:
            starts = [T.min(start, self.k - VECTOR) for start in starts]
        vectors = [T.bind(data[(row + start) // VECTOR]) for start in starts]
        return [T.cast(value, "float32") for vector in vectors for value in elements(vector)]

    def _row(self, first: Any, i: int) -> Any:
        """A thread's i-th row of W, one that is."""
        out, half = divmod(i, self.epilogue.halves)
        row = first + out * self.rows
        if self.outputs % (self.rows * self.each):
            row = T.min(row, self.outputs - 1)
        return T.bind(row + half * self.outputs)

    def _write(
        self,
        of: Row,
        sums: list[Any],
        squares: Any,
        first: Any,
        row: Any,
        lane: Any,
        ends: list[Any],
    ) -> None:
        """One thread writes an output; `squares` begins with the sum of a norm's."""
        with T.If(lane == 0), T.Then():
            factor = None
            if self.norm is not None:
                mean = squares[0] / T.float32(self.k) + T.float32(self.norm.eps)
                factor = T.bind(T.rsqrt(mean))
            for out in range(self.each):
                at = T.bind(first + out * self.rows)

                def write(out: int = out, at: Any = at) -> None:
                    values = []
                    for half in range(self.epilogue.halves):
                        value = sums[out * self.epilogue.halves + half][row, 0]
                        values.append(T.bind(value if factor is None else value * factor))
                    self.epilogue.write(ends, of.y, at, values)

                exact = self.outputs % (self.rows * self.each) == 0
                when(True if exact else at < self.outputs, write)
