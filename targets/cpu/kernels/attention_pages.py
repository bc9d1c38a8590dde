"""Tokens into pages, out of them and from page to page, as attention_storage.py lays them out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from qcc.targets.attention import aux_buffer, kernel, tensor
from qcc.targets.cpu.kernels import vectors as vx
from qcc.targets.cpu.kernels.attention import when
from qcc.targets.cpu.kernels.attention_storage import Storage, by_storage
from qcc.targets.spec import PAGE_SIZE, KVCacheConfig

_PARALLEL_TOKENS = 8  # fewer are not worth waking the threads


def transpose_append(config: KVCacheConfig) -> Any:
    """Put k, v of n tokens into their slots: page * 16 + place, -1 for a token to drop."""
    with kernel("kv_cache_transpose_append") as build:
        n, places = T.int64(), _Places(config)
        places.declare()
        new = [tensor(name, (n, *places.shape), "float32") for name in ("k_data", "v_data")]
        slots = aux_buffer("position_map", (n,))
        with build.body():
            places.enter()

            def token(i: Any) -> None:
                slot = T.bind(vx.cast(slots[i], "int64", 1))
                with when(slot >= 0):

                    def emit(storage: Storage) -> None:
                        row = places.token(storage, new, n, i)
                        places.copy(storage, row, places.slot(storage, slot))

                    by_storage(config, places.words, emit)

            vx.for_tokens(n, _PARALLEL_TOKENS, token)
    return build.result()


def debug_get_kv(config: KVCacheConfig) -> Any:
    """k_data, v_data [layers, n, ...] of a layer <- what the slots hold, as it is stored."""
    with kernel("kv_cache_debug_get_kv") as build:
        n, layers, places = T.int64(), T.int64(), _Places(config)
        places.declare()
        slots = aux_buffer("position_map", (n,))
        found = [tensor(name, (layers, n, *places.shape), "float32") for name in ("k", "v")]
        layer = T.arg("layer_id", T.int64())
        with build.body():
            places.enter()
            with T.serial(0, n) as i:
                slot = T.bind(vx.cast(slots[i], "int64", 1))

                def emit(storage: Storage) -> None:
                    row = places.token(storage, found, layers * n, layer * n + i)
                    places.copy(storage, places.slot(storage, slot), row)

                by_storage(config, places.words, emit)
    return build.result()


def compact_copy(config: KVCacheConfig) -> Any:
    """Move tokens from slots to slots of the same sequence, in the order that is given."""
    with kernel("kv_cache_compact_copy") as build:
        total, places = T.int32(), _Places(config)
        places.declare()
        batch = T.int32()
        indptr = aux_buffer("copy_length_indptr", (batch + 1,))
        moves = aux_buffer("copy_src_dst_pos", (2, total))
        T.arg("batch_size", batch)
        with build.body():
            places.enter()
            with T.serial(0, indptr[batch]) as i:
                source, target = (vx.cast(moves[which, i], "int64", 1) for which in range(2))
                source, target = T.bind(source), T.bind(target)

                def emit(storage: Storage) -> None:
                    places.copy(storage, places.slot(storage, source), places.slot(storage, target))

                by_storage(config, places.words, emit)
    return build.result()


def copy_single_page(config: KVCacheConfig) -> Any:
    """Copy a page; what it holds beyond `copy_length` tokens is no one's, so it may come along."""
    with kernel("kv_cache_copy_single_page") as build:
        places = _Places(config)
        places.declare()
        source, target = T.arg("source", T.int64()), T.arg("target", T.int64())
        T.arg("copy_length", T.int64())
        with build.body():
            places.enter()
            words = vx.flat(places.pages, places.size)
            page = T.bind(places.words * (2 * PAGE_SIZE))
            with T.serial(0, places.words * 2) as i:
                value = vx.load(words, source * page + i * PAGE_SIZE, PAGE_SIZE)
                vx.store(words, target * page + i * PAGE_SIZE, value, PAGE_SIZE)
    return build.result()


@dataclass(frozen=True)
class _Row:
    """A token's keys and values: elements and words of each, and where a head's are in them.

    `at(which, head, d)` is the element of a number (which: 0 keys, 1 values), `scale(which, head)`
    the word of a scale.
    """

    cells: tuple[Any, Any]
    words: tuple[Any, Any]
    at: Callable[[int, Any, Any], Any]
    scale: Callable[[int, Any], Any]


class _Places:
    """The pages argument, and the rows of tokens in it and in other arrays."""

    def __init__(self, config: KVCacheConfig) -> None:
        self.config = config

    def declare(self) -> None:
        self.num_pages = T.int64()
        heads, dim = T.int64(), T.int64()
        self.shape = heads, dim
        self.pages = tensor("pages", (self.num_pages, 2, heads, PAGE_SIZE, dim), "float32")

    def enter(self) -> None:
        heads, dim = self.shape
        self.words = T.bind(heads * dim)
        self.size = T.bind(self.num_pages * (2 * PAGE_SIZE) * self.words)

    def token(self, storage: Storage, buffers: list[Any], tokens: Any, number: Any) -> _Row:
        """A token of two arrays of so many tokens."""
        c, size = self.config, T.bind(tokens * self.words)
        base, word = T.bind(number * storage.token(c)), T.bind(number * storage.words(c))
        k, v = buffers
        return _Row(
            (storage.view(k, size), storage.view(v, size)),
            (vx.flat(k, size), vx.flat(v, size)),
            lambda which, head, d: base + head * c.head_dim + d,
            lambda which, head: word + storage.scale(c) + head,
        )

    def slot(self, storage: Storage, slot: Any) -> _Row:
        """A token of the pages."""
        c, half = self.config, storage.half(self.config)
        page = T.bind(T.shift_right(slot, T.int64(4)))
        place = T.bind(T.bitwise_and(slot, T.int64(PAGE_SIZE - 1)))
        cells, words = storage.view(self.pages, self.size), vx.flat(self.pages, self.size)
        base = T.bind(page * (2 * half))
        word = T.bind(page * (2 * PAGE_SIZE * storage.words(c)) + PAGE_SIZE * storage.scale(c))

        def at(which: int, head: Any, d: Any) -> Any:
            inside = d * PAGE_SIZE + place if which == 0 else place * c.head_dim + d
            return base + which * half + head * (PAGE_SIZE * c.head_dim) + inside

        return _Row(
            (cells, cells),
            (words, words),
            at,
            lambda which, head: (
                word + which * PAGE_SIZE * storage.words(c) + head * PAGE_SIZE + place
            ),
        )

    def copy(self, storage: Storage, source: _Row, target: _Row) -> None:
        """Copy a token's keys and values, bit by bit."""
        c = self.config
        with T.serial(0, c.num_key_value_heads) as head:
            for which in range(2):
                with T.serial(0, c.head_dim) as d:
                    value = source.cells[which][source.at(which, head, d)]
                    T.buffer_store(target.cells[which], value, [target.at(which, head, d)])
                if storage.scaled:
                    value = source.words[which][source.scale(which, head)]
                    T.buffer_store(target.words[which], value, [target.scale(which, head)])
