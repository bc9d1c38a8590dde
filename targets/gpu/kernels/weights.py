"""Stored weights [n, k], a few columns of a row at a time, as numbers in registers.

A unit is columns of a row under one scale: NARROW of them (10 where words are sparse), whose codes
lie in at most two words whatever the format's bits, groups and layout; or WIDE of them, which fill
whole words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qcc.quant_schemes import mxfp4
from qcc.quant_schemes.format import WeightFormat
from qcc.quant_schemes.packing import grid_expr
from qcc.targets.gpu.kernels.tir import VECTOR, as_vectors, elements

WORD = 32  # bits
Codes = Callable[[int], Any]  # column of a unit -> its code, uint32


NARROW, WIDE = 8, 32  # columns


def unit_columns(fmt: WeightFormat) -> int:
    """Columns of a narrow unit."""
    return 10 if fmt.sparse_words else NARROW


def has_wide_units(fmt: WeightFormat, k: int) -> bool:
    """Whether rows of k columns are made of wide units, each side by side in memory."""
    if fmt.is_float or fmt.layout != "NK" or fmt.sparse_words or k % WIDE:
        return False
    return isinstance(fmt.group, str) or (fmt.group is not None and fmt.group % WIDE == 0)


def units_of_row(fmt: WeightFormat, k: int) -> int:
    """Wide units of a row of k columns where it is made of such, else narrow ones."""
    return -(-k // (WIDE if has_wide_units(fmt, k) else unit_columns(fmt)))


class Weights:
    """A stored weight in a kernel, read unit by unit."""

    def __init__(
        self, fmt: WeightFormat, n: int, k: int, parts: Sequence[Any], wide: bool = False
    ) -> None:
        """`parts`: the buffers, in the order of `fmt.stored`; n rows of k columns.

        Emit it outside of every grid: what it can it reads by vectors.
        """
        self.fmt, self.n, self.k, self.parts = fmt, n, k, list(parts)
        self.columns = WIDE if wide else unit_columns(fmt)
        self.units = -(-k // self.columns)
        of_row = k if fmt.is_float else self.columns * fmt.bits // WORD if wide else 0
        self.vectors = of_row > 0 and of_row % VECTOR == 0
        if self.vectors:
            size = n * (k if fmt.is_float else fmt.num_words(k))
            self.parts[0] = as_vectors(self.parts[0], size)

    def dot(self, row: Any, unit: Any, x: Sequence[Any]) -> Any:
        """Emit the f32 product of a unit with x, one f32 a column, 0 past the last column of k."""
        if self.fmt.is_float:
            weights = zip(self._stored(row, unit), x, strict=True)
            return sum_of([weight * value for weight, value in weights])
        number, scale, offset = self._unit(row, unit)
        total = sum_of([number(j) * value for j, value in enumerate(x)]) * scale
        return total if offset is None else total + offset * sum_of(list(x))

    def values(self, row: Any, unit: Any) -> list[Any]:
        """Emit the f32 numbers of a unit; past the last column of k any number."""
        if self.fmt.is_float:
            return self._stored(row, unit)
        number, scale, offset = self._unit(row, unit)
        scaled = [number(j) * scale for j in range(self.columns)]
        return scaled if offset is None else [value + offset for value in scaled]

    def _stored(self, row: Any, unit: Any) -> list[Any]:
        """The columns of a float weight's unit."""
        first = unit * self.columns
        if self.vectors:
            starts = [T.min(first + i, self.k - VECTOR) for i in range(0, self.columns, VECTOR)]
            if self.k % self.columns == 0:
                starts = [first + i for i in range(0, self.columns, VECTOR)]
            found = [self.parts[0][(row * self.k + start) // VECTOR] for start in starts]
            return [T.cast(x, "float32") for vector in found for x in elements(T.bind(vector))]
        columns = [first + j for j in range(self.columns)]
        if self.k % self.columns:
            columns = [T.min(column, self.k - 1) for column in columns]
        return [T.cast(self.parts[0][row, column], "float32") for column in columns]

    def _unit(self, row: Any, unit: Any) -> tuple[Callable[[int], Any], Any, Any | None]:
        """(f32 number of a column before the scale, scale, what is added after it)."""
        fmt = self.fmt
        first = unit * self.columns
        scale, offset = grid_expr(fmt, self.parts, row, first, self.k, "float32")
        scale = T.bind(scale)
        code = self._codes(row, unit)
        if fmt.grid == "mxfp4":
            return (lambda j: mxfp4.number_expr(code(j))), scale, None
        if fmt.grid == "asymmetric":
            return (lambda j: T.cast(code(j), "float32")), scale, T.bind(offset)
        zero = T.bind(offset)
        return (lambda j: T.cast(T.cast(code(j), "int32") - zero, "float32")), scale, None

    def _codes(self, row: Any, unit: Any) -> Codes:
        """Emit the reading of a unit's words."""
        fmt, bits = self.fmt, self.fmt.bits
        mask = tirx.const(2**bits - 1, "uint32")
        if self.columns == WIDE:
            return self._wide_codes(row, unit, mask)
        if fmt.sparse_words:
            word = T.bind(self._word(row, unit))
            return lambda j: word >> _u32(j * bits) & mask
        size = self.columns * bits  # bits of a unit
        word_of, shift = unit * size // WORD, unit * size % WORD
        low = T.bind(self._word(row, word_of))
        if size % WORD == 0:
            words = [low] + [T.bind(self._word(row, word_of + i)) for i in range(1, size // WORD)]
            return lambda j: words[j * bits // WORD] >> _u32(j * bits % WORD) & mask
        amount = T.bind(T.cast(shift, "uint32"))
        if WORD % size == 0:
            return lambda j: low >> (amount + _u32(j * bits)) & mask
        # The next word, where the unit reaches it: a row's last word has none.
        last = fmt.num_words(self.k) - 1
        high = T.bind(self._word(row, T.min(word_of + 1, last)))
        # A shift by 32 is none: in two steps it gives 0.
        lower = T.bind(low >> amount | high << _u32(1) << (_u32(WORD - 1) - amount))
        upper = T.bind(high >> amount)

        def code(j: int) -> Any:
            at = j * bits
            if at + bits <= WORD:
                return lower >> _u32(at) & mask
            if at >= WORD:
                return upper >> _u32(at - WORD) & mask
            return (lower >> _u32(at) | upper << _u32(WORD - at)) & mask

        return code

    def _wide_codes(self, row: Any, unit: Any, mask: Any) -> Codes:
        """The same of a wide unit: no code is where only the run knows."""
        bits = self.fmt.bits
        first = row * self.fmt.num_words(self.k) + unit * bits
        if self.vectors:
            found = [self.parts[0][first // VECTOR + i] for i in range(bits // VECTOR)]
            words = [word for vector in found for word in elements(T.bind(vector))]
        else:
            words = [T.bind(self._word(row, unit * bits + i)) for i in range(bits)]

        def code(j: int) -> Any:
            at, shift = divmod(j * bits, WORD)
            value = words[at] >> _u32(shift)
            if shift + bits > WORD:
                value = value | words[at + 1] << _u32(WORD - shift)
            return value & mask

        return code

    def _word(self, row: Any, word: Any) -> Any:
        words = self.parts[0]
        return words[row, word] if self.fmt.layout == "NK" else words[word, row]


def _u32(value: int) -> Any:
    return tirx.const(value, "uint32")


def sum_of(values: Sequence[Any]) -> Any:
    """The sum of expressions, as a balanced tree."""
    terms = list(values)
    while len(terms) > 1:
        pairs = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[len(pairs) * 2 :]
    return terms[0]
