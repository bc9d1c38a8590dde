"""Where the codes of a weight lie in the words that the kernels read: quads of columns.

UNIT columns of a row are `bits` words. The codes of a quad, four columns side by side, lie at the
same bits of the four bytes of a word, so that one shift and one mask turn a word into the quad, a
byte each, as dot product instructions take it. The bytes of a word have room for 8 // bits quads,
the first of which lie there in order: the first word's, the second word's. Of 3, 5 and 6 bits two,
three and two quads are left: their codes fill the bits above, the first word's, the second word's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from qcc.quant_schemes.format import UNIT

QUAD = 4  # columns whose codes are the bytes of a word


@dataclass(frozen=True)
class Field:
    """`bits` bits of a code, from its bit `low` on, at bit `shift` of word `word` of a row."""

    word: int
    shift: int
    bits: int
    low: int


def _whole(bits: int) -> tuple[int, int]:
    """(quads in a word, those in all words of a unit)."""
    return 8 // bits, 8 // bits * bits


def fields(column: int, bits: int) -> tuple[Field, ...]:
    """The parts of the code of a column of a row, low bits first."""
    unit, inside = divmod(column, UNIT)
    quad, byte = divmod(inside, QUAD)
    first, shift, (each, whole) = unit * bits, 8 * byte, _whole(bits)
    if quad < whole:
        word, place = divmod(quad, each)
        return (Field(first + word, shift + bits * place, bits, 0),)
    used, found = each * bits, []  # bits of each byte below those that are filled
    start, end = (quad - whole) * bits, (quad - whole + 1) * bits
    at = start
    while at < end:
        word, place = divmod(at, 8 - used)
        size = min(8 - used - place, end - at)
        found.append(Field(first + word, shift + used + place, size, at - start))
        at += size
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
            if field.bits < bits:
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
    each, whole = _whole(bits)

    def part(number: Any, shift: Any, size: int) -> Any:
        value = word(unit * bits + number) >> (byte * 8 + shift).astype("uint32")
        return value & tirx.const(2**size - 1, "uint32")

    code = part(tirx.floordiv(quad, each), tirx.floormod(quad, each) * bits, bits)
    for other in range(whole, 8):
        found = tirx.const(0, "uint32")
        for field in fields(other * QUAD, bits):
            value = part(field.word, field.shift, field.bits)
            found = found | (value << tirx.const(field.low, "uint32"))
        code = tirx.if_then_else(quad == other, found, code)
    return code
