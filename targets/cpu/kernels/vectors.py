"""Vector expressions for hand-written CPU kernels, on tvm's TIR builder.

A kernel is a Python function that emits TIR while it runs: Python loops unroll, `T.serial` loops
stay. Values that live in registers are `Reg`s (a small buffer with constant indices, which LLVM
promotes). Nothing here calls libm: exp, exp2, log2, tanh, cos and sin are polynomials, the same on
every processor.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.tirx.script import builder as T

LOG2_E = math.log2(math.e)
LN_2 = math.log(2)

# 2^f on [-1/2, 1/2]: a Chebyshev interpolant of degree 6, relative error 2e-9 before rounding.
_EXP2_POLY = tuple(
    float(c)
    for c in np.polynomial.chebyshev.Chebyshev.interpolate(np.exp2, 6, domain=[-0.5, 0.5])
    .convert(kind=np.polynomial.Polynomial)
    .coef
)
# sin and cos on [-pi/4, pi/4]: odd and even minimax polynomials (Cephes sinf, cosf).
_SIN_POLY = (-1.6666654611e-1, 8.3321608736e-3, -1.9515295891e-4)
_COS_POLY = (4.166664568298827e-2, -1.388731625493765e-3, 2.443315711809948e-5)


@dataclass(frozen=True)
class Registers:
    """The vector registers of a processor: how many, and f32 lanes in each."""

    count: int
    lanes: int

    @staticmethod
    def of(target: Any) -> Registers:
        """Read them off an llvm target; x86 below AVX-512 has 16, everything else here 32."""
        lanes = int(tvm.target.codegen.llvm_get_vector_width(target)) // 32
        lanes = min(max(lanes, 4), 16)
        triple = str(target.attrs.get("mtriple", "") or "")
        x86 = triple.startswith(("x86", "i686")) or (not triple and _host_is_x86())
        return Registers(16 if x86 and lanes < 16 else 32, lanes)


def _host_is_x86() -> bool:
    return str(tvm.target.codegen.llvm_get_system_triple()).startswith(("x86", "i686"))


def lanes_dividing(extent: int, limit: int) -> int:
    """The widest vector, a power of two up to `limit`, that divides `extent`."""
    return math.gcd(extent, limit)


def index(base: Any, lanes: int) -> Any:
    """Indices base .. base + lanes - 1."""
    return base if lanes == 1 else T.ramp(base, 1, lanes)


def splat(value: Any, lanes: int) -> Any:
    """A scalar in every lane; a Python float is an f32."""
    if isinstance(value, float):
        value = tirx.FloatImm("float32", value)
    elif isinstance(value, int):
        value = tirx.IntImm("int32", value)
    return value if lanes == 1 else T.broadcast(value, lanes)


def load(buffer: Any, base: Any, lanes: int) -> Any:
    """`lanes` elements of a 1-D buffer from `base`, as f32 if they are narrower numbers."""
    value = buffer[index(base, lanes)]
    narrow = ("float16", "bfloat16", "int8")
    return cast(value, "float32", lanes) if buffer.dtype in narrow else value


def store(buffer: Any, base: Any, value: Any, lanes: int) -> None:
    """Write `lanes` elements of a 1-D buffer from `base`, converted to its dtype."""
    if buffer.dtype in ("float16", "bfloat16"):
        value = cast(value, buffer.dtype, lanes)
    T.buffer_store(buffer, value, [index(base, lanes)])


def cast(value: Any, dtype: str, lanes: int) -> Any:
    return T.Cast(dtype if lanes == 1 else f"{dtype}x{lanes}", value)


def fma(a: Any, b: Any, c: Any, lanes: int) -> Any:
    """a * b + c in f32, one rounding where the processor has it."""
    dtype = "float32" if lanes == 1 else f"float32x{lanes}"
    return T.call_llvm_pure_intrin(dtype, "llvm.fmuladd", a, b, c)


def shuffle(vectors: Sequence[Any], lanes: Sequence[int]) -> Any:
    """Pick lanes of the concatenated vectors."""
    return tirx.Shuffle(list(vectors), [tirx.IntImm("int32", i) for i in lanes])


class Reg:
    """A vector that stays in a register and can be assigned in a loop."""

    def __init__(self, lanes: int, value: Any = None, dtype: str = "float32") -> None:
        self.lanes = lanes
        # Scope "global": TVM puts it on the stack, but takes "local" from its workspace pool.
        self.buffer = T.alloc_buffer((lanes,), dtype)
        if value is not None:
            self.set(value)

    def get(self) -> Any:
        return self.buffer[index(0, self.lanes)]

    def set(self, value: Any) -> None:
        T.buffer_store(self.buffer, value, [index(0, self.lanes)])


def keep(value: Any, lanes: int, dtype: str = "float32") -> Any:
    """Name a value that is used more than once.

    Not T.bind: TVM's analyzers look through bindings, use by use, and a polynomial of a polynomial
    takes them minutes. They do not look into a buffer.
    """
    return Reg(lanes, value, dtype).get()


def keep_int(value: Any) -> Any:
    """Name an i32 scalar, as `keep`: for min, max and Select, at which bounds analysis branches."""
    return keep(value, 1, "int32")


def horner(x: Any, coefficients: Sequence[float], lanes: int) -> Any:
    """c[0] + c[1] x + c[2] x^2 + ..."""
    value = splat(coefficients[-1], lanes)
    for c in reversed(coefficients[:-1]):
        value = keep(fma(value, x, splat(c, lanes), lanes), lanes)
    return value


def exp2(x: Any, lanes: int) -> Any:
    """2^x for x <= 0, relative error below 2e-7; 0 for x < -126.

    x = n + f with n the nearest integer; the exponent field of the polynomial in f then takes n.
    """
    clamped = keep(T.max(x, splat(-127.0, lanes)), lanes)
    rounded, fraction = _nearest(clamped, lanes)
    return _power(clamped, rounded, fraction, lanes)


def exp(x: Any, lanes: int) -> Any:
    """e^x for x <= 0, relative error below 1.5e-7; 0 for x < -87.3.

    As `exp2` of x log2 e, whose rounding error the fraction gets back.
    """
    clamped = keep(T.max(x, splat(-88.0, lanes)), lanes)
    scaled = keep(clamped * splat(LOG2_E, lanes), lanes)
    rounded, _ = _nearest(scaled, lanes)
    whole = splat(0.0, lanes) - cast(rounded, "float32", lanes)
    high = struct.unpack("f", struct.pack("f", LOG2_E))[0]
    fraction = keep(fma(clamped, splat(high, lanes), whole, lanes), lanes)
    fraction = keep(fma(clamped, splat(LOG2_E - high, lanes), fraction, lanes), lanes)
    return _power(scaled, rounded, fraction, lanes)


def _power(exponent: Any, rounded: Any, fraction: Any, lanes: int) -> Any:
    """2^(rounded + fraction); 0 where the exponent is below those of normal numbers."""
    poly = horner(fraction, _EXP2_POLY, lanes)
    integer = "int32" if lanes == 1 else f"int32x{lanes}"
    shifted = T.shift_left(rounded, splat(23, lanes))
    power = T.reinterpret(_f32(lanes), T.reinterpret(integer, poly) + shifted)
    return keep(T.Select(exponent < splat(-126.0, lanes), splat(0.0, lanes), power), lanes)


def tanh(x: Any, lanes: int) -> Any:
    """tanh x, relative error below 3e-7: t / (2 - t) with t = 1 - 2^y, y = -2 |x| log2 e.

    With y = n + f as in `exp2`, t = (1 - 2^n) - 2^n (2^f - 1), and 2^f - 1 is the polynomial less
    its first term: nothing cancels, so a small x keeps its precision.
    """
    size = T.max(x, splat(0.0, lanes) - x)
    # From y = -40 on t is 1 in f32.
    y = keep(T.max(size * splat(-2 * LOG2_E, lanes), splat(-40.0, lanes)), lanes)
    rounded, fraction = _nearest(y, lanes)
    rise = keep(fraction * horner(fraction, _EXP2_POLY[1:], lanes), lanes)
    bits = T.shift_left(rounded + splat(127, lanes), splat(23, lanes))
    power = keep(T.reinterpret(_f32(lanes), bits), lanes)
    t = keep((splat(1.0, lanes) - power) - power * rise, lanes)
    ratio = keep(t / (splat(2.0, lanes) - t), lanes)
    return keep(T.Select(x < splat(0.0, lanes), splat(0.0, lanes) - ratio, ratio), lanes)


def _nearest(x: Any, lanes: int) -> tuple[Any, Any]:
    """The integer nearest to x <= 0, as i32, and the rest.

    (Adding and subtracting 1.5 * 2^23 would round too, but TVM's simplifier undoes it.)
    """
    rounded = keep(cast(x - splat(0.5, lanes), "int32", lanes), lanes, "int32")
    return rounded, keep(x - cast(rounded, "float32", lanes), lanes)


def log2(x: Any, lanes: int) -> Any:
    """log2 x for normal x > 0, absolute error below 1e-7 near 1: by atanh((m - 1) / (m + 1))."""
    integer = "int32" if lanes == 1 else f"int32x{lanes}"
    bits = keep(T.reinterpret(integer, x), lanes, "int32")
    # The mantissa is brought to [sqrt(1/2), sqrt(2)): 0x3f3504f3 is sqrt(1/2).
    exponent = T.shift_right(bits - splat(0x3F3504F3, lanes), splat(23, lanes))
    exponent = keep(exponent, lanes, "int32")
    mantissa = T.reinterpret(_f32(lanes), bits - T.shift_left(exponent, splat(23, lanes)))
    mantissa = keep(mantissa, lanes)
    ratio = keep((mantissa - splat(1.0, lanes)) / (mantissa + splat(1.0, lanes)), lanes)
    square = keep(ratio * ratio, lanes)
    series = horner(square, [2 * LOG2_E / (2 * i + 1) for i in range(6)], lanes)
    return keep(fma(series, ratio, cast(exponent, "float32", lanes), lanes), lanes)


def cos_sin(turns: Any, lanes: int) -> tuple[Any, Any]:
    """cos and sin of an angle given as uint32 in units of 2^-32 turns; absolute error below 1.5e-7.

    Unsigned because that wraps: TVM declares signed overflow impossible.
    """
    integer = "int32" if lanes == 1 else f"int32x{lanes}"
    quadrant = T.shift_right(turns + _u32(1 << 29, lanes), _u32(30, lanes))
    quadrant = keep(quadrant, lanes, "uint32")
    rest = T.reinterpret(integer, turns - T.shift_left(quadrant, _u32(30, lanes)))
    angle = keep(cast(rest, "float32", lanes) * splat(2 * math.pi / 2**32, lanes), lanes)
    square = keep(angle * angle, lanes)
    sine = horner(square, _SIN_POLY, lanes)
    sine = keep(fma(sine * square, angle, angle, lanes), lanes)
    cosine = horner(square, _COS_POLY, lanes)
    cosine = fma(splat(-0.5, lanes), square, splat(1.0, lanes), lanes) + cosine * square * square
    cosine = keep(cosine, lanes)
    # cos, sin at quadrant 0: (c, s); 1: (-s, c); 2: (-c, -s); 3: (s, -c).
    zero, one, two = (_u32(i, lanes) for i in range(3))
    odd = keep(T.bitwise_and(quadrant, one), lanes, "uint32")
    a = keep(T.Select(odd == zero, cosine, sine), lanes)
    b = keep(T.Select(odd == zero, sine, cosine), lanes)
    negative_a = T.bitwise_and(quadrant + one, two) != zero
    negative_b = T.bitwise_and(quadrant, two) != zero
    zeros = splat(0.0, lanes)
    return (
        keep(T.Select(negative_a, zeros - a, a), lanes),
        keep(T.Select(negative_b, zeros - b, b), lanes),
    )


def lane_sums(vectors: Sequence[Any], lanes: int) -> Any:
    """[sum of vectors[0], sum of vectors[1], ...], by adding neighbours until one lane is left.

    len(vectors) must be a power of two and at least `lanes`.
    """
    values = list(vectors)
    if lanes == 1:
        return shuffle(values, range(len(values))) if len(values) > 1 else values[0]
    width = lanes
    groups = []
    for start in range(0, len(values), lanes):
        level = values[start : start + lanes]
        while len(level) > 1:
            level = [
                keep(
                    shuffle([a, b], range(0, 2 * width, 2))
                    + shuffle([a, b], range(1, 2 * width, 2)),
                    lanes,
                )
                for a, b in zip(level[::2], level[1::2], strict=True)
            ]
        groups.append(level[0])
    return groups[0] if len(groups) == 1 else shuffle(groups, range(len(vectors)))


def nearest_even(x: Any, lanes: int) -> Any:
    """x rounded to an integer, ties to even, still f32."""
    return T.call_llvm_pure_intrin(_f32(lanes), "llvm.rint", x)


def transpose(rows: Sequence[Any], lanes: int) -> list[Any]:
    """The columns of a square of `lanes` vectors, by exchanging ever smaller blocks."""
    values = list(rows)
    step = lanes // 2
    while step:
        low = [x if not x & step else lanes + x - step for x in range(lanes)]
        high = [x + step if not x & step else lanes + x for x in range(lanes)]
        for i in (i for i in range(lanes) if not i & step):
            pair = [values[i], values[i + step]]
            values[i] = keep(shuffle(pair, low), lanes)
            values[i + step] = keep(shuffle(pair, high), lanes)
        step //= 2
    return values


def across(value: Any, lanes: int, combine: Callable[[Any, Any], Any]) -> Any:
    """Reduce over the lanes; every lane holds the result."""
    step = lanes // 2
    while step:
        value = keep(combine(value, shuffle([value], [i ^ step for i in range(lanes)])), lanes)
        step //= 2
    return value


def constants(values: Sequence[float | int], dtype: str) -> Any:
    """A vector of literals."""
    make = tirx.FloatImm if dtype.startswith("float") else tirx.IntImm
    if len(values) == 1:
        return make(dtype, values[0])
    return shuffle([make(dtype, v) for v in values], range(len(values)))


def flat(buffer: Any, size: Any) -> Any:
    """A 1-D alias of a compact buffer of `size` elements."""
    return T.decl_buffer((size,), buffer.dtype, data=buffer.data, elem_offset=buffer.elem_offset)


def for_tokens(count: Any, parallel_from: int, body: Callable[[Any], None]) -> None:
    """Emit a loop over `count` tokens, parallel when there are at least `parallel_from` of them."""
    with T.If(count >= parallel_from):
        with T.Then():
            with T.parallel(0, count) as i:
                body(i)
        with T.Else():
            with T.serial(0, count) as i:
                body(i)


def _u32(value: int, lanes: int) -> Any:
    return splat(tirx.IntImm("uint32", value), lanes)


def _f32(lanes: int) -> str:
    return "float32" if lanes == 1 else f"float32x{lanes}"
