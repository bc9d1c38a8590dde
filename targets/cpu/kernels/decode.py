"""Codes in registers -> f32 numbers (before the scale), for every WeightFormat and Isa."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from qcc.quant_schemes.scheme import WeightFormat
from qcc.targets.cpu.isa import Isa, vector
from qcc.targets.cpu.kernels.tir import splat

TABLE_LANES = 16  # numbers that one vpermps looks up


def float_vector(isa: Isa, fmt: WeightFormat, loaded: Any) -> Any:
    """A loaded vector of a float format as f32; bf16 arrives as its bits."""
    if fmt.dtype == "bfloat16":
        wide = T.cast(loaded, vector(isa, "uint32")) << splat(T.uint32(16), isa.lanes)
        return T.reinterpret(vector(isa, "float32"), wide)
    return T.cast(loaded, vector(isa, "float32")) if fmt.dtype != "float32" else loaded


def code_vector(isa: Isa, fmt: WeightFormat, words: Any, element: int) -> Any:
    """(q - M) in f32 of code `element` of each lane's word."""
    shift = element * fmt.bits
    shifted = words >> splat(T.uint32(shift), isa.lanes) if shift else words
    if isa.table_lookup and fmt.bits <= 4:
        return _lookup(isa, fmt, shifted)
    code = shifted & splat(T.uint32(2**fmt.bits - 1), isa.lanes)
    number = T.cast(T.reinterpret(vector(isa, "int32"), code), vector(isa, "float32"))
    return number - splat(T.float32(fmt.max_code), isa.lanes)


def _lookup(isa: Isa, fmt: WeightFormat, shifted: Any) -> Any:
    """vpermps reads the low 4 bits of an index: the table repeats for codes of fewer bits."""
    entries = [float(i % 2**fmt.bits - fmt.max_code) for i in range(TABLE_LANES)]
    table = T.Shuffle(
        [T.float32(entry) for entry in entries], [T.int32(i) for i in range(TABLE_LANES)]
    )
    return T.call_llvm_pure_intrin(
        vector(isa, "float32"),
        "llvm.x86.avx512.permvar.sf.512",
        table,
        T.reinterpret(vector(isa, "int32"), shifted),
    )
