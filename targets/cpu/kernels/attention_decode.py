"""Attention of one new token a sequence against cached pages.

A task is a part of a sequence's pages, for all heads: so keys and values are read once and in the
order in which they lie, and a long context is split among the threads even where there are few
heads. For each tile of pages and each kv head, lanes hold the keys of a page while the scores are
formed, and the head's numbers while the values are summed. The parts are merged at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from qcc.targets.attention import aux_buffer, kernel, rows_of, tensor
from qcc.targets.cpu.kernels import vectors as vx
from qcc.targets.cpu.kernels.attention import (
    MASKED,
    NO_KEY,
    ScoreRule,
    Tile,
    emit_carried,
    when,
)
from qcc.targets.cpu.kernels.attention_keys import PagedKeys
from qcc.targets.cpu.kernels.attention_storage import Storage, by_storage
from qcc.targets.cpu.kernels.rope import Rotation
from qcc.targets.spec import PAGE_SIZE, KVCacheConfig

PAGES = 4  # of a tile
KEYS = PAGES * PAGE_SIZE
MAX_PARTS = 8  # of a sequence
TASKS = 16  # from so many sequences on none is split
HEADS = 8  # of a group at once, at most
_PARALLEL_SEQUENCES = 8  # fewer are not worth waking the threads to merge


def decode_kernel(config: KVCacheConfig, tile: Tile, sliding: bool) -> Any:
    """The PrimFunc of the cache's decode slot: q [b, hq, d] -> output [b, hq, d], lse [b, hq]."""
    return _Decode(config, tile, sliding).build()


