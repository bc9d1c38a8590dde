"""The TIR of the converter's kernels: numbers in, words and scales (or casts) out, row by row.

All arithmetic is f32 with a rounding to the model dtype after each step; division, sum and product
of two 11-bit (or 8-bit) significands rounded to 24 bits and then to 11 (or 8) give the correctly
rounded result. bfloat16 numbers are uint16 bits here and are rounded by integer arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from qcc.quant_schemes.format import WeightFormat

LANES = 16
MAGNITUDE, INFINITY_BITS, NAN_BITS = 0x7FFFFFFF, 0x7F800000, 0x7FC00000
# What a dtype is called in a kernel: LLVM and DLPack of numpy know no bfloat16.
STORAGE = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}
Load = Callable[[Any], Any]  # first element of a group's vector -> f32 vector


def quantize_kernel(source: str, fmt: WeightFormat) -> tirx.PrimFunc:
    """(rows source[n, k], words uint32[n, w], scales fmt.dtype[n, g]); w and g as the format says.

    It computes what rounding/rtn.py does, in layout NK. NaN or infinite weights give a scale that
    is NaN or infinite.
    """
    group, per_word = _group_size(fmt), 32 // fmt.bits
    lanes = _lanes(group)
    with IRBuilder() as builder:
        with T.prim_func():
            T.func_attr({"global_symbol": "quantize", "tirx.noalias": True})
            n, k, w, g = (tirx.Var(name, "int64") for name in ("n", "k", "w", "g"))
            rows = T.arg("rows", _buffer((n, k), STORAGE[source]))
            words = T.arg("words", _buffer((n, w), "uint32"))
            scales = T.arg("scales", _buffer((n, g), STORAGE[fmt.dtype]))
            codes = _local(group, "uint8")
            top = _local(lanes, "uint32")
            tail = _local(group, "float32")
            with _serial(n) as row:
                with _serial(k // group) as i:

                    def load(start: Any) -> Any:
                        return _as_f32(rows[row, _ramp(i * group + start, lanes)], source, lanes)

                    scale = _group(load, codes, top, fmt)
                    T.buffer_store(scales, _store_bits(scale, fmt.dtype), [row, i])
                    _pack(codes, words, row, i * (group // per_word), fmt)
                with T.If(k % group > 0), T.Then():
                    full, rest = k // group, k % group
                    with _serial(group) as j:
                        T.buffer_store(tail, T.float32(0), [j])
                    with _serial(rest) as j:
                        number = _as_f32(rows[row, full * group + j], source, 1)
                        T.buffer_store(tail, number, [j])
                    scale = _group(lambda start: tail[_ramp(start, lanes)], codes, top, fmt)
                    T.buffer_store(scales, _store_bits(scale, fmt.dtype), [row, full])
                    with _serial(group - rest) as j:
                        T.buffer_store(codes, T.uint8(0), [rest + j])
                    _pack(codes, words, row, full * (group // per_word), fmt)
    return builder.get()


def cast_kernel(source: str, dtype: str) -> tirx.PrimFunc:
    """(numbers source[m], result dtype[m]); the last m % LANES numbers are left to the caller."""
    with IRBuilder() as builder:
        with T.prim_func():
            T.func_attr({"global_symbol": "cast", "tirx.noalias": True})
            m = tirx.Var("m", "int64")
            numbers = T.arg("numbers", _buffer((m,), STORAGE[source]))
            result = T.arg("result", _buffer((m,), STORAGE[dtype]))
            with _serial(m // LANES) as i:
                lanes = _ramp(i * LANES, LANES)
                value = _as_f32(numbers[lanes], source, LANES)
                T.buffer_store(result, _store_bits(_round(value, dtype), dtype), [lanes])
    return builder.get()


def _group(load: Load, codes: Any, top: Any, fmt: WeightFormat) -> Any:
    """Choose the codes of one group; returns its scale, an f32 number of the model dtype."""
    lanes = _lanes(_group_size(fmt))
    vectors = _group_size(fmt) // lanes
    every = _ramp(tirx.IntImm("int64", 0), lanes)
    T.buffer_store(top, _splat(T.uint32(0), lanes), [every])
    with _serial(vectors) as v:
        # Magnitudes compare like their bits, and NaN, whose bits are the largest, is not lost.
        bits = T.reinterpret(_vec("uint32", lanes), load(v * lanes))
        size = T.reinterpret(_vec("float32", lanes), bits & _splat(T.uint32(MAGNITUDE), lanes))
        rounded = T.reinterpret(_vec("uint32", lanes), _round(size, fmt.dtype))
        T.buffer_store(top, T.max(top[every], rounded), [every])
    largest = T.bind(_reduce_max(top[every], lanes))
    scale = T.bind(_round(T.reinterpret("float32", largest) / T.float32(fmt.zero_code), fmt.dtype))
    zero = scale == T.float32(0)
    divisor = T.bind(_splat(T.Select(zero, T.float32(1), scale), lanes))
    most = T.bind(_splat(T.Select(zero, T.float32(0), T.float32(fmt.top_code)), lanes))
    with _serial(vectors) as v:
        weight = _round(load(v * lanes), fmt.dtype)
        ratio = _round(weight / divisor, fmt.dtype)
        shifted = _round(ratio + _splat(T.float32(fmt.zero_code), lanes), fmt.dtype)
        whole = T.call_llvm_pure_intrin(_vec("float32", lanes), "llvm.rint", shifted)
        code = T.min(T.max(whole, _splat(T.float32(0), lanes)), most)
        code = T.cast(T.cast(code, _vec("int32", lanes)), _vec("uint8", lanes))
        T.buffer_store(codes, code, [_ramp(v * lanes, lanes)])
    return scale


def _pack(codes: Any, words: Any, row: Any, first: Any, fmt: WeightFormat) -> None:
    """Write the words of a group's codes, from word `first` on."""
    group, per_word = _group_size(fmt), 32 // fmt.bits
    lanes = _lanes(group)
    if fmt.bits in (4, 8) and lanes % per_word == 0:
        with _serial(group // lanes) as v:
            part = codes[_ramp(v * lanes, lanes)]
            if fmt.bits == 4:
                # Two bytes 0000bbbb 0000aaaa, as one little endian uint16, become one bbbbaaaa.
                pairs = T.reinterpret(_vec("uint16", lanes // 2), part)
                joined = pairs | (pairs >> _splat(T.uint16(4), lanes // 2))
                part = T.cast(joined, _vec("uint8", lanes // 2))
            count = lanes // per_word
            packed = T.reinterpret(_vec("uint32", count), part)
            T.buffer_store(words, packed, [row, _ramp(first + v * count, count)])
        return
    with _serial(group // per_word) as j:
        word, done = T.uint32(0), 0
        while done < per_word:
            count = next(size for size in (8, 4, 2, 1) if size <= per_word - done)
            part = codes[_ramp(j * per_word + done, count)]
            word = word | (_squeeze(part, count, fmt.bits) << T.uint32(done * fmt.bits))
            done += count
        T.buffer_store(words, word, [row, first + j])


def _squeeze(part: Any, count: int, bits: int) -> Any:
    """The low `bits` of each of 1, 2, 4 or 8 bytes side by side, as a uint32."""
    dtype = f"uint{8 * count}"
    value, width = T.reinterpret(dtype, part), 8
    while width < 8 * count:
        # Fields of `bits` useful bits, `width` apart: join neighbours.
        mask = sum(((1 << 2 * bits) - 1) << at for at in range(0, 8 * count, 2 * width))
        value = (value | (value >> tirx.const(width - bits, dtype))) & tirx.const(mask, dtype)
        width, bits = 2 * width, 2 * bits
    return T.cast(value, "uint32")


def _as_f32(loaded: Any, source: str, lanes: int) -> Any:
    if source == "float32":
        return loaded
    if source == "float16":
        return T.cast(loaded, _vec("float32", lanes))
    wide = T.cast(loaded, _vec("uint32", lanes)) << _splat(T.uint32(16), lanes)
    return T.reinterpret(_vec("float32", lanes), wide)


def _round(value: Any, dtype: str) -> Any:
    """An f32 value rounded to a number of `dtype`, nearest even, still in f32."""
    if dtype == "float32":
        return value
    lanes = value.ty.dtype.lanes if hasattr(value, "ty") else 1
    if dtype == "float16":
        return T.cast(T.cast(value, _vec("float16", lanes)), _vec("float32", lanes))
    bits = T.reinterpret(_vec("uint32", lanes), value)
    odd = (bits >> _splat(T.uint32(16), lanes)) & _splat(T.uint32(1), lanes)
    near = (bits + odd + _splat(T.uint32(0x7FFF), lanes)) & _splat(T.uint32(0xFFFF0000), lanes)
    # The sum may carry a NaN out of its range.
    nan = (bits & _splat(T.uint32(MAGNITUDE), lanes)) > _splat(T.uint32(INFINITY_BITS), lanes)
    near = T.Select(nan, _splat(T.uint32(NAN_BITS), lanes), near)
    return T.reinterpret(_vec("float32", lanes), near)


def _store_bits(value: Any, dtype: str) -> Any:
    """An f32 value that is a number of `dtype`, as the kernel stores it."""
    lanes = value.ty.dtype.lanes
    if dtype == "bfloat16":
        bits = T.reinterpret(_vec("uint32", lanes), value) >> _splat(T.uint32(16), lanes)
        return T.cast(bits, _vec("uint16", lanes))
    return value if dtype == "float32" else T.cast(value, _vec("float16", lanes))


def _reduce_max(vector: Any, lanes: int) -> Any:
    if lanes == 1:
        return vector
    return T.call_llvm_pure_intrin("uint32", "llvm.vector.reduce.umax", vector)


def _group_size(fmt: WeightFormat) -> int:
    assert isinstance(fmt.group, int), f"{fmt} has no groups of columns"
    return fmt.group


def _lanes(group: int) -> int:
    """The widest vector that divides a group."""
    lanes = LANES
    while group % lanes:
        lanes //= 2
    return lanes


def _vec(dtype: str, lanes: int) -> str:
    return f"{dtype}x{lanes}" if lanes > 1 else dtype


def _splat(value: Any, lanes: int) -> Any:
    return T.broadcast(value, lanes) if lanes > 1 else value


def _ramp(start: Any, lanes: int) -> Any:
    return T.ramp(start, 1, lanes) if lanes > 1 else start


def _serial(stop: Any) -> Any:
    return T.serial(
        tirx.IntImm("int64", 0), tirx.IntImm("int64", stop) if isinstance(stop, int) else stop
    )


def _buffer(shape: tuple[Any, ...], dtype: str) -> Any:
    return T.buffer(shape, dtype, layout=None)


def _local(size: int, dtype: str) -> Any:
    return T.alloc_buffer((size,), dtype, scope="local", layout=None)
