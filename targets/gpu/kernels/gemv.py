"""y = x @ W.T for one row x: a workgroup holds some rows of W, its threads share their columns.

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

from qcc.quant_schemes.attributes import LINEAR, ROLE
from qcc.quant_schemes.format import WeightFormat
from qcc.targets.gpu.kernels.epilogue import Epilogue
from qcc.targets.gpu.kernels.tir import (
    block,
    ceil_div,
    registers,
    shared,
    threads,
    tree_reduce,
    when,
)
from qcc.targets.gpu.kernels.weights import Weights
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


class _Gemv:
    def __init__(
        self,
        fmt: WeightFormat,
        n: int,
        k: int,
        epilogue: Epilogue,
        norm: Norm | None,
        limits: Limits,
    ) -> None:
        self.fmt, self.n, self.k, self.epilogue, self.norm = fmt, n, k, epilogue, norm
        layout = "NK" if fmt.is_float else fmt.layout
        self.lanes = LANES[layout]
        self.rows = limits.max_threads // self.lanes  # of W side by side
        self.threads = self.rows * self.lanes
        self.lanes_inside = layout == "NK"
        # A thread's rows: gate and up of one output, or some that are `rows` apart.
        self.outputs = epilogue.rows(n)
        self.each = 1 if epilogue.gate else ROWS
        self.sources = epilogue.halves * self.each
        self.slots = self.sources + (norm is not None)

    def emit(self, x: Any, *rest: Any) -> None:
        """The kernel's statements."""
        given = list(rest)
        weight = given.pop(0) if self.norm else None
        count = len(self.fmt.stored(self.n, self.k))
        parts, ends = given[:count], given[count:]
        span = self.rows * self.each
        with block(ceil_div(self.outputs, span)) as group, threads(self.threads) as thread:
            lane, row = thread % self.lanes, thread // self.lanes
            if not self.lanes_inside:
                lane, row = thread // self.rows, thread % self.rows
            sums = [shared((self.rows, self.lanes), "float32") for _ in range(self.slots)]
            first = T.bind(group * span + row)
            acc = registers(self.slots, 0.0)
            self._accumulate(x, weight, parts, first, lane, acc)
            for slot, memory in enumerate(sums):
                T.buffer_store(memory, acc[slot], [row, lane])
            tree_reduce(sums, lambda i: [row, i], lane, self.lanes)
            self._write(sums, first, row, lane, ends)

    def _accumulate(
        self, x: Any, weight: Any, parts: list[Any], first: Any, lane: Any, acc: Any
    ) -> None:
        weights = Weights(self.fmt, self.n, self.k, parts)
        steps, rest = divmod(weights.units, self.lanes)
        with T.serial(0, steps + (rest > 0)) as step:
            unit = T.bind(step * self.lanes + lane)

            def one() -> None:
                values = self._columns(x, weight, unit, weights.columns, acc)
                for i in range(self.sources):
                    product = weights.dot(self._row(first, i), unit, values)
                    T.buffer_store(acc, acc[i] + product, [i])

            when(True if not rest else unit < weights.units, one)

    def _columns(self, x: Any, weight: Any, unit: Any, count: int, acc: Any) -> list[Any]:
        """A unit of x as f32; where there is a norm its squares are added up."""
        found = []
        for j in range(count):
            column = unit * count + j
            inside = T.min(column, self.k - 1) if self.k % count else column
            value = T.cast(x[0, inside], "float32")
            if self.k % count:
                value = T.Select(column < self.k, value, T.float32(0))
            value = T.bind(value)
            if weight is not None:
                T.buffer_store(acc, acc[self.sources] + value * value, [self.sources])
                value = T.bind(value * T.cast(weight[inside], "float32"))
            found.append(value)
        return found

    def _row(self, first: Any, i: int) -> Any:
        """A thread's i-th row of W, one that is."""
        out, half = divmod(i, self.epilogue.halves)
        row = first + out * self.rows
        if self.outputs % (self.rows * self.each):
            row = T.min(row, self.outputs - 1)
        return T.bind(row + half * self.outputs)

    def _write(self, sums: list[Any], first: Any, row: Any, lane: Any, ends: list[Any]) -> None:
        """One thread writes an output."""
        with T.If(lane == 0), T.Then():
            factor = None
            if self.norm is not None:
                mean = sums[self.sources][row, 0] / T.float32(self.k) + T.float32(self.norm.eps)
                factor = T.bind(T.rsqrt(mean))
            for out in range(self.each):
                at = T.bind(first + out * self.rows)

                def write(out: int = out, at: Any = at) -> None:
                    values = []
                    for half in range(self.epilogue.halves):
                        value = sums[out * self.epilogue.halves + half][row, 0]
                        values.append(T.bind(value if factor is None else value * factor))
                    self.epilogue.write(ends, 0, at, values)

                exact = self.outputs % (self.rows * self.each) == 0
                when(True if exact else at < self.outputs, write)
