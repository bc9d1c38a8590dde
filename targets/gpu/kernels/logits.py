"""The kernels that change logits f32[b, V] in place before a token is sampled.

Entries (a token, a bias) are applied in order, one listed twice twice: each of some threads owns
the tokens of a residue class, walks over all entries and applies those of its own. Nothing is
quadratic, and no two threads touch one logit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qcc.quant_schemes.attributes import ROLE
from qcc.targets.gpu.kernels.tir import block, ceil_div, threads, when
from qcc.targets.gpu.limits import Limits
from qcc.targets.kernel import Arg, kernel

OWNERS = 1024  # threads that share the entries; all read all of them
WORD = 32  # tokens in a word of the bitmask
LOWEST = 0xFF7FFFFF - (
    1 << 32
)  # the bits of the lowest f32, which no decimal literal gives exactly


@cache
def logit_bias(role: str, width: int, limits: Limits) -> tirx.PrimFunc:
    """PrimFunc (logits, pos2seq i32[t], token_ids i32[t], bias f32[t]).

    logits[pos2seq[i], token_ids[i]] += bias[i].
    """
    b, t = tirx.Var("b", "int64"), tirx.Var("t", "int64")
    args: list[Arg] = [
        ("logits", (b, width), "float32"),
        ("pos2seq", (t,), "int32"),
        ("token_ids", (t,), "int32"),
        ("bias", (t,), "float32"),
    ]

    def body(logits: Any, pos2seq: Any, tokens: Any, bias: Any) -> None:
        def change(i: Any, token: Any) -> None:
            at = [pos2seq[i], token]
            T.buffer_store(logits, logits[tuple(at)] + bias[i], at)

        _owned(t, tokens, change, limits)

    return kernel("logit_bias", args, body, {ROLE: role}, outputs=len(args))


@cache
def penalty(role: str, width: int, limits: Limits) -> tirx.PrimFunc:
    """PrimFunc (logits, seq_ids i32[s], pos2seq, token_ids, token_cnt i32[t], penalties f32[s, 3]).

    With l the logit of entry i: l -= presence + token_cnt[i] * frequency, then l * repetition where
    l < 0, else l / repetition.
    """
    b, s, t = (tirx.Var(name, "int64") for name in "bst")
    args: list[Arg] = [
        ("logits", (b, width), "float32"),
        ("seq_ids", (s,), "int32"),
        ("pos2seq", (t,), "int32"),
        ("token_ids", (t,), "int32"),
        ("token_cnt", (t,), "int32"),
        ("penalties", (s, 3), "float32"),
    ]

    def body(
        logits: Any, seq_ids: Any, pos2seq: Any, tokens: Any, counts: Any, penalties: Any
    ) -> None:
        def change(i: Any, token: Any) -> None:
            seq = T.bind(pos2seq[i])
            at = [seq_ids[seq], token]
            fewer = penalties[seq, 0] + T.cast(counts[i], "float32") * penalties[seq, 1]
            lowered = T.bind(logits[tuple(at)] - fewer)
            repetition = T.bind(penalties[seq, 2])
            scaled = T.Select(lowered < 0, lowered * repetition, lowered / repetition)
            T.buffer_store(logits, scaled, at)

        _owned(t, tokens, change, limits)

    return kernel("penalty", args, body, {ROLE: role}, outputs=len(args))


@cache
def bitmask(role: str, width: int, limits: Limits) -> tirx.PrimFunc:
    """PrimFunc (logits, seq_ids i32[s], bitmask i32[b, ceil(width/32)]), a thread a token.

    Logit v of row r = seq_ids[i]: the lowest f32 where bit v%32 of bitmask[r, v//32] is 0.
    """
    b, s = tirx.Var("b", "int64"), tirx.Var("s", "int64")
    args: list[Arg] = [
        ("logits", (b, width), "float32"),
        ("seq_ids", (s,), "int32"),
        ("bitmask", (b, -(-width // WORD)), "int32"),
    ]

    def body(logits: Any, seq_ids: Any, mask: Any) -> None:
        size = limits.max_threads
        with block(s, "y") as i, block(ceil_div(width, size)) as group, threads(size) as thread:
            token = T.bind(group * size + thread)
            row = T.bind(seq_ids[i])

            def change() -> None:
                bits = T.bind(mask[row, token >> 5])
                with T.If((bits >> (token & (WORD - 1))) & 1 == 0), T.Then():
                    lowest = T.reinterpret("float32", T.int32(LOWEST))
                    T.buffer_store(logits, lowest, [row, token])

            when(token < width if width % size else True, change)

    return kernel("bitmask", args, body, {ROLE: role}, outputs=len(args))


def _owned(count: Any, tokens: Any, change: Callable[[Any, Any], None], limits: Limits) -> None:
    """Emit `change(i, tokens[i])` for every entry, in order, by the owner of its token."""
    size = min(limits.max_threads, OWNERS)
    with block(OWNERS // size) as group, threads(size) as thread:
        owner = T.bind(group * size + thread)
        with T.serial(0, T.cast(count, "int32")) as i:
            token = T.bind(tokens[i])
            when((token & (OWNERS - 1)) == owner, lambda: change(i, token))
