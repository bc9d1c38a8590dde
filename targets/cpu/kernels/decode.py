"""Codes in registers -> f32 numbers (before the scale), for every WeightFormat and Isa."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qcc.quant_schemes import mxfp4
from qcc.quant_schemes.format import WeightFormat
from qcc.targets.cpu.isa import Isa, vector
from qcc.targets.cpu.kernels.quads import fields
from qcc.targets.cpu.kernels.tir import splat

TWO_23_BITS = 0x4B000000  # of 2^23 in f32, whose low bits count ones


def float_vector(isa: Isa, fmt: WeightFormat, loaded: Any) -> Any:
    """A loaded vector of a float format as f32; bf16 arrives as its bits."""
    if fmt.dtype == "bfloat16":
        wide = T.cast(loaded, vector(isa, "uint32")) << splat(T.uint32(16), isa.lanes)
        return T.reinterpret(vector(isa, "float32"), wide)
    return T.cast(loaded, vector(isa, "float32")) if fmt.dtype != "float32" else loaded


def bits_at(isa: Isa, word: Any, shift: int, mask: int | None) -> Any:
    """A word (uint32 vector) shifted right (a negative shift: left) and masked in each lane."""
    if shift:
        amount = splat(T.uint32(abs(shift)), isa.lanes)
        word = word >> amount if shift > 0 else word << amount
    return word if mask is None else word & splat(T.uint32(mask), isa.lanes)


def stream_code(isa: Isa, word: Callable[[int], Any], index: int, bits: int) -> Any:
    """uint32 vector of code `index` of a dense stream; word: number -> uint32 vector.

    The code lies within a word.
    """
    first, shift = divmod(index * bits, 32)
    assert shift + bits <= 32, f"code {index} of {bits} bits goes on in the next word"
    return bits_at(isa, word(first), shift, None if shift + bits == 32 else 2**bits - 1)


def code_at(isa: Isa, word: Callable[[int], Any], column: int, bits: int) -> tuple[Any, bool]:
    """(uint32 vector whose low `bits` are the code of a column, whether the others are 0)."""
    first, *more = fields(column, bits)
    if not more:
        return bits_at(isa, word(first.word), first.shift, None), first.shift + bits == 32
    code = bits_at(isa, word(first.word), first.shift, 2**first.bits - 1)
    for field in more:
        mask = (2**field.bits - 1) << field.low
        code = code | bits_at(isa, word(field.word), field.shift - field.low, mask)
    return code, True


def code_number(isa: Isa, code: Any, clean: bool, bits: int, zero: int) -> Any:
    """(q - zero) in f32 of the codes in each lane's low bits; `clean`: the others are 0.

    Args:
        isa: of the kernel.
        code: uint32 vector.
        clean: as `code_at` says.
        bits: of a code.
        zero: the code that stands for 0.
    """
    if bits <= isa.table_bits:
        return _lookup(isa, bits, range(-zero, 2**bits - zero), code)
    if not clean:
        code = code & splat(T.uint32(2**bits - 1), isa.lanes)
    if zero and isa.lanes == 16:
        # 2^23 + q: AVX-512 takes one vpternlogd for this and the mask, instead of a conversion.
        big = T.reinterpret(vector(isa, "float32"), code | splat(T.uint32(TWO_23_BITS), isa.lanes))
        return big - splat(T.float32(2**23 + zero), isa.lanes)
    number = T.cast(T.reinterpret(vector(isa, "int32"), code), vector(isa, "float32"))
    return number - splat(T.float32(zero), isa.lanes) if zero else number


def fp4_vector(isa: Isa, shifted: Any) -> Any:
    """FP4 in f32 of the codes in each lane's low 4 bits; a lookup where the table is large enough.

    A table of 3 bits has the magnitudes, to which the sign comes.
    """
    if isa.table_bits >= 4:
        return _lookup(isa, 4, mxfp4.FP4, shifted)
    if isa.table_bits < 3:
        return mxfp4.number_expr(shifted & splat(T.uint32(15), isa.lanes), isa.lanes)
    sign = (shifted & splat(T.uint32(8), isa.lanes)) << splat(T.uint32(28), isa.lanes)
    return mxfp4.with_sign(_lookup(isa, 3, mxfp4.FP4, shifted), sign, isa.lanes)


def _lookup(isa: Isa, bits: int, numbers: Sequence[float], shifted: Any) -> Any:
    """The number of each lane's low bits, as many as the table has entries for; fewer repeat."""
    vtype, index = vector(isa, "float32"), T.reinterpret(vector(isa, "int32"), shifted)
    low = _table(range(isa.lanes), bits, numbers)
    if isa.lanes == 8:
        return T.call_llvm_pure_intrin(vtype, "llvm.x86.avx2.permps", low, index)
    if bits <= 4:
        return T.call_llvm_pure_intrin(vtype, "llvm.x86.avx512.permvar.sf.512", low, index)
    high = _table(range(isa.lanes, 2 * isa.lanes), bits, numbers)
    return T.call_llvm_pure_intrin(vtype, "llvm.x86.avx512.vpermi2var.ps.512", low, index, high)


def _table(codes: range, bits: int, numbers: Sequence[float]) -> Any:
    entries = [T.float32(numbers[code % 2**bits]) for code in codes]
    return T.Shuffle(entries, [T.int32(i) for i in range(len(codes))])


def code_scalar(word: Callable[[Any], Any], index: Any, bits: int, sparse: bool = False) -> Any:
    """Code `index`, a TIR expression, of one row of words; uint32.

    Args:
        word: number of a word -> uint32 expression.
        index: of the code in the row, int64.
        bits: of a code.
        sparse: words hold whole codes only.
    """
    if sparse:
        each = 32 // bits
        at, first = tirx.floordiv(index, each), tirx.floormod(index, each) * bits
    else:
        at, first = tirx.floordiv(index * bits, 32), tirx.floormod(index * bits, 32)
    shift = first.astype("uint32")
    code = word(at) >> shift
    if not sparse and 32 % bits:
        over = word(at + 1) << (tirx.const(32, "uint32") - shift)
        # A word past the row's last is not read.
        code = code | tirx.if_then_else(first + bits > 32, over, tirx.const(0, "uint32"))
    return code & tirx.const(2**bits - 1, "uint32")
