"""AMX: tile registers of 16 rows of 64 bytes, and the instructions that use them.

Of bf16 a tile holds 16 rows of 32 numbers, or 16 pairs of rows of 16 numbers each, interleaved; of
sums 16 x 16 f32. Sums are in registers 0 to 3. STREAM is a LOAD that keeps the first cache for
others.
Instructions: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

ROWS, COLUMNS = 16, 32  # of a tile of bf16
WORDS = ROWS * COLUMNS // 2  # 32-bit words of a tile
A, B = (4, 5), (6, 7)  # registers of the factors
LOAD, STREAM, STORE = "tileloadd64", "tileloaddt164", "tilestored64"
ZERO, PRODUCT, RELEASE = "tilezero", "tdpbf16ps", "tilerelease"


def configure() -> None:
    """Make every tile register of this thread 16 rows of 64 bytes."""
    config = T.alloc_buffer((64,), "uint8", layout=None)
    for byte in range(64):
        value = 1 if byte == 0 else 0  # the palette
        if 16 <= byte < 32 and byte % 2 == 0:
            value = 64  # bytes of a row
        elif 48 <= byte < 56:
            value = ROWS
        T.buffer_store(config, T.uint8(value), [byte])
    T.evaluate(T.call_llvm_intrin("void", "llvm.x86.ldtilecfg", T.address_of(config[0])))


def call(name: str, *registers: int) -> None:
    """An instruction on tile registers alone."""
    numbers = (T.int8(number) for number in registers)
    T.evaluate(T.call_llvm_intrin("void", f"llvm.x86.{name}", *numbers))


def move(name: str, register: int, where: Any, stride: int = 64) -> None:
    """LOAD or STORE a tile whose first number is `where`; `stride` bytes between its rows."""
    args = T.int8(register), T.address_of(where), T.int64(stride)
    T.evaluate(T.call_llvm_intrin("void", f"llvm.x86.{name}", *args))


def rounded(value: Any) -> Any:
    """uint32 bits of 16 f32 whose upper halves are the nearest bf16, ties up."""
    return T.reinterpret("uint32x16", value) + T.broadcast(T.uint32(0x8000), ROWS)


def pair(low: Any, high: Any) -> Any:
    """uint32 words of two bf16 each, of vectors of 16 f32, `low` in the low halves."""
    bottom = rounded(low) >> T.broadcast(T.uint32(16), ROWS)
    mask = T.broadcast(T.uint32(0xFFFF0000), ROWS)
    # bottom | (high & mask); LLVM makes a permutation of it, which takes three times as long.
    name = "llvm.x86.avx512.pternlog.d.512"
    return T.call_llvm_pure_intrin("uint32x16", name, bottom, rounded(high), mask, T.int32(0xF8))
