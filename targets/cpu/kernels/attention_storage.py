"""How keys and values lie in memory: as f32, f16, or int8 codes with a scale for each of them.

TVM's cache is told that everything is f32: a token's keys, and its values, are `words` numbers of 4
bytes. Only the kernels know what is in them. With hkv heads of d numbers:
  a token, from split_rotary on:  [hkv][d] numbers, then the scales f32[hkv] of int8
  half a page, keys:              [hkv][d][16] numbers, then f32[hkv][16]
  half a page, values:            [hkv][16][d] numbers, then f32[hkv][16]
A key in int8 is code * scale with scale = max |k| / 127 of its token and head; values likewise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from qcc.targets.cpu.kernels import vectors as vx
from qcc.targets.spec import PAGE_SIZE, KVCacheConfig, KVStorage

WORD = 4  # bytes
TOP_CODE = 127  # of int8, on both sides of 0


@dataclass(frozen=True)
class Storage:
    """One way to keep numbers: their dtype and its bytes, and whether they have scales."""

    name: str
    dtype: str
    size: int
    scaled: bool = False

    def words(self, c: KVCacheConfig) -> int:
        """Words of a token's keys."""
        return c.num_key_value_heads * (c.head_dim * self.size // WORD + self.scaled)

    def half(self, c: KVCacheConfig) -> int:
        """Elements of half a page, its scales counted as elements too."""
        return PAGE_SIZE * self.token(c)

    def token(self, c: KVCacheConfig) -> int:
        """Elements of a token's keys, scales counted as elements too."""
        return self.words(c) * WORD // self.size

    def scale(self, c: KVCacheConfig) -> int:
        """The word of a token's keys where its scales begin."""
        return c.num_key_value_heads * c.head_dim * self.size // WORD

    def view(self, buffer: Any, words: Any) -> Any:
        """The memory of an f32 buffer of `words` words as elements of this storage."""
        return T.decl_buffer((words * (WORD // self.size),), self.dtype, data=buffer.data)

    def declared(self, c: KVCacheConfig) -> KVStorage:
        """What TVM is told: heads of one word each, query heads being what is left of qkv."""
        words = self.words(c)
        total = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
        return KVStorage(self.name, total - 2 * words, words, 1)


F32 = Storage("f32", "float32", 4)
STORAGES = (F32, Storage("f16", "float16", 2), Storage("int8", "int8", 1, scaled=True))


def storages(c: KVCacheConfig) -> tuple[Storage, ...]:
    """Those that can be told apart by their words: at head_dim 4 int8 with scales is as f16."""
    return tuple(s for s in STORAGES if not s.scaled or c.head_dim > WORD)


def by_storage(c: KVCacheConfig, words: Any, emit: Callable[[Storage], None]) -> None:
    """Emit `emit` for each storage, under the condition that a token's keys have its `words`."""

    def branch(choices: tuple[Storage, ...]) -> None:
        if len(choices) == 1:
            emit(choices[0])
            return
        with T.If(words == choices[0].words(c)):
            with T.Then():
                emit(choices[0])
            with T.Else():
                branch(choices[1:])

    branch(storages(c))


def emit_row(
    c: KVCacheConfig, storage: Storage, lanes: int, source: Any, target: Any, token: Any, head: Any
) -> None:
    """Store a head's numbers, f32[d] in `source`, into a token of `target` f32[n * words]."""
    words = storage.words(c)
    out = storage.view(target, T.Cast("int64", target.shape[0]))
    base = T.bind(token * storage.token(c) + head * c.head_dim)
    if not storage.scaled:
        for d in range(0, c.head_dim, lanes):
            vx.store(out, base + d, vx.load(source, d, lanes), lanes)
        return
    zero = vx.splat(0.0, lanes)
    top = vx.Reg(lanes, zero)
    for d in range(0, c.head_dim, lanes):
        x = T.bind(vx.load(source, d, lanes))
        top.set(T.max(top.get(), T.max(x, zero - x)))
    top.set(vx.across(T.bind(top.get()), lanes, T.max))
    scale = vx.keep(vx.load(top.buffer, 0, 1) / vx.splat(float(TOP_CODE), 1), 1)
    vx.store(target, token * words + storage.scale(c) + head, scale, 1)
    # A row of zeros has scale 0: any divisor will do.
    divisor = vx.keep(T.Select(scale > vx.splat(0.0, 1), scale, vx.splat(1.0, 1)), 1)
    for d in range(0, c.head_dim, lanes):
        ratio = vx.load(source, d, lanes) / vx.splat(divisor, lanes)
        code = vx.cast(vx.nearest_even(ratio, lanes), "int8", lanes)
        T.buffer_store(out, code, [vx.index(base + d, lanes)])
