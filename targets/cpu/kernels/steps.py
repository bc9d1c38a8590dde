"""How a kernel walks a row of repacked weights: steps of columns, segments under one scale.

A step is unrolled: codes begin at fixed bits of its words, so shifts are constants. A segment is
the part of a step that one scale covers. Groups of up to UNROLL columns are segments themselves;
a wider group is cut into segments, each of which finds its group by its first column.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd, lcm
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qcc.quant_schemes import mxfp4
from qcc.quant_schemes.format import BLOCK, UNIT, WeightFormat
from qcc.targets.cpu.isa import Isa, vector
from qcc.targets.cpu.kernels.decode import (
    code_at,
    code_number,
    code_scalar,
    float_vector,
    fp4_vector,
    stream_code,
)
from qcc.targets.cpu.kernels.layout import streamed
from qcc.targets.cpu.kernels.quads import code_of_words
from qcc.targets.cpu.kernels.tir import fma, lanes_from, splat

UNROLL = 128  # columns of the widest segment
MAX_STEP = 160  # columns of the longest step: five groups of 32, four of 40
FLOAT_STEP = 32  # columns of a step of floating numbers


@dataclass(frozen=True)
class Steps:
    """Columns of a step and of each of its segments (the last of a row may be shorter)."""

    step: int
    segment: int

    def segments(self, count: int) -> Iterator[tuple[int, int]]:
        """(first column, columns) of each segment of a step of `count` columns."""
        for first in range(0, count, self.segment):
            yield first, min(self.segment, count - first)


def steps_of(fmt: WeightFormat, k: int) -> Steps:
    """The steps of a row of k columns."""
    if fmt.is_float:
        return Steps(FLOAT_STEP, FLOAT_STEP)
    group = fmt.group_size(k)
    whole = lcm(UNIT, 8 * group) if streamed(fmt) else UNIT
    segment = group if group <= UNROLL else gcd(group, UNROLL)
    step = lcm(segment, whole)
    if step > MAX_STEP:
        segment = gcd(group, UNIT)
        step = lcm(segment, whole)
    return Steps(step, segment)


@dataclass(frozen=True)
class Numbers:
    """What turns the numbers of a segment into weights: (q - zero) * scale + bias; f32 vectors."""

    scale: Any
    bias: Any | None = None
    zero: Any | None = None


class Step:
    """Step `index` of the rows of `block`, read from repacked parts; words are loaded once."""

    def __init__(
        self, isa: Isa, fmt: WeightFormat, k: int, parts: list[Any], block: Any, index: Any
    ) -> None:
        """`parts` are buffers in the order of `fmt.stored`; `index` an int64 expression."""
        self.isa, self.fmt, self.k, self.block, self.index = isa, fmt, k, block, index
        self.steps = steps_of(fmt, k)
        names = [part.suffix for part in fmt.stored(1, k)]
        self.parts = dict(zip(names, parts, strict=True))
        self.loaded: dict[tuple[str, int], Any] = {}

    def number(self, column: int) -> Any:
        """f32 vector of a column before scale and bias.

        Of a symmetric grid q - zero_code, of mxfp4 fp4(q), else q.
        """
        fmt, isa = self.fmt, self.isa
        if fmt.is_float:
            value = self._at("weight", self.index * self.steps.step + column)
            return float_vector(isa, fmt, value)
        code, clean = code_at(isa, self.weight_word, column, fmt.bits)
        if fmt.grid == "mxfp4":
            return fp4_vector(isa, code)
        zero = fmt.zero_code if fmt.grid == "symmetric" else 0
        return code_number(isa, code, clean, fmt.bits, zero)

    def weight_word(self, index: int) -> Any:
        """uint32 vector of word `index` of the step's codes."""
        return self._word("q_weight", self.steps.step // UNIT * self.fmt.bits, index)

    def numbers(self, first: int, within_block: bool = False) -> Numbers:
        """Scale, bias and zero of the segment that begins at column `first` of the step.

        `within_block`: of two levels the lower one, which `block_numbers` are to multiply.
        """
        fmt = self.fmt
        zero = None
        bias = None
        base = fmt.scale_zero if fmt.two_level else 0
        scale = self._of_group("q_scale", base, first, within_block)
        if fmt.grid == "asymmetric":
            bias = self._of_group("q_bias", 0, first, within_block)
        elif fmt.grid == "zero_point":
            zero = self._as_f32(self._at("q_zero", self._group(first)))
        return Numbers(scale, bias, zero)

    def block_numbers(self) -> Numbers:
        """The upper level of scale and bias, of all segments of the step."""
        bias = self._of_block("q_block_bias") if self.fmt.grid == "asymmetric" else None
        return Numbers(self._of_block("q_block_scale"), bias)

    def weight(self, column: int, numbers: Numbers) -> Any:
        """The f32 vector of weights of a column in a segment with these numbers."""
        number, vtype = self.number(column), vector(self.isa, "float32")
        if numbers.zero is not None:
            number = number - numbers.zero
        if numbers.bias is not None:
            return fma(number, numbers.scale, numbers.bias, vtype)
        return number * numbers.scale

    def _group(self, first: int) -> Any:
        size, steps = self.fmt.group_size(self.k), self.steps
        if steps.step % size == 0:
            return self.index * (steps.step // size) + first // size
        return tirx.floordiv(self.index * steps.step + first, size)

    def _of_group(self, suffix: str, base: int, first: int, within_block: bool) -> Any:
        """A scale or bias of the group of column `first`, as f32."""
        fmt, group = self.fmt, self._group(first)
        if fmt.grid == "mxfp4":
            exponent = T.cast(self._at(suffix, group), vector(self.isa, "uint32"))
            return T.bind(mxfp4.power_expr(exponent, self.isa.lanes))
        if fmt.scale_bits is None:
            return T.bind(self._as_f32(self._at(suffix, group)))
        if streamed(fmt):
            size, bits = fmt.group_size(self.k), fmt.scale_bits
            per_step = self.steps.step // size * bits // 32
            code = stream_code(
                self.isa, lambda i: self._word(suffix, per_step, i), first // size, bits
            )
            number = code_number(self.isa, code, True, bits, base)
        else:
            number = self._as_f32(self._at(suffix, group))
            if base:
                number = number - splat(T.float32(base), self.isa.lanes)
        if within_block:
            return T.bind(number)
        return T.bind(number * self._of_block(suffix.replace("q_", "q_block_")))

    def _of_block(self, suffix: str) -> Any:
        """The number of the block of the step, which lies within one."""
        if (suffix, 0) not in self.loaded:
            assert BLOCK % self.steps.step == 0, f"a step of {self.steps.step} leaves its block"
            block = tirx.floordiv(self.index, BLOCK // self.steps.step)
            self.loaded[suffix, 0] = T.bind(self._as_f32(self._at(suffix, block)))
        return self.loaded[suffix, 0]

    def _word(self, suffix: str, per_step: int, number: int) -> Any:
        if (suffix, number) not in self.loaded:
            self.loaded[suffix, number] = T.bind(self._at(suffix, self.index * per_step + number))
        return self.loaded[suffix, number]

    def _at(self, suffix: str, column: Any) -> Any:
        return self.parts[suffix][self.block, column, lanes_from(0, self.isa.lanes)]

    def _as_f32(self, value: Any) -> Any:
        return T.cast(value, vector(self.isa, "float32"))


def scalar_weight(
    fmt: WeightFormat, k: int, parts: list[Any], block: Any, lane: Any, column: Any
) -> Any:
    """One weight in f32 of the repacked layout; `column` is an int64 expression."""
    named = dict(zip([part.suffix for part in fmt.stored(1, k)], parts, strict=True))

    def at(suffix: str, index: Any) -> Any:
        return named[suffix][block, index, lane]

    if fmt.is_float:
        value = at("weight", column)
        if fmt.dtype == "bfloat16":
            return T.reinterpret("float32", T.cast(value, "uint32") << T.uint32(16))
        return T.cast(value, "float32")
    group = tirx.floordiv(column, fmt.group_size(k))

    def of_group(suffix: str, base: int) -> Any:
        if fmt.scale_bits is None:
            return T.cast(at(suffix, group), "float32")
        if streamed(fmt):
            code = code_scalar(lambda i: at(suffix, i), group, fmt.scale_bits)
        else:
            code = at(suffix, group)
        block_suffix = suffix.replace("q_", "q_block_")
        block_number = T.cast(at(block_suffix, tirx.floordiv(column, BLOCK)), "float32")
        return (T.cast(code, "float32") - T.float32(base)) * block_number

    q = code_of_words(lambda i: at("q_weight", i), column, fmt.bits)
    if fmt.grid == "mxfp4":
        exponent = T.cast(at("q_scale", group), "uint32")
        return mxfp4.number_expr(q) * mxfp4.power_expr(exponent)
    code = T.cast(q, "float32")
    scale = of_group("q_scale", fmt.scale_zero if fmt.two_level else 0)
    if fmt.grid == "asymmetric":
        return code * scale + of_group("q_bias", 0)
    zero = T.float32(fmt.zero_code)
    if fmt.grid == "zero_point":
        zero = T.cast(at("q_zero", group), "float32")
    return (code - zero) * scale
