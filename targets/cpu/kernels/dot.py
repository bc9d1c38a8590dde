"""Quads of codes, and their dot products with quads of int8 activations: int32 vectors.

A quad is four columns of one row of a weight, one byte each, in a 32-bit lane.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qcc.quant_schemes import mxfp4
from qcc.quant_schemes.format import WeightFormat
from qcc.targets.cpu.isa import Isa, vector
from qcc.targets.cpu.kernels.decode import bits_at
from qcc.targets.cpu.kernels.quads import QUAD, fields
from qcc.targets.cpu.kernels.steps import Step
from qcc.targets.cpu.kernels.tir import splat

FP4_ZERO = 12  # FP4 times 2 is a whole number from -12 to 12


def zero_of_quads(isa: Isa, fmt: WeightFormat) -> int:
    """The byte of a quad that stands for 0; of a grid with a zero or bias a group: for code 0."""
    zero = {"symmetric": fmt.zero_code, "mxfp4": FP4_ZERO}.get(fmt.grid, 0)
    return zero - 128 if _signed(isa, fmt) else zero


def _signed(isa: Isa, fmt: WeightFormat) -> bool:
    """Whether the bytes are codes less 128: signed dot products do not take codes of 8 bits."""
    return isa.dot == "sdot" and fmt.bits == 8


def quad_of(isa: Isa, step: Step, number: int) -> Any:
    """uint32 vector: quad `number` of a step, a byte for each of its columns."""
    fmt = step.fmt
    code = None
    for field in fields(number * QUAD, fmt.bits):
        mask = _each_byte((2**field.bits - 1) << field.low) if field.bits < 8 else None
        part = bits_at(isa, step.weight_word(field.word), field.shift - field.low, mask)
        code = part if code is None else code | part
    if fmt.grid == "mxfp4":
        return _looked_up(isa, code)
    return code ^ splat(T.uint32(_each_byte(128)), isa.lanes) if _signed(isa, fmt) else code


def _each_byte(value: int) -> int:
    return value * 0x01010101


def _looked_up(isa: Isa, codes: Any) -> Any:
    """Bytes 2 * fp4(q) + FP4_ZERO of bytes q."""
    numbers = mxfp4.FP4 * (isa.lanes // 4)  # a table for each 16 bytes
    entries = [T.uint8(int(2 * number) + FP4_ZERO) for number in numbers]
    table = T.Shuffle(entries, [T.int32(i) for i in range(len(entries))])
    kind = f"uint8x{4 * isa.lanes}"
    name = {
        16: "llvm.x86.avx512.pshuf.b.512",
        8: "llvm.x86.avx2.pshuf.b",
        4: "llvm.aarch64.neon.tbl1.v16i8",
    }[isa.lanes]
    found = T.call_llvm_pure_intrin(kind, name, table, T.reinterpret(kind, codes))
    return T.reinterpret(vector(isa, "uint32"), found)


def dot(isa: Isa, fmt: WeightFormat, total: Any, quad: Any, x: Any) -> Any:
    """int32 vector: total + the products of a quad with four int8, an int32 in every lane of x."""
    lanes, wide = 4 * isa.lanes, vector(isa, "int32")
    unsigned = T.reinterpret(f"uint8x{lanes}", quad)
    signed, x = T.reinterpret(f"int8x{lanes}", quad), T.reinterpret(f"int8x{lanes}", x)
    if isa.dot == "vnni":
        name = f"llvm.x86.avx512.vpdpbusd.{32 * isa.lanes}"
        return T.call_llvm_pure_intrin(wide, name, total, unsigned, x)
    if isa.dot == "usdot":
        name = "llvm.aarch64.neon.usdot.v4i32.v16i8"
        return T.call_llvm_pure_intrin(wide, name, total, unsigned, x)
    if isa.dot == "sdot":
        name = "llvm.aarch64.neon.sdot.v4i32.v16i8"
        return T.call_llvm_pure_intrin(wide, name, total, signed, x)
    assert isa.dot == "maddubs", isa
    if fmt.bits < 8:
        return total + _pairs(isa, quad, x, 1)
    # Sums of two products saturate at 16 bits where codes have 8: the top bit goes by itself.
    low, top = bits_at(isa, quad, 0, _each_byte(127)), bits_at(isa, quad, 7, _each_byte(1))
    return total + _pairs(isa, low, x, 1) + _pairs(isa, top, x, 128)


def _pairs(isa: Isa, quad: Any, x: Any, factor: int) -> Any:
    """The sums of four products times `factor`, by way of two sums of two."""
    half, lanes = f"int16x{2 * isa.lanes}", 4 * isa.lanes
    prefix = "llvm.x86.avx512" if isa.lanes == 16 else "llvm.x86.avx2"
    multiply, add = (
        ("pmaddubs.w.512", "pmaddw.d.512") if isa.lanes == 16 else ("pmadd.ub.sw", "pmadd.wd")
    )
    codes = T.reinterpret(f"uint8x{lanes}", quad)
    sums = T.call_llvm_pure_intrin(half, f"{prefix}.{multiply}", codes, x)
    factors = T.broadcast(tirx.const(factor, "int16"), 2 * isa.lanes)
    return T.call_llvm_pure_intrin(vector(isa, "int32"), f"{prefix}.{add}", sums, factors)
