"""The two functions of a layer with states that carry them from token to token.

They name no device: each is one independent scan for every sequence and channel. A target may put
kernels in their place, by `qcc.role`. Sequences stand one behind the other: `segments` int32[b, 3]
has each one's place among the states, its first row and its number of rows. The states are written
in place. Shapes: m rows, b sequences.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qcc.compiler.recurrent_config import DeltaConfig
from qcc.compiler.row_kernel import i64, local, row_kernel
from qcc.quant_schemes.attributes import CAUSAL_CONV, DELTA_RULE, SUM_RULE


def segment(segments: Any, index: Any) -> list[Any]:
    """Place, first row and number of rows of a sequence, int64."""
    return [T.bind(T.cast(segments[index, i64(field)], "int64")) for field in range(3)]


@cache
def causal_conv_func(sizes: DeltaConfig, width: int, dtype: str) -> tirx.PrimFunc:
    """PrimFunc (x [m, width], weight [taps * c], segments, state f32[s, taps - 1, c]) -> f32[m, c].

    Row t of a sequence becomes silu(sum of weight[i, :] * x[t - taps + 1 + i, :c]); rows before its
    first are those of the state, which then holds the last ones. x and the weight have `dtype`.
    With sizes.conv_bias there is bias [c] behind the weight, for the sum to begin with.
    """
    m, b, slots = (tirx.Var(name, "int64") for name in ("m", "b", "s"))
    taps, channels = sizes.conv_kernel, i64(sizes.channels)

    def body(row: Any, x: Any, weight: Any, *rest: Any) -> None:
        *bias, segments, state, out = rest
        channel = T.bind(row % channels)
        slot, first, count = segment(segments, row // channels)

        def at(t: Any) -> Any:
            """The input at row t of the sequence, -taps < t."""
            past = state[slot, T.min(t + (taps - 1), i64(taps - 2)), channel]
            return T.if_then_else(
                t < 0, past, T.cast(x[first + T.max(t, i64(0)), channel], "float32")
            )

        with T.serial(i64(0), count) as t:
            total = local("float32", T.cast(bias[0][channel], "float32") if bias else 0.0)
            for tap in range(taps):
                factor = T.cast(weight[tap * channels + channel], "float32")
                T.buffer_store(total, total[0] + factor * at(t + (tap - taps + 1)), [0])
            silu = total[0] / (T.float32(1) + T.exp(-total[0]))
            T.buffer_store(out, silu, [first + t, channel])
        for place in range(taps - 1):  # reads what is behind `place` only
            T.buffer_store(state, at(count + (place - taps + 1)), [slot, i64(place), channel])

    inputs = [
        ("x", (m, i64(width)), dtype),
        ("weight", (i64(taps * sizes.channels),), dtype),
        *([("bias", (channels,), dtype)] if sizes.conv_bias else []),
        ("segments", (b, i64(3)), "int32"),
    ]
    outputs = [
        ("state", (slots, i64(taps - 1), channels), "float32"),
        ("out", (m, channels), "float32"),
    ]
    return row_kernel(CAUSAL_CONV, b * channels, inputs, outputs, body, scattered=True)


@cache
def delta_rule_func(sizes: DeltaConfig) -> tirx.PrimFunc:
    """PrimFunc (qkv f32[m, c], norms, gates, segments, state f32[s, heads, dk, dv]) -> f32[m, v].

    For each token of a sequence and each value head, with that head's state S (arXiv 2412.06464):
    S = decay S; S = S + k outer beta (v - S' k); o = S' q. Here q and k are those of qkv times
    norms f32[m, 2 * key heads] (of queries, then keys); gates f32[m, 2 * value heads] has every
    head's decay, then every head's beta. Unless sizes.corrects, S' k is taken for 0.
    """
    m, b, slots = (tirx.Var(name, "int64") for name in ("m", "b", "s"))
    heads, dim, wide = sizes.value_heads, i64(sizes.key_head_dim), i64(sizes.value_head_dim)
    each = sizes.value_heads // sizes.key_heads

    def body(row: Any, qkv: Any, norms: Any, gates: Any, segments: Any, *written: Any) -> None:
        state, out = written
        column = T.bind(row % wide)
        head = T.bind(row // wide % heads)
        key_head = T.bind(head // each)
        slot, first, count = segment(segments, row // (wide * heads))
        with T.serial(i64(0), count) as t:
            token = T.bind(first + t)
            decay = T.bind(gates[token, head])
            known, found = local("float32", 0.0), local("float32", 0.0)
            if sizes.corrects:
                with T.serial(i64(0), dim) as i:
                    key = qkv[token, sizes.keys + key_head * dim + i]
                    T.buffer_store(known, known[0] + key * state[slot, head, i, column], [0])
            norm = T.bind(norms[token, sizes.key_heads + key_head])
            value = qkv[token, 2 * sizes.keys + head * wide + column]
            rest = value - known[0] * decay * norm if sizes.corrects else value
            change = T.bind(rest * gates[token, heads + head] * norm)
            with T.serial(i64(0), dim) as i:
                key = qkv[token, sizes.keys + key_head * dim + i]
                new = T.bind(state[slot, head, i, column] * decay + key * change)
                T.buffer_store(state, new, [slot, head, i, column])
                query = qkv[token, key_head * dim + i]
                T.buffer_store(found, found[0] + query * new, [0])
            T.buffer_store(out, found[0] * norms[token, key_head], [token, head * wide + column])

    inputs = [
        ("qkv", (m, i64(sizes.channels)), "float32"),
        ("norms", (m, i64(2 * sizes.key_heads)), "float32"),
        ("gates", (m, i64(2 * heads)), "float32"),
        ("segments", (b, i64(3)), "int32"),
    ]
    outputs = [
        ("state", (slots, i64(heads), dim, wide), "float32"),
        ("out", (m, i64(sizes.values)), "float32"),
    ]
    role = DELTA_RULE if sizes.corrects else SUM_RULE
    return row_kernel(role, b * (heads * wide), inputs, outputs, body, scattered=True)