class _Decode:
    def __init__(self, config: KVCacheConfig, tile: Tile, sliding: bool) -> None:
        self.config, self.tile, self.sliding = config, tile, sliding
        self.group = config.group
        self.stride = config.num_attention_heads // config.num_key_value_heads
        self.heads = config.num_key_value_heads * self.group  # without carriers
        self.rotation: Any = Rotation(config, tile.lanes) if sliding else None

    def build(self) -> Any:
        c = self.config
        with kernel("paged_decode_sliding" if self.sliding else "paged_decode") as build:
            batch = T.int32()
            self.q = rows_of("q", batch)
            self.keys = PagedKeys(c, batch, self.sliding)
            self.keys.declare()
            self.q_position = aux_buffer("q_rope_position", (batch,))
            self.out = rows_of("output", batch)
            self.lse = tensor("lse", (batch, T.int32()), "float32")
            T.arg("rotary_mode", T.int32())
            T.arg("rope_scale", T.float32())
            T.arg("rope_theta", T.float32())
            self.rule = ScoreRule(c, T.arg("sm_scale", T.float32()))
            with build.body():
                size = batch * (c.num_attention_heads * c.head_dim)
                self.q_flat, self.out_flat = vx.flat(self.q, size), vx.flat(self.out, size)
                self.lse_flat = vx.flat(self.lse, batch * c.num_attention_heads)
                self.keys.enter()
                self.scale = self.rule.factor()
                self._parts(batch)
                rows = (batch + TASKS) * self.heads
                self.sums = T.alloc_buffer((rows * c.head_dim,), "float32")
                self.top, self.mass = (T.alloc_buffer((rows,), "float32") for _ in range(2))
                with T.parallel(0, batch * self.parts) as task:
                    # Part after part of all sequences, so that each thread has some of each.
                    self._task(T.bind(task % batch), T.bind(task // batch))
                vx.for_tokens(batch, _PARALLEL_SEQUENCES, self._merge)
        return build.result()

    def _parts(self, batch: Any) -> None:
        """Into how many parts a sequence is cut: of a tile at least, for the longest."""
        longest = vx.Reg(1, 0, "int32")
        with T.serial(0, batch) as b:
            longest.set(T.max(longest.get(), self.keys.indptr[b + 1] - self.keys.indptr[b]))
        wanted = vx.keep_int(T.min(TASKS // T.max(batch, 1), longest.get() // PAGES))
        self.parts = T.bind(vx.keep_int(T.max(T.min(wanted, MAX_PARTS), 1)))

    def _task(self, b: Any, part: Any) -> None:
        c, tile, group = self.config, self.tile, self.group
        self.kv_len = self.keys.select(b)
        based = self.sliding or c.layer_window > 0
        self.k_base = T.bind(self.keys.k_position[b]) if based else 0
        self.b, self.part = b, part
        # Of a part: its first head's row of the sums.
        self.row0 = T.bind((b * self.parts + part) * self.heads)
        self.queries = T.alloc_buffer((self.heads * c.head_dim,), "float32")
        self.scores = T.alloc_buffer((min(group, HEADS) * KEYS,), "float32")
        self.decay = T.alloc_buffer((HEADS,), "float32")
        self.pages = T.alloc_buffer((PAGES,), "int64")
        self.scales = [T.alloc_buffer((PAGES * PAGE_SIZE,), "float32") for _ in range(2)]
        # One vector a head, whose lanes are summed at the end.
        self.masses = T.alloc_buffer((self.heads * PAGE_SIZE,), "float32")
        if self.sliding:
            self.rotation.prepare()
            turns = (max(PAGES * self.rotation.half * PAGE_SIZE, 1),)
            self.turns = [T.alloc_buffer(turns, "float32") for _ in range(2)]
        with T.serial(0, self.heads) as h:
            zero = vx.splat(0.0, tile.dim_lanes)
            with T.serial(0, c.head_dim // tile.dim_lanes) as i:
                at = (self.row0 + h) * c.head_dim + i * tile.dim_lanes
                vx.store(self.sums, at, zero, tile.dim_lanes)
            vx.store(self.top, self.row0 + h, vx.splat(NO_KEY, 1), 1)
            vx.store(self.masses, h * PAGE_SIZE, vx.splat(0.0, PAGE_SIZE), PAGE_SIZE)
        self._phases()
        with T.serial(0, self.heads) as h:
            partial = T.bind(vx.load(self.masses, h * PAGE_SIZE, PAGE_SIZE))
            total = vx.across(partial, PAGE_SIZE, lambda a, b: a + b)
            vx.store(self.masses, h * PAGE_SIZE, total, PAGE_SIZE)
            vx.store(self.mass, self.row0 + h, vx.load(self.masses, h * PAGE_SIZE, 1), 1)

    def _phases(self) -> None:
        """Go over the part's keys: once, or first the attention sinks and then the window."""
        if not self.sliding:
            begin: Any = 0
            if self.config.layer_window:
                oldest = self.rule.oldest(self.q_position[self.b] - self.k_base)
                begin = vx.keep_int(T.min(T.max(oldest, 0), self.kv_len))
            self._load_queries(None)
            self._cut(begin, self.kv_len, 0)
            return
        window, sinks = self.config.sliding_window_size, self.config.attention_sink_size
        position = T.bind(self.q_position[self.b])
        sink_end = vx.keep_int(T.min(T.max(sinks - self.k_base, 0), self.kv_len))
        oldest = position - (window - sinks) + 1 - self.k_base
        with T.serial(0 if sinks else 1, 2) as phase:
            in_window = phase == 1
            begin = vx.keep_int(T.Select(in_window, T.max(sink_end, oldest), 0))
            stop = vx.keep_int(T.Select(in_window, self.kv_len, sink_end))
            with when(begin < stop):
                self._load_queries(
                    vx.keep_int(T.Select(in_window, position, T.min(position, window - 1)))
                )
                self._cut(begin, stop, vx.keep_int(T.Select(in_window, self.keys.skip, 0)))

    def _load_queries(self, position: Any) -> None:
        """The queries times the scale of the scores, without those of carriers."""
        dim, lanes = self.config.head_dim, self.tile.dim_lanes
        with T.serial(0, self.heads) as h:
            row = self.b * self.config.num_attention_heads + h // self.group * self.stride
            base = T.bind((row + h % self.group) * dim)

            def load(d: Any, width: int) -> Any:
                return vx.load(self.q_flat, base + d, width) * vx.splat(self.scale, width)

            def keep(d: Any, value: Any, width: int) -> None:
                vx.store(self.queries, h * dim + d, value, width)

            if self.rotation:
                self.rotation.query(load, position, keep)
            else:
                with T.serial(0, dim // lanes) as i:
                    keep(i * lanes, load(i * lanes, lanes), lanes)

    def _cut(self, begin: Any, stop: Any, shift: Any) -> None:
        """The part's share, in whole pages, of the keys begin to stop; slots are keys + shift."""
        low, high = T.bind(begin + shift), T.bind(stop + shift)
        first = T.bind(T.shift_right(low, 4))
        pages = T.bind(T.max(T.shift_right(high + PAGE_SIZE - 1, 4) - first, 0))
        share = T.bind((pages + self.parts - 1) // self.parts)
        page0 = T.bind(first + self.part * share)
        page1 = vx.keep_int(T.min(first + pages, page0 + share))
        low = vx.keep_int(T.max(low, page0 * PAGE_SIZE))
        high = vx.keep_int(T.min(high, page1 * PAGE_SIZE))
        with when(page0 < page1):
            with T.serial(0, (page1 - page0 + PAGES - 1) // PAGES) as t:
                _Tile(self).emit(T.bind(page0 + t * PAGES), page1, low, high, shift)

    def _merge(self, b: Any) -> None:
        """The parts' sums become the sequence's output."""
        c, dim, lanes = self.config, self.config.head_dim, self.tile.dim_lanes
        weights = T.alloc_buffer((MAX_PARTS,), "float32")
        with T.serial(0, self.heads) as h:
            at = T.bind(b * c.num_attention_heads + h // self.group * self.stride)
            row = T.bind(b * self.parts * self.heads + h)
            top, total = vx.Reg(1, vx.splat(NO_KEY, 1)), vx.Reg(1, vx.splat(0.0, 1))
            with T.serial(0, self.parts) as part:
                other = vx.load(self.top, row + part * self.heads, 1)
                top.set(T.max(top.get(), other))
            with T.serial(0, self.parts) as part:
                where = T.bind(row + part * self.heads)
                weight = vx.exp2(vx.load(self.top, where, 1) - top.get(), 1)
                vx.store(weights, part, weight, 1)
                total.set(total.get() + weight * vx.load(self.mass, where, 1))
            zero, one = vx.splat(0.0, 1), vx.splat(1.0, 1)
            seen = total.get() > zero
            safe = vx.keep(T.Select(seen, total.get(), one), 1)
            lse = T.Select(seen, top.get() + vx.log2(safe, 1), vx.splat(NO_KEY, 1))
            lse = vx.keep(lse, 1)
            vx.store(self.lse_flat, at + h % self.group, lse, 1)
            if c.returns_lse:
                emit_carried(c, self.out_flat, at, h % self.group, lse)
            inverse = vx.keep(T.Select(seen, one / safe, zero), 1)
            with T.serial(0, dim // lanes) as i:
                value = vx.Reg(lanes, vx.splat(0.0, lanes))
                with T.serial(0, self.parts) as part:
                    weight = vx.splat(vx.load(weights, part, 1), lanes)
                    sums = vx.load(self.sums, (row + part * self.heads) * dim + i * lanes, lanes)
                    value.set(vx.fma(weight, sums, value.get(), lanes))
                result = value.get() * vx.splat(inverse, lanes)
                vx.store(self.out_flat, (at + h % self.group) * dim + i * lanes, result, lanes)


class _Tile:
    """A tile of pages, for all heads of a part; only what reads pages depends on the storage."""

    def __init__(self, task: _Decode) -> None:
        self.task, self.config, self.dim = task, task.config, task.config.head_dim

    def emit(self, page0: Any, page1: Any, low: Any, high: Any, shift: Any) -> None:
        """The slots low .. high - 1 of the pages page0 .. min(page0 + 4, page1) - 1."""
        c, task = self.config, self.task
        self.slot0 = T.bind(page0 * PAGE_SIZE)
        self.low = vx.keep_int(T.max(low, self.slot0))
        self.high = vx.keep_int(T.min(high, self.slot0 + PAGES * PAGE_SIZE))
        self.count = T.bind(T.shift_right(self.high - self.slot0 + PAGE_SIZE - 1, 4))
        with T.serial(0, PAGES) as p:
            vx.store(task.pages, p, task.keys.page(T.min(page0 + p, page1 - 1)), 1)
        if task.rotation:
            task.rotation.angles(task.turns, self.count, T.bind(task.k_base + self.slot0 - shift))
        with T.serial(0, c.num_key_value_heads) as kv:
            self.kv = kv
            self._scales()
            head0 = T.bind(kv * task.group)
            blocks, rest = divmod(task.group, HEADS)
            if blocks:
                with T.serial(0, blocks) as i:
                    self._heads(T.bind(head0 + i * HEADS), HEADS)
            if rest:
                self._heads(T.bind(head0 + blocks * HEADS), rest)

    def _by_storage(self, emit: Callable[[Storage, Any], None]) -> None:
        """Emit emit(storage, its view of the pages)."""
        keys = self.task.keys
        by_storage(self.config, keys.words, lambda s: emit(s, s.view(keys.pages, keys.size)))

    def _base(self, storage: Storage, page: Any) -> Any:
        """Where the keys of the tile's head in a page begin."""
        number = vx.load(self.task.pages, page, 1)
        return T.bind(number * (2 * storage.half(self.config)) + self.kv * (PAGE_SIZE * self.dim))

    def _scales(self) -> None:
        """Those of the head's keys and values; 1 in storages that have none."""
        c, task = self.config, self.task

        def emit(storage: Storage, _cells: Any) -> None:
            words = vx.flat(task.keys.pages, task.keys.size)
            with T.serial(0, self.count) as p:
                page = T.bind(vx.load(task.pages, p, 1) * (2 * PAGE_SIZE * storage.words(c)))
                for which, target in enumerate(task.scales):
                    value: Any = vx.splat(1.0, PAGE_SIZE)
                    if storage.scaled:
                        half = (which * storage.words(c) + storage.scale(c)) * PAGE_SIZE
                        value = vx.load(words, page + half + self.kv * PAGE_SIZE, PAGE_SIZE)
                    vx.store(target, p * PAGE_SIZE, value, PAGE_SIZE)

        self._by_storage(emit)

    def _heads(self, head: Any, count: int) -> None:
        # Few enough for a short last tile, enough for eight sums that do not wait for one another.
        at_once = self.task.tile.at_once(count * (PAGE_SIZE // self.task.tile.lanes))
        at_once = min(at_once, 2 if count > 2 else 4)
        with T.serial(0, (self.count + at_once - 1) // at_once) as i:
            self._scores(head, count, T.bind(i * at_once), at_once)
        with T.serial(0, count) as g:
            self._softmax(T.bind(head + g), T.bind(g * KEYS), g)
        self._values(head, count)

    def _scores(self, head: Any, count: int, page: Any, pages: int) -> None:
        """scores[head, keys] of some pages, before any mask."""
        task, dim = self.task, self.dim
        cells = [(g, p) for g in range(count) for p in range(pages)]
        sums = {cell: vx.Reg(PAGE_SIZE, vx.splat(0.0, PAGE_SIZE)) for cell in cells}

        def add(d: Any, rows: list[Any]) -> None:
            for g in range(count):
                q = T.bind(vx.splat(vx.load(task.queries, (head + g) * dim + d, 1), PAGE_SIZE))
                for p, row in enumerate(rows):
                    sums[g, p].set(vx.fma(q, row, sums[g, p].get(), PAGE_SIZE))

        def emit(storage: Storage, view: Any) -> None:
            bases = [self._base(storage, page + p) for p in range(pages)]

            def load(p: int, d: Any) -> Any:
                return T.bind(vx.load(view, bases[p] + d * PAGE_SIZE, PAGE_SIZE))

            half = task.rotation.half if task.rotation else 0
            if half:
                with T.serial(0, half) as i:
                    first, second = [], []
                    for p in range(pages):
                        at = ((page + p) * half + i) * PAGE_SIZE
                        cosine, sine = (T.bind(vx.load(x, at, PAGE_SIZE)) for x in task.turns)
                        a, b = load(p, i), load(p, half + i)
                        first.append(T.bind(a * cosine - b * sine))
                        second.append(T.bind(b * cosine + a * sine))
                    add(i, first)
                    add(half + i, second)
            with T.serial(2 * half, dim) as d:
                add(d, [load(p, d) for p in range(pages)])

        self._by_storage(emit)
        for g, p in cells:
            vx.store(task.scores, g * KEYS + (page + p) * PAGE_SIZE, sums[g, p].get(), PAGE_SIZE)

    def _softmax(self, head: Any, row: Any, g: Any) -> None:
        """Scores become weights relative to the new maximum; decay is what the old sums keep.

        A value's scale goes into its weight, after the weights are summed.
        """
        task, wide = self.task, PAGE_SIZE
        at = T.bind(task.row0 + head)
        old = vx.keep(vx.load(task.top, at, 1), 1)
        top = vx.Reg(wide, vx.splat(old, wide))
        low, high = (vx.splat(x, wide) for x in (self.low, self.high))
        with T.serial(0, self.count) as p:
            slots = vx.splat(self.slot0 + p * wide, wide) + vx.constants(list(range(wide)), "int32")
            place = T.bind(row + p * wide)
            score = vx.load(task.scores, place, wide) * vx.load(task.scales[0], p * wide, wide)
            valid = T.bitwise_and(slots >= low, slots < high)
            score = T.Select(valid, task.rule.capped(score, wide), vx.splat(MASKED, wide))
            score = vx.keep(score, wide)
            vx.store(task.scores, place, score, wide)
            top.set(T.max(top.get(), score))
        top.set(vx.across(T.bind(top.get()), wide, T.max))
        new = vx.keep(vx.load(top.buffer, 0, 1), 1)
        decay = vx.exp2(old - new, 1)
        own = T.bind(head * wide)
        mass = vx.Reg(wide, vx.load(task.masses, own, wide) * vx.splat(decay, wide))
        with T.serial(0, self.count) as p:
            place = T.bind(row + p * wide)
            weight = vx.exp2(vx.load(task.scores, place, wide) - top.get(), wide)
            mass.set(mass.get() + weight)
            scaled = weight * vx.load(task.scales[1], p * wide, wide)
            vx.store(task.scores, place, scaled, wide)
        vx.store(task.masses, own, mass.get(), wide)
        vx.store(task.top, at, new, 1)
        vx.store(task.decay, g, decay, 1)

    def _values(self, head: Any, count: int) -> None:
        """sums[head, :] = decay * sums + weights V, over the slots that count."""
        lanes = self.task.tile.dim_lanes
        many, left = self.task.tile.at_once(count), self.dim // lanes
        if left >= many:
            with T.serial(0, left // many) as i:
                self._sum_values(head, count, T.bind(i * (many * lanes)), many)
            left %= many
        while left:
            width = max(n for n in (1, 2, 4) if n <= left)
            self._sum_values(head, count, self.dim - left * lanes, width)
            left -= width

    def _sum_values(self, head: Any, count: int, d: Any, width: int) -> None:
        task, dim, lanes = self.task, self.dim, self.task.tile.dim_lanes
        cells = [(g, i) for g in range(count) for i in range(width)]

        def place(g: int, i: int) -> Any:
            return (task.row0 + head + g) * dim + d + i * lanes

        sums = {}
        for g, i in cells:
            decay = vx.splat(vx.load(task.decay, g, 1), lanes)
            sums[g, i] = vx.Reg(lanes, vx.load(task.sums, place(g, i), lanes) * decay)

        def emit(storage: Storage, view: Any) -> None:
            with T.serial(0, self.count) as p:
                start = T.bind(p * PAGE_SIZE)
                first = vx.keep_int(T.max(self.low - self.slot0 - start, 0))
                last = vx.keep_int(T.min(self.high - self.slot0 - start, PAGE_SIZE))
                base = T.bind(self._base(storage, p) + storage.half(self.config) + d)
                with T.serial(first, T.max(first, last)) as key:
                    rows = [
                        T.bind(vx.load(view, base + key * dim + i * lanes, lanes))
                        for i in range(width)
                    ]
                    for g in range(count):
                        weight = vx.load(task.scores, g * KEYS + start + key, 1)
                        weight = T.bind(vx.splat(weight, lanes))
                        for i, row in enumerate(rows):
                            sums[g, i].set(vx.fma(weight, row, sums[g, i].get(), lanes))

        self._by_storage(emit)
        for g, i in cells:
            vx.store(task.sums, place(g, i), sums[g, i].get(), lanes)
