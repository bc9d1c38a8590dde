"""The scans of gated delta networks and of Mamba, vectorized over channels and columns of states.

compiler/models/delta_rule.py says what they compute. A column of a head's state needs no other
column, so a thread takes a block of columns through all tokens of a sequence: 128 rows of 64
numbers stay in its first cache, copied side by side, as rows of a state would use half of its sets.
Each token reads the block twice where the state is corrected: for what it knows of the key, then to
change it and answer the query.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qcc.quant_schemes.attributes import CAUSAL_CONV, DELTA_RULE, ROLE, SUM_RULE
from qcc.targets.cpu.isa import Isa
from qcc.targets.cpu.kernels import vectors as vx
from qcc.targets.cpu.kernels.tir import fma, lanes_from, parallel, serial, splat, zeros
from qcc.targets.kernel import i64, kernel

# Vectors side by side in a block: of columns of a state, of channels.
COLUMNS, CHANNELS = 4, 32
FEW = 8  # tokens for which a copy of the state does not pay
Shape = tuple[Any, ...]
Source = Callable[[Any], Any]  # channels -> a vector of them


def _block(columns: int, isa: Isa, most: int) -> tuple[int, int]:
    """(lanes, vectors) of a block of columns that divides them, of at most `most` vectors."""
    lanes = math.gcd(columns, isa.lanes)
    return lanes, next(n for n in range(most, 0, -1) if columns // lanes % n == 0)


def _segment(segments: Any, index: Any) -> list[Any]:
    """Place, first row and number of rows of a sequence, int64."""
    return [T.bind(T.cast(segments[index, i64(field)], "int64")) for field in range(3)]


def _silu(x: Any, lanes: int) -> Any:
    """x / (1 + exp(-x)); exp of what is never positive."""
    x = vx.keep(x, lanes)
    none, one = vx.splat(0.0, lanes), vx.splat(1.0, lanes)
    falling = vx.exp2(T.max(x, none - x) * vx.splat(-vx.LOG2_E, lanes), lanes)
    return x * T.Select(x < none, falling, one) / (one + falling)


@cache
def causal_conv(taps: int, channels: int, width: int, bias: bool, isa: Isa) -> tirx.PrimFunc:
    """PrimFunc (x f32[m, width], weight f32[taps * c], bias, segments, state, out f32[m, c])."""
    m, b, slots = (tirx.Var(name, "int64") for name in ("m", "b", "s"))
    lanes, vectors = _block(channels, isa, CHANNELS)
    blocks = channels // (lanes * vectors)

    def body(x: Any, weight: Any, *rest: Any) -> None:
        *added, segments, state, out = rest

        with parallel(b * blocks) as i:
            slot, first, count = _segment(segments, tirx.floordiv(i, blocks))
            block = T.bind(tirx.floormod(i, blocks) * (lanes * vectors))

            def past(place: int) -> Source:
                return lambda at: state[slot, i64(place), at]

            def own(row: Any) -> Source:
                return lambda at: x[first + row, at]

            def store(t: Any, rows: list[Source]) -> None:
                """Row t of the sequence, of the block's channels, from those that it sees."""
                with serial(vectors) as v:
                    channel = T.bind(block + v * lanes)
                    at = lanes_from(channel, lanes)
                    total = vx.keep(added[0][at] if bias else zeros(lanes), lanes)
                    for tap, row in enumerate(rows):
                        factor = weight[lanes_from(channel + tap * channels, lanes)]
                        total = vx.keep(vx.fma(factor, row(at), total, lanes), lanes)
                    T.buffer_store(out, _silu(total, lanes), [first + t, at])

            for t in range(taps - 1):
                with T.If(count > t), T.Then():
                    rows = [past(place) for place in range(t, taps - 1)]
                    store(i64(t), rows + [own(row) for row in range(t + 1)])
            with serial(T.max(count - (taps - 1), i64(0))) as t:
                store(t + (taps - 1), [own(t + tap) for tap in range(taps)])
            with serial(vectors) as v:
                at = lanes_from(T.bind(block + v * lanes), lanes)
                for place in range(taps - 1):
                    row = count + (place - taps + 1)
                    with T.If(row >= 0):
                        with T.Then():
                            T.buffer_store(state, x[first + row, at], [slot, i64(place), at])
                        with T.Else():
                            older = state[slot, T.min(count + place, i64(taps - 2)), at]
                            T.buffer_store(state, older, [slot, i64(place), at])

    args: list[tuple[str, Shape, str]] = [
        ("x", (m, width), "float32"),
        ("weight", (taps * channels,), "float32"),
        *([("bias", (channels,), "float32")] if bias else []),
        ("segments", (b, 3), "int32"),
        ("state", (slots, taps - 1, channels), "float32"),
        ("out", (m, channels), "float32"),
    ]
    return kernel(CAUSAL_CONV, args, body, {ROLE: CAUSAL_CONV}, outputs=2)


