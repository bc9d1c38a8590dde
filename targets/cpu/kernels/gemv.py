"""One row of float activations times repacked weights: the inner loop of high precision.

All arithmetic is f32. A step of columns is unrolled, each of its segments with independent
accumulator chains, and scale and bias are applied once a segment:
    y = sum over segments of s * (sum(x*q) - z * sum(x)) + b * sum(x)
The sums of x, which all rows share, are computed once, where a grid needs them.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from qcc.quant_schemes.format import WeightFormat
from qcc.targets.cpu.isa import Isa, vector
from qcc.targets.cpu.kernels.steps import Step, steps_of
from qcc.targets.cpu.kernels.tir import (
    fma,
    lanes_from,
    lines_ahead,
    prefetch,
    registers,
    serial,
    splat,
    tree_sum,
    zeros,
)
from qcc.targets.kernel import extents, i64

CHAINS = 8  # independent accumulators: FMA latency 4 x 2 ports
CHAIN_COLUMNS = 4  # columns of a segment for each of its chains; other segments run beside it


def products(
    isa: Isa,
    fmt: WeightFormat,
    k: int,
    parts: list[Any],
    block: Any,
    x: Any,
    row: Any,
    sums: Any | None,
    sums_row: Any,
) -> Any:
    """f32 vector: row `row` of x [rows, k], whose `sums` are in a row of `sums_of`, times `block`.

    A block is L rows of the weight.
    """
    vtype, steps = vector(isa, "float32"), steps_of(fmt, k)
    per_step = steps.step // steps.segment
    (total,) = registers(1, isa.lanes)
    T.buffer_store(total, zeros(isa.lanes), [0])

    def one_step(index: Any, count: int) -> None:
        step = Step(isa, fmt, k, parts, block, index)
        for first, columns in steps.segments(count):
            chains = [zeros(isa.lanes)] * max(1, min(CHAINS, columns // CHAIN_COLUMNS))
            for column in range(first, first + columns):
                xk = splat(x[row, index * steps.step + column], isa.lanes)
                chain = column % len(chains)
                chains[chain] = T.bind(fma(step.number(column), xk, chains[chain], vtype))
            whole = tree_sum(chains)
            if fmt.is_float:
                T.buffer_store(total, total[0] + whole, [0])
                continue
            numbers = step.numbers(first)
            if sums is not None:
                segment = index * per_step + first // steps.segment
                of_x = T.bind(splat(sums[sums_row, segment], isa.lanes))
            if numbers.zero is not None:
                whole = whole - numbers.zero * of_x
            T.buffer_store(total, fma(whole, numbers.scale, total[0], vtype), [0])
            if numbers.bias is not None:
                T.buffer_store(total, fma(numbers.bias, of_x, total[0], vtype), [0])

    if k >= steps.step:
        with serial(k // steps.step) as index:
            if fmt.is_float:
                prefetch(lines_ahead(parts[0], block, index * steps.step, steps.step))
            one_step(index, steps.step)
    if k % steps.step:
        one_step(i64(k // steps.step), k % steps.step)
    return total[0]


def sums_of(fmt: WeightFormat, x: Any, first: Any, count: int, k: int) -> Any | None:
    """The sums of rows first, first + 1, ... of x over each segment: f32[count, ceil(k / segment)].

    None: the format's grid needs none.
    """
    if fmt.is_float or fmt.grid in ("symmetric", "mxfp4"):
        return None
    segment = steps_of(fmt, k).segment
    shape = extents((count, -(-k // segment)))
    sums = T.alloc_buffer(shape, "float32", scope="global", layout=None)
    with serial(count) as row:
        if k >= segment:
            with serial(k // segment) as i:
                whole = tree_sum([x[first + row, i * segment + j] for j in range(segment)])
                T.buffer_store(sums, whole, [row, i])
        if k % segment:
            start = k - k % segment
            whole = tree_sum([x[first + row, start + j] for j in range(k % segment)])
            T.buffer_store(sums, whole, [row, k // segment])
    return sums


def store_lanes(
    isa: Isa, out: Any, row: Any, column: Any, n: int, value: Any, added: Any | None = None
) -> None:
    """Store a vector of L outputs, or its first lanes where it reaches past column n.

    What `added`, a buffer like `out`, has there is added.
    """

    def whole() -> None:
        at = row, lanes_from(column, isa.lanes)
        T.buffer_store(out, value if added is None else added[at] + value, list(at))

    if n % isa.lanes == 0:
        whole()
        return
    with T.If(column + isa.lanes <= n):
        with T.Then():
            whole()
        with T.Else():
            spill = T.alloc_buffer((isa.lanes,), "float32", scope="local", layout=None)
            T.buffer_store(spill, value, [lanes_from(0, isa.lanes)])
            with serial(isa.lanes) as lane:
                with T.If(column + lane < n), T.Then():
                    one = spill[lane]
                    one = one if added is None else added[row, column + lane] + one
                    T.buffer_store(out, one, [row, column + lane])
