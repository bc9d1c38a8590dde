"""Attention of one new token a sequence against cached pages, and the merge of partial results.

A task is one (sequence, kv head): each page of keys is read once for all heads of the group. Lanes
hold the head dimension; the 16 dot products of a page are turned into one vector by shuffles.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from qcc.targets.cpu.kernels import attention_vector as vx
from qcc.targets.cpu.kernels.attention import MASKED, NO_KEY, PAGE, PagedKeys, Tile, emit_pv
from qcc.targets.cpu.kernels.attention_func import aux_buffer, kernel, tensor
from qcc.targets.cpu.kernels.attention_prefill import emit_normalizer, when
from qcc.targets.cpu.kernels.rope import Rotation
from qcc.targets.spec import KVCacheConfig


def decode_kernel(config: KVCacheConfig, tile: Tile, sliding: bool) -> Any:
    """The PrimFunc of the cache's decode slot: q [b, hq, d] -> output [b, hq, d], lse [b, hq]."""
    return _Decode(config, tile, sliding).build()


class _Decode:
    def __init__(self, config: KVCacheConfig, tile: Tile, sliding: bool) -> None:
        self.config, self.tile, self.sliding = config, tile, sliding
        self.group = config.num_attention_heads // config.num_key_value_heads
        self.rotation = Rotation(config, tile.lanes) if sliding else None

    def build(self) -> Any:
        c = self.config
        with kernel("paged_decode_sliding" if self.sliding else "paged_decode") as build:
            batch = T.int32()
            rows = (batch, c.num_attention_heads, c.head_dim)
            self.q = tensor("q", rows, c.dtype)
            self.keys = PagedKeys(c, batch, self.sliding)
            self.keys.declare()
            self.q_position = aux_buffer("q_rope_position", (batch,))
            self.out = tensor("output", rows, c.dtype)
            self.lse = tensor("lse", rows[:2], "float32")
            T.arg("rotary_mode", T.int32())
            T.arg("rope_scale", T.float32())
            T.arg("rope_theta", T.float32())
            self.sm_scale = T.arg("sm_scale", T.float32())
            with build.body():
                size = batch * (c.num_attention_heads * c.head_dim)
                self.q_flat, self.out_flat = vx.flat(self.q, size), vx.flat(self.out, size)
                self.lse_flat = vx.flat(self.lse, batch * c.num_attention_heads)
                self.keys.enter()
                self.scale = T.bind(self.sm_scale * vx.splat(vx.LOG2_E, 1))
                with T.parallel(0, batch * c.num_key_value_heads) as task:
                    heads = c.num_key_value_heads
                    self._task(T.bind(task // heads), T.bind(task % heads))
        return build.result()

    def _task(self, b: Any, head: Any) -> None:
        c, tile, group = self.config, self.tile, self.group
        self.kv_len = self.keys.select(b, head)
        self.k_base = T.bind(self.keys.k_position[b]) if self.sliding else 0
        self.q_row = T.bind((b * c.num_key_value_heads + head) * group)
        self.b = b
        # top, mass and decay hold one vector a head, its lanes equal (mass: partial sums).
        self.queries = T.alloc_buffer((group * c.head_dim,), "float32")
        self.scores = T.alloc_buffer((group * tile.keys,), "float32")
        self.sums = T.alloc_buffer((group * c.head_dim,), "float32")
        self.offsets = T.alloc_buffer((tile.keys,), "int64")
        self.top, self.mass, self.decay = (
            T.alloc_buffer((group * PAGE,), "float32") for _ in range(3)
        )
        if self.sliding:
            self.rotated = T.alloc_buffer((tile.keys * c.head_dim,), "float32")
            self.rotation.prepare(PAGE)
        with T.serial(0, group) as g:
            for d in range(0, c.head_dim, tile.dim_lanes):
                zero = vx.splat(0.0, tile.dim_lanes)
                vx.store(self.sums, g * c.head_dim + d, zero, tile.dim_lanes)
            vx.store(self.top, g * PAGE, vx.splat(NO_KEY, PAGE), PAGE)
            vx.store(self.mass, g * PAGE, vx.splat(0.0, PAGE), PAGE)
        self._phases()
        self._finish()

    def _phases(self) -> None:
        """Go over the keys: once, or first the attention sinks and then the window."""
        if not self.sliding:
            self._load_queries(None)
            self._key_tiles(0, self.kv_len)
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
                self._key_tiles(begin, stop)

    def _load_queries(self, position: Any) -> None:
        """The group's queries times the scale of the scores."""
        dim, lanes = self.config.head_dim, self.tile.dim_lanes
        with T.serial(0, self.group) as g:
            base = T.bind((self.q_row + g) * dim)

            def load(d: Any, width: int) -> Any:
                return vx.load(self.q_flat, base + d, width) * vx.splat(self.scale, width)

            def keep(d: Any, value: Any, width: int) -> None:
                vx.store(self.queries, g * dim + d, value, width)

            if self.rotation:
                self.rotation.query(load, position, keep)
            else:
                for d in range(0, dim, lanes):
                    keep(d, load(d, lanes), lanes)

    def _key_tiles(self, begin: Any, stop: Any) -> None:
        tile = self.tile
        with T.serial(0, (stop - begin + tile.keys - 1) // tile.keys) as t:
            first = T.bind(begin + t * tile.keys)
            count = vx.keep_int(T.min(tile.keys, stop - first))
            pages = T.bind((count + PAGE - 1) // PAGE)
            with T.serial(0, pages * PAGE) as j:
                key = vx.keep_int(T.min(first + j, stop - 1))
                vx.store(self.offsets, j, self.keys.offset(key), 1)
            with T.serial(0, pages) as page:
                self._score_page(page, first, stop)
            with T.serial(0, self.group) as g:
                self._softmax(g, pages)
            block = max(b for b in (1, 2, 4) if self.group % b == 0)
            emit_pv(
                tile,
                self.group,
                min(block, tile.rows_at_once(block)),
                self.sums,
                lambda g: vx.load(self.decay, g * PAGE, 1),
                lambda key, g: vx.load(self.scores, g * tile.keys + key, 1),
                count,
                lambda key: (self.keys.v, vx.load(self.offsets, key, 1) + self.keys.v_shift),
            )

    def _score_page(self, page: Any, first: Any, stop: Any) -> None:
        """scores[g, 16 keys] of every head of the group."""
        tile, dim, lanes = self.tile, self.config.head_dim, self.tile.dim_lanes
        source, at = self.keys.k, [T.bind(vx.load(self.offsets, page * PAGE, 1))]
        # Without a window a tile starts at a page, so its rows follow one another.
        at += [at[0] + k * dim for k in range(1, PAGE)]
        if self.rotation:
            base = T.bind(page * (PAGE * dim))
            source, at = self.rotated, [base + k * dim for k in range(PAGE)]
            self.rotation.keys(
                PAGE,
                T.bind(self.k_base + first + page * PAGE),
                lambda k, d, width: vx.load(
                    self.keys.k, vx.load(self.offsets, page * PAGE + k, 1) + d, width
                ),
                lambda k, d, value, width: vx.store(self.rotated, base + k * dim + d, value, width),
            )
        ramp = vx.constants(list(range(PAGE)), "int32")
        with T.serial(0, self.group) as g:
            query = [
                T.bind(vx.load(self.queries, g * dim + d, lanes)) for d in range(0, dim, lanes)
            ]
            dots = []
            for k in range(PAGE):
                dot = T.bind(vx.load(source, at[k], lanes) * query[0])
                for i, part in enumerate(query[1:], 1):
                    dot = T.bind(
                        vx.fma(vx.load(source, at[k] + i * lanes, lanes), part, dot, lanes)
                    )
                dots.append(dot)
            place = first + page * PAGE
            valid = vx.splat(place, PAGE) + ramp < vx.splat(stop, PAGE)
            score = T.Select(valid, vx.lane_sums(dots, lanes), vx.splat(MASKED, PAGE))
            vx.store(self.scores, g * tile.keys + page * PAGE, score, PAGE)

    def _softmax(self, g: Any, pages: Any) -> None:
        """Scores become weights relative to the new maximum; decay is what the old sums keep."""
        row = T.bind(g * self.tile.keys)
        old = T.bind(vx.load(self.top, g * PAGE, PAGE))
        top = vx.Reg(PAGE, old)
        with T.serial(0, pages) as page:
            top.set(T.max(top.get(), vx.load(self.scores, row + page * PAGE, PAGE)))
        new = T.bind(vx.across(T.bind(top.get()), PAGE, T.max))
        decay = vx.exp2(old - new, PAGE)
        mass = vx.Reg(PAGE, vx.load(self.mass, g * PAGE, PAGE) * decay)
        with T.serial(0, pages) as page:
            at = T.bind(row + page * PAGE)
            weight = vx.exp2(vx.load(self.scores, at, PAGE) - new, PAGE)
            mass.set(mass.get() + weight)
            vx.store(self.scores, at, weight, PAGE)
        vx.store(self.top, g * PAGE, new, PAGE)
        vx.store(self.mass, g * PAGE, mass.get(), PAGE)
        vx.store(self.decay, g * PAGE, decay, PAGE)

    def _finish(self) -> None:
        dim, lanes = self.config.head_dim, self.tile.dim_lanes
        with T.serial(0, self.group) as g:
            partial = T.bind(vx.load(self.mass, g * PAGE, PAGE))
            total = vx.across(partial, PAGE, lambda a, b: a + b)
            vx.store(self.mass, g * PAGE, total, PAGE)
            emit_normalizer(self.top, self.mass, self.decay, g * PAGE, PAGE)
            vx.store(self.lse_flat, self.q_row + g, vx.load(self.top, g * PAGE, 1), 1)
            inverse = T.bind(vx.splat(vx.load(self.decay, g * PAGE, 1), lanes))
            for d in range(0, dim, lanes):
                value = vx.load(self.sums, g * dim + d, lanes) * inverse
                vx.store(self.out_flat, (self.q_row + g) * dim + d, value, lanes)


def merge_state(config: KVCacheConfig, tile: Tile) -> Any:
    """v, s <- the attention over both key sets, from (v, s) and (v_other, s_other); s in base 2."""
    heads, dim, lanes = config.num_attention_heads, config.head_dim, tile.dim_lanes
    with kernel("merge_state") as build:
        n = T.int32()
        v, s = tensor("v", (n, heads, dim), config.dtype), tensor("s", (n, heads), "float32")
        v2 = tensor("v_other", (n, heads, dim), config.dtype)
        s2 = tensor("s_other", (n, heads), "float32")
        with build.body():
            v, v2 = vx.flat(v, n * (heads * dim)), vx.flat(v2, n * (heads * dim))
            s, s2 = vx.flat(s, n * heads), vx.flat(s2, n * heads)

            def token(i: Any) -> None:
                with T.serial(0, heads) as h:
                    at = T.bind(i * heads + h)
                    a, b = T.bind(s[at]), T.bind(s2[at])
                    top = vx.keep(T.max(a, b), 1)
                    pa, pb = vx.exp2(a - top, 1), vx.exp2(b - top, 1)
                    total = T.bind(pa + pb)
                    wa, wb = (T.bind(vx.splat(T.bind(p / total), lanes)) for p in (pa, pb))
                    vx.store(s, at, top + vx.log2(total, 1), 1)
                    for d in range(0, dim, lanes):
                        x = T.bind(vx.load(v, at * dim + d, lanes))
                        y = T.bind(vx.load(v2, at * dim + d, lanes))
                        vx.store(v, at * dim + d, x * wa + y * wb, lanes)

            vx.for_tokens(n, 8, token)
    return build.result()


def transpose_append(config: KVCacheConfig, tile: Tile) -> Any:
    """Write k, v [n, kv_heads, d] to their slots: page * 16 + place, -1 for a token to drop."""
    heads, dim, lanes = config.num_key_value_heads, config.head_dim, tile.dim_lanes
    with kernel("kv_cache_transpose_append") as build:
        n, num_pages = T.int64(), T.int64()
        pages = tensor("pages", (num_pages, 2, heads, PAGE, dim), config.dtype)
        new = [tensor(name, (n, heads, dim), config.dtype) for name in ("k_data", "v_data")]
        slots = aux_buffer("position_map", (n,))
        with build.body():
            pages = vx.flat(pages, num_pages * (2 * heads * PAGE * dim))
            new = [vx.flat(x, n * (heads * dim)) for x in new]

            def token(i: Any) -> None:
                slot = T.bind(vx.cast(slots[i], "int64", 1))
                with when(slot >= 0):
                    page, place = T.shift_right(slot, T.int64(4)), T.bitwise_and(slot, T.int64(15))
                    base = T.bind(page * (2 * heads * PAGE * dim) + place * dim)
                    with T.serial(0, heads) as h:
                        for which, source in enumerate(new):
                            to = T.bind(base + (which * heads + h) * (PAGE * dim))
                            for d in range(0, dim, lanes):
                                value = source[vx.index((i * heads + h) * dim + d, lanes)]
                                T.buffer_store(pages, value, [vx.index(to + d, lanes)])

            vx.for_tokens(n, 8, token)
    return build.result()