@cache
def delta_rule(
    key_heads: int, heads: int, dim: int, wide: int, corrects: bool, isa: Isa
) -> tirx.PrimFunc:
    """PrimFunc (qkv, norms, gates, segments, state f32[s, heads, dim, wide], out f32[m, v])."""
    m, b, slots = (tirx.Var(name, "int64") for name in ("m", "b", "s"))
    lanes, vectors = _block(wide, isa, COLUMNS)
    blocks, each, keys = wide // (lanes * vectors), heads // key_heads, key_heads * dim
    vtype = f"float32x{lanes}" if lanes > 1 else "float32"
    # Sums of as many rows go on side by side, so that no addition waits for the one before.
    rows = next(n for n in (2, 1) if dim % n == 0)

    def body(qkv: Any, norms: Any, gates: Any, segments: Any, state: Any, out: Any) -> None:
        with parallel(b * (heads * blocks)) as i:
            slot, first, count = _segment(segments, tirx.floordiv(i, heads * blocks))
            head = T.bind(tirx.floormod(tirx.floordiv(i, blocks), heads))
            key_head = T.bind(tirx.floordiv(head, each))
            column = T.bind(tirx.floormod(i, blocks) * (lanes * vectors))

            def at(v: int) -> Any:
                return lanes_from(column + v * lanes, lanes)

            def of_state(place: Any, v: int) -> tuple[Any, list[Any]]:
                return state, [slot, head, place, at(v)]

            def scan(where: Callable[[Any, int], tuple[Any, list[Any]]]) -> None:
                """All tokens; where(row of the state, vector) is (buffer, indices)."""
                sums = [[vx.Reg(lanes) for _ in range(vectors)] for _ in range(rows)]
                changes = [vx.Reg(lanes) for _ in range(vectors)]

                def add(row: int, v: int, number: Any, vector: Any) -> None:
                    sums[row][v].set(fma(splat(number, lanes), vector, sums[row][v].get(), vtype))

                def take(v: int) -> Any:
                    """A total; it is 0 again."""
                    parts = [sums[row][v] for row in range(rows)]
                    value = vx.keep(sum((p.get() for p in parts[1:]), parts[0].get()), lanes)
                    for part in parts:
                        part.set(zeros(lanes))
                    return value

                def look_up(token: Any) -> None:
                    """What the state knows of the token's key."""
                    with serial(dim // rows) as pair:
                        for row in range(rows):
                            place = pair * rows + row
                            key = T.bind(qkv[token, keys + key_head * dim + place])
                            for v in range(vectors):
                                buffer, indices = where(place, v)
                                add(row, v, key, buffer[tuple(indices)])

                for reg in (reg for row in sums for reg in row):
                    reg.set(zeros(lanes))
                with serial(count) as t:
                    token = T.bind(first + t)
                    decay = T.bind(gates[token, head])
                    norm = T.bind(norms[token, key_heads + key_head])
                    if corrects:
                        look_up(token)
                    strength = T.bind(gates[token, heads + head] * norm)
                    known = T.bind(decay * norm)
                    for v, change in enumerate(changes):
                        own = lanes_from(2 * keys + head * wide + column + v * lanes, lanes)
                        rest = qkv[token, own]
                        if corrects:
                            rest = rest - take(v) * splat(known, lanes)
                        change.set(rest * splat(strength, lanes))
                    with serial(dim // rows) as pair:
                        for row in range(rows):
                            place = pair * rows + row
                            key = T.bind(qkv[token, keys + key_head * dim + place])
                            query = T.bind(qkv[token, key_head * dim + place])
                            for v, change in enumerate(changes):
                                buffer, indices = where(place, v)
                                old = buffer[tuple(indices)] * splat(decay, lanes)
                                new = fma(splat(key, lanes), change.get(), old, vtype)
                                new = vx.keep(new, lanes)
                                T.buffer_store(buffer, new, indices)
                                add(row, v, query, new)
                    answer = T.bind(norms[token, key_head])
                    for v in range(vectors):
                        own = lanes_from(head * wide + column + v * lanes, lanes)
                        T.buffer_store(out, take(v) * splat(answer, lanes), [token, own])

            with T.If(count <= FEW):
                with T.Then():
                    scan(of_state)
                with T.Else():
                    held = T.alloc_buffer((dim * vectors * lanes,), "float32")

                    def of_held(place: Any, v: int) -> tuple[Any, list[Any]]:
                        return held, [lanes_from((place * vectors + v) * lanes, lanes)]

                    def copy(source: Any, target: Any) -> None:
                        with serial(dim) as place:
                            for v in range(vectors):
                                buffer, indices = source(place, v)
                                value = buffer[tuple(indices)]
                                buffer, indices = target(place, v)
                                T.buffer_store(buffer, value, indices)

                    copy(of_state, of_held)
                    scan(of_held)
                    copy(of_held, of_state)

    args: list[tuple[str, Shape, str]] = [
        ("qkv", (m, 2 * keys + heads * wide), "float32"),
        ("norms", (m, 2 * key_heads), "float32"),
        ("gates", (m, 2 * heads), "float32"),
        ("segments", (b, 3), "int32"),
        ("state", (slots, heads, dim, wide), "float32"),
        ("out", (m, heads * wide), "float32"),
    ]
    role = DELTA_RULE if corrects else SUM_RULE
    return kernel(role, args, body, {ROLE: role}, outputs=2)
