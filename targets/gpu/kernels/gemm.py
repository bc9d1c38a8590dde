"""Y = X @ W.T for many rows: tiles of X and W in shared memory, W dequantized on its way there.

A workgroup makes TILE rows by TILE columns of Y, going through k DEPTH columns at a time; each
thread holds a square of sums in registers. Sums are f32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qcc.quant_schemes.attributes import LINEAR, ROLE
from qcc.quant_schemes.format import WeightFormat
from qcc.targets.gpu.kernels.epilogue import Epilogue
from qcc.targets.gpu.kernels.tir import block, ceil_div, registers, shared, threads, when
from qcc.targets.gpu.kernels.weights import Weights, unit_columns
from qcc.targets.gpu.limits import Limits
from qcc.targets.kernel import Arg, kernel

SIDE = 16  # threads along each side of a tile
EACH = 4  # rows and columns of a thread
TILE = SIDE * EACH
UNITS = 4  # of a weight's row at a time


@cache
def gemm(
    fmt: WeightFormat, n: int, k: int, dtype: str, epilogue: Epilogue, limits: Limits
) -> tirx.PrimFunc:
    """PrimFunc (x dtype[m, k], parts, [summands]) -> y [m, epilogue.rows(n)], for any m."""
    assert limits.max_threads >= SIDE * SIDE, limits
    rows = tirx.Var("m", "int64")
    work = _Gemm(fmt, n, k, dtype, epilogue, rows)
    args: list[Arg] = [("x", (rows, k), dtype)]
    args += [(part.suffix, part.shape, part.dtype) for part in fmt.stored(n, k)]
    args += epilogue.args(rows, n)
    return kernel("gemm", args, work.emit, {ROLE: LINEAR})


class _Gemm:
    def __init__(
        self, fmt: WeightFormat, n: int, k: int, dtype: str, epilogue: Epilogue, rows: Any
    ) -> None:
        self.fmt, self.n, self.k, self.dtype, self.epilogue = fmt, n, k, dtype, epilogue
        self.m = tirx.Cast("int32", rows)
        self.depth = unit_columns(fmt) * UNITS
        self.outputs = epilogue.rows(n)
        self.halves = epilogue.halves
        self.columns = TILE // self.halves  # outputs of a workgroup

    def emit(self, x: Any, *rest: Any) -> None:
        """The kernel's statements."""
        count = len(self.fmt.stored(self.n, self.k))
        parts, ends = rest[:count], rest[count:]
        grid = ceil_div(self.outputs, self.columns), ceil_div(self.m, TILE)
        weights = Weights(self.fmt, self.n, self.k, parts)
        with block(grid[0]) as across, block(grid[1], "y") as down, threads(SIDE**2) as thread:
            # one more a row: threads that store a column each find a bank of their own
            tile_x = shared((self.depth, TILE + 1), self.dtype)
            tile_w = shared((self.depth, TILE), self.dtype)
            acc = registers(EACH * EACH, 0.0)
            first_row = T.bind(down * TILE)
            first = T.bind(across * self.columns)
            tx, ty = T.bind(thread % SIDE), T.bind(thread // SIDE)
            with T.serial(0, ceil_div(self.k, self.depth)) as step:
                self._load_x(x, tile_x, first_row, step, thread)
                self._load_w(weights, tile_w, first, step, thread)
                with T.serial(0, self.depth) as column:
                    self._multiply(tile_x, tile_w, column, tx, ty, acc)
            self._write(acc, first_row, first, tx, ty, ends)

    def _load_x(self, x: Any, tile: Any, first_row: Any, step: Any, thread: Any) -> None:
        with T.serial(0, TILE * self.depth // SIDE**2) as i:
            index = T.bind(i * SIDE**2 + thread)
            row, column = T.bind(index // self.depth), T.bind(index % self.depth)
            at = T.bind(step * self.depth + column)
            source = T.min(first_row + row, self.m - 1)
            value = x[source, T.min(at, self.k - 1) if self.k % self.depth else at]
            if self.k % self.depth:
                value = T.Select(at < self.k, value, tirx.const(0, self.dtype))
            T.buffer_store(tile, value, [column, row])

    def _load_w(self, weights: Weights, tile: Any, first: Any, step: Any, thread: Any) -> None:
        """Units of a tile, one a thread; its columns are gates, then what they gate."""
        assert TILE * UNITS == SIDE**2, "a unit a thread"
        slot, number = T.bind(thread % TILE), T.bind(thread // TILE)
        half, column = slot // self.columns, slot % self.columns
        row = first + column
        if self.outputs % self.columns:
            row = T.min(row, self.outputs - 1)
        row = T.bind(row + half * self.outputs)
        unit = step * UNITS + number
        if weights.units % UNITS:
            unit = T.min(unit, weights.units - 1)  # x is 0 there
        values = weights.values(row, T.bind(unit))
        for j, value in enumerate(values):
            T.buffer_store(tile, T.cast(value, self.dtype), [number * weights.columns + j, slot])

    def _multiply(self, tile_x: Any, tile_w: Any, column: Any, tx: Any, ty: Any, acc: Any) -> None:
        def loaded(tile: Any, place: Any) -> list[Any]:
            return [T.bind(T.cast(tile[column, place + i * SIDE], "float32")) for i in range(EACH)]

        of_x, of_w = loaded(tile_x, ty), loaded(tile_w, tx)
        for i, a in enumerate(of_x):
            for j, b in enumerate(of_w):
                at = i * EACH + j
                T.buffer_store(acc, acc[at] + a * b, [at])

    def _write(
        self, acc: Any, first_row: Any, first: Any, tx: Any, ty: Any, ends: Sequence[Any]
    ) -> None:
        each = EACH // self.halves  # outputs of a thread's row
        for i in range(EACH):
            row = T.bind(first_row + ty + i * SIDE)
            for j in range(each):
                column = T.bind(first + tx + j * SIDE)
                sums = [acc[i * EACH + j + half * each] for half in range(self.halves)]

                def write(row: Any = row, column: Any = column, sums: Any = sums) -> None:
                    self.epilogue.write(ends, row, column, sums)

                inside = row < self.m
                if self.outputs % self.columns:
                    inside = tirx.all(inside, column < self.outputs)
                when(inside, write)
