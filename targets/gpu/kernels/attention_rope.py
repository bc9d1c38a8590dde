"""Rotary embeddings: the table of cosines and sines, the split of q, k, v, and rotation by place.

Pairs are (i, i + rotary_dim / 2); dimensions from rotary_dim on pass through. With full attention
q and k are rotated once, from a table. With a sliding window the cache stores k unrotated, and the
attention kernels rotate both by positions in the cache; `Rotation` emits that code.
Cosines and sines are polynomials of an exact fraction of a turn: those of a GPU are good to 2^-11.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from qcc.targets.attention import aux_buffer, kernel, tensor
from qcc.targets.gpu.kernels.attention_func import Plan, ceil_div, f32, grid, keep, shared, when

# sin and cos on [-pi/4, pi/4]: odd and even minimax polynomials (Cephes sinf, cosf).
_SIN_POLY = (-1.6666654611e-1, 8.3321608736e-3, -1.9515295891e-4)
_COS_POLY = (4.166664568298827e-2, -1.388731625493765e-3, 2.443315711809948e-5)
_TURNS = round(2**64 / (2 * math.pi))  # of a radian, in units of 2^-64


def u32(value: int) -> Any:
    return tirx.IntImm("uint32", value)


def cos_sin(turns: Any, plan: Plan | None = None) -> tuple[Any, Any]:
    """cos and sin of an angle given as uint32 in units of 2^-32 turns; absolute error below 2e-7.

    A scalar, or with a plan a vector.
    """
    lanes = plan.lanes if plan else 1

    def typed(dtype: str) -> str:
        return dtype if lanes == 1 else f"{dtype}x{lanes}"

    def splat(value: Any) -> Any:
        value = f32(value) if isinstance(value, float) else value
        return value if lanes == 1 else T.broadcast(value, lanes)

    def named(value: Any, dtype: str = "float32") -> Any:
        return keep(value, typed(dtype))

    quadrant = named(T.shift_right(turns + splat(u32(1 << 29)), splat(u32(30))), "uint32")
    rest = T.reinterpret(typed("int32"), turns - T.shift_left(quadrant, splat(u32(30))))
    angle = named(T.Cast(typed("float32"), rest) * splat(2 * math.pi / 2**32))
    square = named(angle * angle)

    def horner(coefficients: tuple[float, ...]) -> Any:
        value = splat(coefficients[-1])
        for c in reversed(coefficients[:-1]):
            value = named(value * square + splat(c))
        return value

    sine = named(horner(_SIN_POLY) * square * angle + angle)
    cosine = named(horner(_COS_POLY) * square * square + (splat(1.0) - splat(0.5) * square))
    # cos, sin at quadrant 0: (c, s); 1: (-s, c); 2: (-c, -s); 3: (s, -c).
    even = T.bitwise_and(quadrant, splat(u32(1))) == splat(u32(0))
    a, b = named(T.Select(even, cosine, sine)), named(T.Select(even, sine, cosine))
    positive_a = T.bitwise_and(quadrant + splat(u32(1)), splat(u32(2))) == splat(u32(0))
    positive_b = T.bitwise_and(quadrant, splat(u32(2))) == splat(u32(0))
    zero = splat(0.0)
    return named(T.Select(positive_a, a, zero - a)), named(T.Select(positive_b, b, zero - b))


def _turns_of(angle: Any) -> Any:
    """An f32 angle of 0 to 2^22 radians as uint32 in units of 2^-32 turns.

    With a whole m < 2^24 and s > 0 the angle is m * 2^-s. Of m / (2 pi), in units of 2^-64, the
    bits from 32 + s on are wanted. Digits are of 8 bits: no column of the product overflows.
    """
    bits = keep(T.reinterpret("uint32", angle), "uint32")
    exponent = keep(T.shift_right(bits, u32(23)), "uint32")
    m = keep(T.bitwise_or(T.bitwise_and(bits, u32((1 << 23) - 1)), u32(1 << 23)), "uint32")
    shift = keep(u32(150) - exponent, "uint32")
    digits = [T.bitwise_and(T.shift_right(m, u32(8 * i)), u32(255)) for i in range(3)]
    factor = [(_TURNS >> (8 * i)) & 255 for i in range(8)]
    words: list[Any] = [u32(0)] * 3
    carry: Any = u32(0)
    for i in range(11):
        column = carry
        for j, digit in enumerate(digits):
            if 0 <= i - j < len(factor):
                column = column + digit * u32(factor[i - j])
        column = keep(column, "uint32")
        low = T.shift_left(T.bitwise_and(column, u32(255)), u32(8 * (i % 4)))
        words[i // 4] = keep(words[i // 4] + low, "uint32")
        carry = T.shift_right(column, u32(8))
    _, middle, high = words
    near = T.bitwise_or(
        T.shift_right(middle, T.min(shift, u32(31))),
        T.shift_left(high, u32(32) - T.max(T.min(shift, u32(31)), u32(1))),
    )
    far = T.shift_right(high, T.min(T.max(shift, u32(32)) - u32(32), u32(31)))
    return keep(T.Select(shift < u32(32), near, far), "uint32")


def rope_table(plan: Plan) -> Any:
    """inv_freq f32[r/2] -> table f32[max_positions, r]: first the cosines, then the sines.

    The angle is f32(position) * inv_freq in f32, as Hugging Face computes it; from there on exact.
    """
    c, half = plan.config, plan.config.rotary_dim // 2
    assert c.max_positions * max(c.inv_freq, default=0) < 1 << 22, c
    threads = plan.threads(half)
    together = ceil_div(c.max_positions, plan.limits.max_grid)  # positions of a workgroup
    with kernel("rope_table") as build:
        inv_freq = tensor("inv_freq", (half,), "float32")
        table = tensor("table", (c.max_positions, 2 * half), "float32")
        with build.body():
            blocks = ceil_div(c.max_positions, together)
            with grid(threads, ceil_div(half, threads), blocks) as (block, first, thread):
                i = T.bind(block * threads + thread)
                with T.serial(0, together) as step:
                    position = T.bind(first * together + step)
                    with when(T.bitwise_and(i < half, position < c.max_positions)):
                        angle = keep(T.Cast("float32", position) * inv_freq[i])
                        for part, value in enumerate(cos_sin(_turns_of(angle))):
                            value = value * f32(float(c.rope_attention_factor))
                            T.buffer_store(table, value, [position, part * half + i])
    return build.result()


def split_rotary(plan: Plan, with_table: bool) -> Any:
    """qkv [n, hq + 2 hkv, d], positions i32[n] -> q, k, v; rotated if there is a table.

    The last argument is the table f32[max_positions, r], else the cache's flag apply_rope, unused.
    """
    c, chunks = plan.config, plan.chunks
    half = c.rotary_dim // 2 // plan.lanes if with_table else 0
    heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
    ends = [heads, heads + kv_heads, heads + 2 * kv_heads]  # of q, k, v
    threads = plan.threads(ends[-1] * chunks)
    with kernel("split_rotary" if with_table else "split_qkv") as build:
        n = T.int32()
        qkv = tensor("qkv", (n, ends[-1], c.head_dim), c.dtype)
        positions = aux_buffer("positions", (n,))
        shapes = [(n, count, c.head_dim) for count in (heads, kv_heads, kv_heads)]
        outputs = [tensor(f"out_{name}", s, c.dtype) for name, s in zip("qkv", shapes, strict=True)]
        if with_table:
            table = tensor("table", (c.max_positions, c.rotary_dim), "float32")
        else:
            T.arg("apply_rope", T.int32())
        with build.body():
            source = plan.vectors(qkv, n * (ends[-1] * c.head_dim))
            targets = [
                plan.vectors(buffer, n * (count * c.head_dim))
                for buffer, (_, count, _) in zip(outputs, shapes, strict=True)
            ]
            if with_table:
                angles = plan.vectors(table, c.max_positions * c.rotary_dim)
            blocks = ceil_div(ends[-1] * chunks, threads)
            with grid(threads, blocks, n) as (block, token, thread):
                i = T.bind(block * threads + thread)
                head, chunk = T.bind(i // chunks), T.bind(i % chunks)
                at = T.bind(token * (ends[-1] * chunks) + i)

                def turned() -> Any:
                    """The vector, rotated with its partner."""
                    own = plan.load(source, at)
                    if not half:
                        return own
                    first = chunk < half
                    value = T.alloc_buffer((1,), plan.typed("float32"), scope="local")
                    T.buffer_store(value, own, [0])
                    with when(chunk < 2 * half):
                        pair = T.bind(T.Select(first, chunk, chunk - half))
                        row = T.bind(positions[token] * (2 * half) + pair)
                        other = plan.load(source, T.Select(first, at + half, at - half))
                        sign = plan.splat(T.Select(first, f32(-1.0), f32(1.0)))
                        sine = angles[row + half] * sign
                        T.buffer_store(value, own * angles[row] + other * sine, [0])
                    return value[0]

                begin = 0
                for which, (target, end) in enumerate(zip(targets, ends, strict=True)):
                    with when(T.bitwise_and(head >= begin, head < end)):
                        value = plan.load(source, at) if which == 2 else turned()
                        where = token * ((end - begin) * chunks) + i - begin * chunks
                        plan.store(target, where, value)
                    begin = end
    return build.result()


class Rotation:
    """Emits rotations by a position in the cache, its cosines computed on the spot.

    An angle is kept as a fraction of a turn in units of 2^-32: position * frequency is then an
    integer product that wraps, exact to one unit for positions below 2^16 (`low` has 16 more bits).
    """

    def __init__(self, plan: Plan) -> None:
        c = plan.config
        self.plan, self.half = plan, c.rotary_dim // 2 // plan.lanes  # in vectors
        self.scale = float(c.rope_attention_factor) ** 2  # of q and k, both applied to q
        inv_freq = np.array(c.inv_freq, np.float32).astype(np.float64).tolist()
        self.turns = [round(math.modf(f / (2 * math.pi))[0] * 2**48) for f in inv_freq]

    @property
    def bytes(self) -> int:
        """Of workgroup memory."""
        return 8 * self.half * self.plan.lanes

    def prepare(self, thread: Any) -> None:
        """At the start of a kernel, before a barrier: the frequencies into workgroup memory."""
        if not self.half:
            return
        plan = self.plan
        self.high, self.low = (shared(self.half, plan.typed("uint32")) for _ in range(2))
        for i in range(self.half):
            parts = self.turns[i * plan.lanes : (i + 1) * plan.lanes]
            with when(thread == i % 32):
                T.buffer_store(self.high, plan.literals([f >> 16 & 0xFFFFFFFF for f in parts]), [i])
                T.buffer_store(self.low, plan.literals([f & 0xFFFF for f in parts]), [i])

    def angle(self, position: Any, i: Any) -> tuple[Any, Any]:
        """cos and sin of the i-th vector of pairs at an i32 position below 2^16."""
        plan = self.plan
        p = plan.splat(T.Cast("uint32", position))
        low = T.shift_right(p * self.low[i], plan.splat(u32(16)))
        return cos_sin(keep(p * self.high[i] + low, plan.typed("uint32")), plan)

    @property
    def steps(self) -> int:
        """Of a head: its pairs of vectors, and the vectors that pass through."""
        return self.plan.chunks - self.half

    def step(
        self,
        i: Any,
        position: Any,
        load: Callable[[Any], Any],
        store: Callable[[Any, Any], None],
    ) -> None:
        """Rotate pair i of a head: load(chunk) reads a vector as f32, store(chunk, value) takes it.

        From `half` on i stands for a vector that passes through.
        """
        half = self.half
        if half:
            with when(i < half):
                cosine, sine = self.angle(position, i)
                a, b = T.bind(load(i)), T.bind(load(i + half))
                store(i, a * cosine - b * sine)
                store(i + half, b * cosine + a * sine)
        if self.steps > half:
            with when(i >= half):
                store(i + half, load(i + half))
