"""Where the keys and values of a sequence lie, and how a tile of them is staged as f32.

Staged are panels of 16 keys: keys [panels][d][16], values [16 * panels][d].
Pages are [num_pages, 2, ...], keys at index 0, laid out as attention_storage.py says; sequence b
owns the pages page_values[page_indptr[b] : page_indptr[b + 1]]. A slot is a place in them; without
a sliding window the slot of a key is its number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from qcc.targets.attention import aux_buffer, tensor
from qcc.targets.cpu.kernels import vectors as vx
from qcc.targets.cpu.kernels.attention import Tile
from qcc.targets.cpu.kernels.attention_storage import Storage, by_storage
from qcc.targets.spec import PAGE_SIZE, KVCacheConfig


@dataclass
class PagedKeys:
    """The pages argument with its index arrays."""

    config: KVCacheConfig
    batch: Any
    sliding: bool

    def declare(self) -> None:
        """pages, page_indptr, page_values, length_info i32[b] or [3, b], k_rope_pos_offset."""
        self.num_pages, values = T.int64(), T.int32()
        heads, dim = T.int32(), T.int32()
        self.pages = tensor("pages", (self.num_pages, 2, heads, PAGE_SIZE, dim), "float32")
        self.shape = heads, dim
        self.indptr = aux_buffer("page_indptr", (self.batch + 1,))
        self.values = aux_buffer("page_values", (values,))
        self.lengths = aux_buffer("length_info", (3, self.batch) if self.sliding else (self.batch,))
        self.k_position = aux_buffer("k_rope_pos_offset", (self.batch,))

    def enter(self) -> None:
        """At the start of the body."""
        heads, dim = self.shape
        self.words = T.bind(heads * dim)
        self.size = T.bind(self.num_pages * (2 * PAGE_SIZE) * vx.cast(self.words, "int64", 1))

    def select(self, b: Any) -> Any:
        """Fix the sequence; returns the number of its keys.

        With a sliding window length_info holds the length of the last page, where the window starts
        after the sinks, and the number of sinks: behind these the slot of a key is `skip` more.
        """
        begin, end = T.bind(self.indptr[b]), T.bind(self.indptr[b + 1])
        self.begin, self.count = begin, T.bind(end - begin)
        full = (end - begin - 1) * PAGE_SIZE
        self.skip: Any = 0
        if self.sliding:
            self.skip = T.bind(self.lengths[1, b] - self.lengths[2, b])
            count = full + self.lengths[0, b] - self.skip
        else:
            count = full + self.lengths[b]
        return vx.keep_int(T.Select(end > begin, count, 0))

    def first(self, slot: Any) -> Any:
        """The first slot of the page of one."""
        return T.shift_left(T.shift_right(slot, 4), 4)

    def page(self, number: Any) -> Any:
        """The sequence's page of a number; its last for those beyond."""
        last = self.count - 1
        return T.bind(vx.cast(self.values[self.begin + T.min(number, last)], "int64", 1))

    def stage(self, tile: Tile, head: Any, slot: Any, panels: Any, k: Any, v: Any) -> None:
        """Fill the first panels of k and v with a head's keys from a slot on, a page's first."""
        c, dim, lanes = self.config, self.config.head_dim, tile.dim_lanes

        def emit(storage: Storage) -> None:
            cells = storage.view(self.pages, self.size)
            words = vx.flat(self.pages, self.size)
            own = T.bind(head * (PAGE_SIZE * dim))
            with T.serial(0, panels) as p:
                page = self.page(T.shift_right(slot, 4) + p)
                base = T.bind(page * (2 * storage.half(c)) + own)
                of_scales = PAGE_SIZE * storage.scale(c) + head * PAGE_SIZE
                scales = T.bind(page * (2 * PAGE_SIZE * storage.words(c)) + of_scales)
                one = T.bind(vx.load(words, scales, PAGE_SIZE)) if storage.scaled else None
                with T.serial(0, dim) as d:
                    row = vx.load(cells, base + d * PAGE_SIZE, PAGE_SIZE)
                    value = row if one is None else row * one
                    vx.store(k, (p * dim + d) * PAGE_SIZE, value, PAGE_SIZE)
                base_v = T.bind(base + storage.half(c))
                with T.serial(0, PAGE_SIZE) as key:
                    at = T.bind((p * PAGE_SIZE + key) * dim)
                    where = scales + PAGE_SIZE * storage.words(c) + key
                    factor = vx.load(words, where, 1) if storage.scaled else None
                    with T.serial(0, dim // lanes) as i:
                        row = vx.load(cells, base_v + key * dim + i * lanes, lanes)
                        value = row if factor is None else row * vx.splat(factor, lanes)
                        vx.store(v, at + i * lanes, value, lanes)

        by_storage(c, self.words, emit)


class RaggedKeys:
    """k, v of the chunk itself, token by token; sequence b at kv_indptr[b] : kv_indptr[b + 1]."""

    k_position: Any = None  # another argument of the kernel, not next to the others
    skip: Any = 0

    def __init__(self, config: KVCacheConfig, batch: Any) -> None:
        self.config, self.batch = config, batch

    def declare(self) -> None:
        self.total = T.int32()
        heads, dim = T.int32(), T.int32()
        self.arrays = [tensor(name, (self.total, heads, dim), "float32") for name in ("k", "v")]
        self.shape = heads, dim
        self.indptr = aux_buffer("kv_indptr", (self.batch + 1,))

    def enter(self) -> None:
        heads, dim = self.shape
        self.words = T.bind(heads * dim)
        self.size = T.bind(vx.cast(self.total, "int64", 1) * self.words)

    def select(self, b: Any) -> Any:
        self.begin = T.bind(self.indptr[b])
        self.count = T.bind(self.indptr[b + 1] - self.begin)
        return self.count

    def first(self, slot: Any) -> Any:
        return slot

    def stage(self, tile: Tile, head: Any, slot: Any, panels: Any, k: Any, v: Any) -> None:
        """As PagedKeys.stage; keys beyond the last repeat it."""
        c, dim, lanes = self.config, self.config.head_dim, tile.dim_lanes
        square = T.alloc_buffer((PAGE_SIZE * dim,), "float32")  # the keys of a panel, row by row

        def rows(which: int, p: Any, target: Any, first: Any) -> None:
            """target[first + key, :] <- the numbers of 16 tokens."""

            def emit(storage: Storage) -> None:
                cells = storage.view(self.arrays[which], self.size)
                words = vx.flat(self.arrays[which], self.size)
                with T.serial(0, PAGE_SIZE) as key:
                    place = T.min(slot + p * PAGE_SIZE + key, self.count - 1)
                    token = T.bind(vx.cast(self.begin + place, "int64", 1))
                    base = T.bind(token * storage.token(c) + head * dim)
                    scale: Any = None
                    if storage.scaled:
                        at = token * storage.words(c) + storage.scale(c) + head
                        scale = T.bind(vx.splat(vx.load(words, at, 1), lanes))
                    with T.serial(0, dim // lanes) as i:
                        value = vx.load(cells, base + i * lanes, lanes)
                        value = value if scale is None else value * scale
                        vx.store(target, (first + key) * dim + i * lanes, value, lanes)

            by_storage(c, self.words, emit)

        with T.serial(0, panels) as p:
            rows(1, p, v, p * PAGE_SIZE)
            rows(0, p, square, 0)
            self._columns(tile, square, k, T.bind(p * (dim * PAGE_SIZE)))

    def _columns(self, tile: Tile, square: Any, k: Any, panel: Any) -> None:
        """k[panel + d * 16 + key] <- square[key, d]."""
        dim, lanes = self.config.head_dim, tile.dim_lanes
        if lanes < tile.lanes:
            with T.serial(0, PAGE_SIZE) as key:
                with T.serial(0, dim) as d:
                    value = vx.load(square, key * dim + d, 1)
                    vx.store(k, panel + d * PAGE_SIZE + key, value, 1)
            return
        with T.serial(0, PAGE_SIZE // lanes) as block:
            key = T.bind(block * lanes)
            with T.serial(0, dim // lanes) as i:
                found = [
                    vx.keep(vx.load(square, (key + j) * dim + i * lanes, lanes), lanes)
                    for j in range(lanes)
                ]
                for j, column in enumerate(vx.transpose(found, lanes)):
                    vx.store(k, panel + (i * lanes + j) * PAGE_SIZE + key, column, lanes)
