"""Where the codes of a weight lie in the words that the kernels read: planes of quads.

UNIT columns of a row are `bits` words. Codes of 3, 5 and 6 bits are split into planes, low bits
first, whose widths divide 8; a plane of p bits has p words of the unit. Byte b of a word holds one
field of each of its quads, four columns side by side: column 4 j + b of the unit lies in word
j // (8 / p) of the plane, at bit 8 b + p * (j % (8 / p)).
So one shift and one mask turn a word into the codes of a quad, a byte each, as dot product
instructions take them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from qcc.quant_schemes.format import UNIT

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
QUAD = 4  # columns whose codes are the bytes of a word


@dataclass(frozen=True)
class Field:
    """`bits` bits of a code, from its bit `low` on, at bit `shift` of word `word` of a row."""

    word: int
    shift: int
    bits: int
    low: int


def fields(column: int, bits: int) -> tuple[Field, ...]:
    """The parts of the code of a column of a row, low bits first."""
    unit, inside = divmod(column, UNIT)
    quad, byte = divmod(inside, QUAD)
    found, word, low = [], unit * bits, 0
    for width in PLANES[bits]:
        at, part = divmod(quad, 8 // width)
        found.append(Field(word + at, 8 * byte + width * part, width, low))
        word, low = word + width, low + width
    return tuple(found)


def row_words(k: int, bits: int) -> int:
    """Words of the codes of a row of k columns."""
    return -(-k // UNIT) * bits


def words_of_codes(codes: Sequence[Any], bits: int) -> list[Any]:
    """The words, uint32 expressions, of a unit's UNIT codes (uint32 expressions)."""
    words: list[Any] = [None] * bits
    for column, code in enumerate(codes):
        for field in fields(column, bits):
            value = code
            if len(PLANES[bits]) > 1:
                shifted = code >> tirx.const(field.low, "uint32") if field.low else code
                value = shifted & tirx.const(2**field.bits - 1, "uint32")
            if field.shift:
                value = value << tirx.const(field.shift, "uint32")
            before = words[field.word]
            words[field.word] = value if before is None else before | value
    return words


def code_of_words(word: Callable[[Any], Any], column: Any, bits: int) -> Any:
    """The code, uint32, of a column that is an int64 expression; word: number -> uint32."""
    unit, inside = tirx.floordiv(column, UNIT), tirx.floormod(column, UNIT)
    quad, byte = tirx.floordiv(inside, QUAD), tirx.floormod(inside, QUAD)
    code, first, low = None, 0, 0
    for width in PLANES[bits]:
        at = unit * bits + first + tirx.floordiv(quad, 8 // width)
        shift = (byte * 8 + tirx.floormod(quad, 8 // width) * width).astype("uint32")
        part = (word(at) >> shift) & tirx.const(2**width - 1, "uint32")
        code = part if code is None else code | (part << tirx.const(low, "uint32"))
        first, low = first + width, low + width
    return code
