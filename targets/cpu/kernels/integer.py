"""Rows of int8 activations times repacked codes: the inner loop of every low-precision kernel.

Of a piece of columns (activations.py) the products of codes are summed as int32:
    y = sum over pieces of
        scale_w * scale_x * (sum(q * a) - zero * sum(a)) + bias * scale_x * sum(a)
Codes are unpacked once for all rows; rows of weights are lanes.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from qcc.quant_schemes.format import BLOCK, UNIT, WeightFormat
from qcc.targets.cpu.isa import Isa, vector
from qcc.targets.cpu.kernels.activations import GROUP, Activations
from qcc.targets.cpu.kernels.dot import dot, quad_of, zero_of_quads
from qcc.targets.cpu.kernels.quads import QUAD
from qcc.targets.cpu.kernels.steps import Numbers, Step, steps_of
from qcc.targets.cpu.kernels.tir import (
    fma,
    lanes_from,
    lines_ahead,
    prefetch,
    registers,
    serial,
    splat,
    zeros,
)
from qcc.targets.kernel import i64

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
    totals = [_zero(isa) for _ in rows]
    # The scales of a block wait for its end, but where several rows share a group's, or where
    # scales and biases, whose blocks have numbers of their own, are added up.
    apart = kind.sums == "int32" or not zero_of_quads(isa, fmt)
    by_blocks = fmt.two_level and len(rows) == 1 and apart
    work = _Work(isa, fmt, kind, activations, by_blocks)
    words = steps.step // UNIT * fmt.bits
    others = _every_step(parts[1:], k, steps.step)
    many = max(1, UNROLLED // steps.step // len(rows))

    def run(first: Any, count: int, sums: list[_Sums]) -> None:
        """Steps first, ..., first + count - 1, each with all of its columns."""
        if count >= many:
            with serial(count // many) as i:
                start = first + i * many
                lines = lines_ahead(parts[0], block, start * words, many * words)
                for part, columns in others:
                    of_part = start * columns, many * columns, SCALES_AHEAD
                    lines += lines_ahead(part, block, *of_part)
                work.ask_for(lines, many * steps.step // kind.piece)
                for number in range(many):
                    work.step(Step(isa, fmt, k, parts, block, start + number), steps.step, sums)
        for number in range(count - count % many, count):
            work.step(Step(isa, fmt, k, parts, block, first + number), steps.step, sums)

    whole, rest = divmod(k, steps.step)
    if not by_blocks:
        sums = [_Sums(isa, row, total, total) for row, total in zip(rows, totals, strict=True)]
        run(i64(0), whole, sums)
        if rest:
            work.step(Step(isa, fmt, k, parts, block, i64(whole)), rest, sums)
        return [total[0] for total in totals]

    each = BLOCK // steps.step

    def one_block(first: Any, count: int, rest: int = 0) -> None:
        numbers = Step(isa, fmt, k, parts, block, first).block_numbers()
        sums = [_Sums(isa, rows[0], _zero(isa), _zero(isa))]
        run(first, count, sums)
        if rest:
            work.step(Step(isa, fmt, k, parts, block, first + count), rest, sums)
        sums[0].end_block(numbers, totals[0])

    if whole >= each:
        with serial(whole // each) as number:
            one_block(T.bind(number * each), each)
    if whole % each or rest:
        one_block(i64(whole - whole % each), whole % each, rest)
    return [totals[0][0]]


def _zero(isa: Isa) -> Any:
    """A register of f32, all 0."""
    (register,) = registers(1, isa.lanes)
    T.buffer_store(register, zeros(isa.lanes), [0])
    return register


def _every_step(parts: list[Any], k: int, step: int) -> list[tuple[Any, int]]:
    """Parts with whole columns for every step of a row, and how many."""
    found = [(part, int(part.shape[1]) * step) for part in parts]
    return [(part, columns // k) for part, columns in found if columns >= k and columns % k == 0]


class _Sums:
    """Sums of products for one row of x, in registers: what scales multiply, and what biases do."""

    def __init__(self, isa: Isa, row: Any, scaled: Any, biased: Any) -> None:
        """Of one level of scales both are the same register."""
        self.isa, self.row, self.scaled, self.biased = isa, row, scaled, biased

    def add(self, whole: Any, scale: Any) -> None:
        """Add sums of products of codes, times `scale`."""
        self._add(self.scaled, T.cast(whole, vector(self.isa, "float32")), scale)

    def add_bias(self, bias: Any, of_x: Any) -> None:
        """Add the sum of codes of x, times `bias`."""
        self._add(self.biased, bias, of_x)

    def end_block(self, numbers: Numbers, total: Any) -> None:
        """Add all to the total, times the numbers of the block."""
        self._add(total, numbers.scale, self.scaled[0])
        if numbers.bias is not None:
            self._add(total, numbers.bias, self.biased[0])

    def _add(self, register: Any, a: Any, b: Any) -> None:
        value = fma(a, b, register[0], vector(self.isa, "float32"))
        T.buffer_store(register, value, [0])


class _Work:
    """What stays the same over the segments of a block."""

    def __init__(
        self,
        isa: Isa,
        fmt: WeightFormat,
        kind: Activations,
        activations: list[Any],
        by_blocks: bool,
    ) -> None:
        self.isa, self.fmt, self.kind, self.by_blocks = isa, fmt, kind, by_blocks
        self.codes, self.scales, self.sums = activations
        self.lines: list[Any] = []
        self.lines_each = 0

    def ask_for(self, lines: list[Any], pieces: int) -> None:
        """Prefetch lines, a few with each of the next pieces: all at once would hold up loads."""
        self.lines, self.lines_each = lines, -(-len(lines) // pieces)

    def step(self, step: Step, count: int, sums: list[_Sums]) -> None:
        """Add the products of the first `count` columns of a step."""
        for first, columns in step.steps.segments(count):
            self._segment(step, first, columns, sums)

    def _segment(self, step: Step, first: int, columns: int, sums: list[_Sums]) -> None:
        """Add the products of the columns first, first + 1, ... of a step."""
        numbers = step.numbers(first, self.by_blocks)
        scale = numbers.scale
        if self.fmt.grid == "mxfp4":
            scale = T.bind(scale * splat(T.float32(0.5), self.isa.lanes))  # bytes are 2 * fp4
        bias = self._bias(numbers)
        for at in range(first, first + columns, self.kind.piece):
            quads = range(at // QUAD, -(-min(at + self.kind.piece, first + columns) // QUAD))
            found = [T.bind(quad_of(self.isa, step, number)) for number in quads]
            prefetch(self.lines[: self.lines_each])
            del self.lines[: self.lines_each]
            for of_row in sums:
                self._piece(step, at, found, of_row, scale, bias)

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
        self, step: Step, at: int, found: list[Any], sums: _Sums, scale: Any, bias: Any | None
    ) -> None:
        """Add one row's products with the quads `found`, which begin at column `at`."""
        isa, lanes, row = self.isa, self.isa.lanes, sums.row
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
        sums.add(whole, scale * of_x)
        if bias is not None:
            sums.add_bias(bias, splat(self.sums[row, piece], lanes))
