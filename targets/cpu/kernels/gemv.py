"""y = x @ W.T over repacked weights for one row of x.

All arithmetic is f32. A step of columns is unrolled, each of its segments with independent
accumulator chains, and scale and bias are applied once a segment:
    y = sum over segments of s * (sum(x*q) - z * sum(x)) + b * sum(x)
The sums of x, which all rows share, are computed once, where a grid needs them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qcc.quant_schemes.attributes import LINEAR, ROLE
from qcc.quant_schemes.format import WeightFormat
from qcc.targets.cpu.isa import Isa, vector
from qcc.targets.cpu.kernels.layout import packed_parts
from qcc.targets.cpu.kernels.steps import Step, steps_of
from qcc.targets.cpu.kernels.tir import (
    extents,
    fma,
    i64,
    kernel,
    lanes_from,
    parallel,
    registers,
    serial,
    splat,
    tree_sum,
    zeros,
)

CHAINS = 8  # independent accumulators: FMA latency 4 x 2 ports
CHAIN_COLUMNS = 4  # columns of a segment for each of its chains; other segments run beside it


@cache
def gemv(fmt: WeightFormat, n: int, k: int, isa: Isa) -> tirx.PrimFunc:
    """PrimFunc (x f32[1, k], parts) -> y f32[1, n]."""
    vtype, steps = vector(isa, "float32"), steps_of(fmt, k)
    per_step = steps.step // steps.segment

    def body(x: Any, *rest: Any) -> None:
        *parts, out = rest
        sums = None if fmt.is_float or fmt.grid == "symmetric" else _sums(x, k, steps.segment)
        with parallel(-(-n // isa.lanes)) as block:
            (total,) = registers(1, isa.lanes)
            T.buffer_store(total, zeros(isa.lanes), [0])

            def one_step(index: Any, count: int) -> None:
                step = Step(isa, fmt, k, parts, block, index)
                for first, columns in steps.segments(count):
                    chains = [zeros(isa.lanes)] * max(1, min(CHAINS, columns // CHAIN_COLUMNS))
                    for column in range(first, first + columns):
                        xk = splat(x[0, index * steps.step + column], isa.lanes)
                        chain = column % len(chains)
                        chains[chain] = T.bind(fma(step.number(column), xk, chains[chain], vtype))
                    whole = tree_sum(chains)
                    if fmt.is_float:
                        T.buffer_store(total, total[0] + whole, [0])
                        continue
                    numbers = step.numbers(first)
                    if sums is not None:
                        segment = index * per_step + first // steps.segment
                        of_x = T.bind(splat(sums[segment], isa.lanes))
                    if numbers.zero is not None:
                        whole = whole - numbers.zero * of_x
                    T.buffer_store(total, fma(whole, numbers.scale, total[0], vtype), [0])
                    if numbers.bias is not None:
                        T.buffer_store(total, fma(numbers.bias, of_x, total[0], vtype), [0])

            if k >= steps.step:
                with serial(k // steps.step) as index:
                    one_step(index, steps.step)
            if k % steps.step:
                one_step(i64(k // steps.step), k % steps.step)
            store_lanes(isa, out, i64(0), block * isa.lanes, n, total[0])

    args = [("x", (1, k), "float32"), *packed_parts(fmt, n, k, isa), ("y", (1, n), "float32")]
    return kernel("gemv", args, body, {ROLE: LINEAR})


def _sums(x: Any, k: int, segment: int) -> Any:
    """The sum of x over each segment, a buffer f32[ceil(k / segment)]."""
    sums = T.alloc_buffer(extents((-(-k // segment),)), "float32", scope="global", layout=None)
    if k >= segment:
        with serial(k // segment) as i:
            whole = tree_sum([x[0, i * segment + j] for j in range(segment)])
            T.buffer_store(sums, whole, [i])
    if k % segment:
        start = k - k % segment
        T.buffer_store(
            sums, tree_sum([x[0, start + j] for j in range(k % segment)]), [k // segment]
        )
    return sums


def store_lanes(isa: Isa, out: Any, row: Any, column: Any, n: int, value: Any) -> None:
    """Store a vector of L outputs, or its first lanes where it reaches past column n."""
    if n % isa.lanes == 0:
        T.buffer_store(out, value, [row, lanes_from(column, isa.lanes)])
        return
    with T.If(column + isa.lanes <= n):
        with T.Then():
            T.buffer_store(out, value, [row, lanes_from(column, isa.lanes)])
        with T.Else():
            spill = T.alloc_buffer((isa.lanes,), "float32", scope="local", layout=None)
            T.buffer_store(spill, value, [lanes_from(0, isa.lanes)])
            with serial(isa.lanes) as lane:
                with T.If(column + lane < n):
                    with T.Then():
                        T.buffer_store(out, spill[lane], [row, column + lane])
