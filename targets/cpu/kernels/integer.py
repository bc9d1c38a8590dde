"""Rows of int8 activations times repacked codes: the inner loop of every low-precision kernel.

Of a piece of columns (activations.py) the products of codes are summed as int32:
    y = sum over pieces of
        scale_w * scale_x * (sum(q * a) - zero * sum(a)) + bias * scale_x * sum(a)
Codes are unpacked once for all rows; rows of weights are lanes.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from qcc.quant_schemes.format import UNIT, WeightFormat
from qcc.targets.cpu.isa import Isa, vector
from qcc.targets.cpu.kernels.activations import GROUP, Activations
from qcc.targets.cpu.kernels.dot import dot, quad_of, zero_of_quads
from qcc.targets.cpu.kernels.planes import QUAD
from qcc.targets.cpu.kernels.steps import Numbers, Step, steps_of
from qcc.targets.cpu.kernels.tir import (
    fma,
    i64,
    lanes_from,
    prefetch,
    registers,
    serial,
    splat,
    zeros,
)

UNROLLED = 128  # columns of a loop iteration for one row
SCALES_AHEAD = 512  # bytes from the scales in use to those that are prefetched


def integer_products(
    isa: Isa,
    fmt: WeightFormat,
    k: int,
    parts: list[Any],
    block: Any,
    activations: list[Any],
    rows: list[Any],
) -> list[Any]:
    """f32 vectors: rows `rows` of x, whose codes, scales and sums are given, times `block`.

    A block is L rows of the weight; `rows` are int64 expressions.
    """
    steps, kind = steps_of(fmt, k), Activations.of(fmt, k, True, isa)
    assert kind is not None, f"{fmt} takes no codes"
    totals = registers(len(rows), isa.lanes)
    for total in totals:
        T.buffer_store(total, zeros(isa.lanes), [0])
    work = _Work(isa, fmt, kind, activations, rows, totals)

    def one_step(index: Any, count: int) -> None:
        step = Step(isa, fmt, k, parts, block, index)
        for first, columns in step.steps.segments(count):
            work.segment(step, first, columns)

    words = steps.step // UNIT * fmt.bits
    others = _every_step(parts[1:], k, steps.step)
    whole, many = k // steps.step, max(1, UNROLLED // steps.step // len(rows))
    if whole >= many:
        with serial(whole // many) as i:
            prefetch(parts[0], block, i * many * words, many * words)
            for part, columns in others:
                prefetch(part, block, i * many * columns, many * columns, SCALES_AHEAD)
            for number in range(many):
                one_step(i * many + number, steps.step)
    for number in range(whole - whole % many, whole):
        one_step(i64(number), steps.step)
    if k % steps.step:
        one_step(i64(whole), k % steps.step)
    return [total[0] for total in totals]


def _every_step(parts: list[Any], k: int, step: int) -> list[tuple[Any, int]]:
    """Parts with whole columns for every step of a row, and how many."""
    found = [(part, int(part.shape[1]) * step) for part in parts]
    return [(part, columns // k) for part, columns in found if columns >= k and columns % k == 0]


class _Work:
    """What stays the same over the segments of a block."""

    def __init__(
        self,
        isa: Isa,
        fmt: WeightFormat,
        kind: Activations,
        activations: list[Any],
        rows: list[Any],
        totals: list[Any],
    ) -> None:
        self.isa, self.fmt, self.kind, self.rows, self.totals = isa, fmt, kind, rows, totals
        self.codes, self.scales, self.sums = activations

    def segment(self, step: Step, first: int, columns: int) -> None:
        """Add the products of the columns first, first + 1, ... of a step."""
        numbers = step.numbers(first)
        scale = numbers.scale
        if self.fmt.grid == "mxfp4":
            scale = T.bind(scale * splat(T.float32(0.5), self.isa.lanes))  # bytes are 2 * fp4
        bias = self._bias(numbers)
        for at in range(first, first + columns, self.kind.piece):
            quads = range(at // QUAD, -(-min(at + self.kind.piece, first + columns) // QUAD))
            found = [T.bind(quad_of(self.isa, step, number)) for number in quads]
            for row, total in zip(self.rows, self.totals, strict=True):
                self._piece(step, at, quads[0], found, row, total, scale, bias)

    def _bias(self, numbers: Numbers) -> Any | None:
        """What a group adds for each code of x; None: the sum starts with it."""
        if self.kind.sums == "int32":
            return None
        if numbers.bias is not None:
            bias = numbers.bias
        else:
            assert numbers.zero is not None, self.fmt
            bias = zeros(self.isa.lanes) - numbers.zero * numbers.scale
        zero = zero_of_quads(self.isa, self.fmt)
        if zero:
            bias = bias - numbers.scale * splat(T.float32(zero), self.isa.lanes)
        return T.bind(bias)

    def _piece(
        self,
        step: Step,
        at: int,
        quad: int,
        found: list[Any],
        row: Any,
        total: Any,
        scale: Any,
        bias: Any | None,
    ) -> None:
        """Add one row's products with the quads `found`, the first of which is number `quad`."""
        isa, lanes, vtype = self.isa, self.isa.lanes, vector(self.isa, "float32")
        column = step.index * step.steps.step + at
        # The step is a multiple of a group and of a piece: these divisions leave nothing.
        group = step.index * (step.steps.step // GROUP) + at // GROUP
        piece = step.index * (step.steps.step // self.kind.piece) + at // self.kind.piece
        start, zero = T.int32(0), zero_of_quads(isa, self.fmt)
        if bias is None and zero:
            start = self.sums[row, piece] * -zero
        whole = T.bind(splat(start, lanes))
        for i, codes in enumerate(found):
            four = self.codes[row, lanes_from(column + i * QUAD, QUAD)]
            x = splat(T.reinterpret("int32", four), lanes)
            whole = T.bind(dot(isa, self.fmt, whole, codes, x))
        of_x = splat(self.scales[row, group], lanes)
        value = fma(T.cast(whole, vtype), scale * of_x, total[0], vtype)
        if bias is not None:
            value = fma(bias, splat(self.sums[row, piece], lanes), value, vtype)
        T.buffer_store(total, value, [0])
