"""Blocked attention of many queries: against the chunk itself (ragged) or against cached pages.

A row is one (token, head of the group) of a kv head. A task takes `tile.rows` rows. Each tile of
keys is staged as f32, and then for each block of rows, whose scores stay in the first cache,
    S = Q K (lanes hold keys), P = exp2(S - max), O = O * decay + P V (lanes: a head's numbers).
Tasks run in parallel over (kv head, sequence, row tile).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tvm.tirx.script import builder as T

from qcc.targets.attention import Mask, Task, aux_buffer, kernel, rows_of, tensor
from qcc.targets.cpu.kernels import amx
from qcc.targets.cpu.kernels import attention_tiles as tiles
from qcc.targets.cpu.kernels import vectors as vx
from qcc.targets.cpu.kernels.attention import (
    MASKED,
    NO_KEY,
    ScoreRule,
    Tile,
    emit_carried,
    emit_normalizer,
    emit_products,
    when,
)
from qcc.targets.cpu.kernels.attention_keys import PagedKeys, RaggedKeys
from qcc.targets.cpu.kernels.attention_mask import RowMask
from qcc.targets.cpu.kernels.rope import Rotation
from qcc.targets.spec import PAGE_SIZE, KVCacheConfig


def prefill_kernel(
    config: KVCacheConfig, tile: Tile, paged: bool, mask: Mask, amx: bool = False
) -> Any:
    """The PrimFunc of one slot of the cache; `amx`: with tiles, for caches that use them."""
    return _Prefill(config, tile, paged, mask, amx and mask != "tree").build()


class _Prefill:
    def __init__(
        self, config: KVCacheConfig, tile: Tile, paged: bool, mask: Mask, amx: bool
    ) -> None:
        self.amx = amx
        self.config, self.tile, self.paged, self.kind = config, tile, paged, mask
        self.mask = RowMask(config, tile, paged, mask)
        self.group = config.group
        self.stride = config.num_attention_heads // config.num_key_value_heads
        self.sliding = mask == "sliding"
        self.rotation: Any = Rotation(config, tile.lanes) if self.sliding else None

    def build(self) -> Any:
        with kernel(f"{'paged' if self.paged else 'ragged'}_prefill_{self.kind}") as build:
            self._declare()
            with build.body():
                self._tasks()
        return build.result()

    def _declare(self) -> None:
        c = self.config
        # The batch's size comes from an index array: a tree kernel gets no array of length batch.
        total, bounds = T.int32(), T.int32()
        self.total, self.batch = total, bounds - 1
        self.keys: Any = (PagedKeys(c, self.batch, self.sliding) if self.paged
                          else RaggedKeys(c, self.batch))  # fmt: skip
        self.q = rows_of("q", total)
        self.q_indptr = aux_buffer("q_indptr", (bounds,))
        self.keys.declare()
        self.k_position: Any = self.keys.k_position if self.paged else None
        self.q_position = aux_buffer("q_rope_position", (total,))
        if not self.paged and self.kind != "tree":
            self.k_position = aux_buffer("k_rope_pos_offset", (self.batch,))
        if not self.paged and self.kind == "tree":
            self.mask.declare_tree()
        self.out = rows_of("output", total)
        self.lse = tensor("lse", (total, T.int32()), "float32")
        causal = T.arg("causal", T.int32()) if self.kind != "tree" else None
        T.arg("rotary_mode", T.int32())
        self.rope_scale = T.arg("rope_scale", T.float32())
        T.arg("rope_theta", T.float32())
        self.rule = ScoreRule(c, T.arg("sm_scale", T.float32()))
        # Of cached keys every one is older than the queries.
        self.mask.causal = None if self.paged else causal
        if self.paged and self.kind == "tree":
            self.mask.declare_tree()

    def _tasks(self) -> None:
        """Find each task's sequence and row tile; sequences have ragged numbers of tiles."""
        c, rows = self.config, self.tile.rows
        size = self.total * (c.num_attention_heads * c.head_dim)
        self.q_flat, self.out_flat = vx.flat(self.q, size), vx.flat(self.out, size)
        self.lse_flat = vx.flat(self.lse, self.total * c.num_attention_heads)
        self.keys.enter()
        self.scale = self.rule.factor()
        count = T.bind((self.total * self.group + rows - 1) // rows + self.batch)
        with T.parallel(0, count * c.num_key_value_heads) as task:
            found = vx.Reg(1, -1, "int32")
            rest = vx.Reg(1, task % count, "int32")
            own = vx.Reg(1, 0, "int32")
            with T.serial(0, self.batch) as b:
                with when(found.get() < 0):
                    tokens = self.q_indptr[b + 1] - self.q_indptr[b]
                    own.set((tokens * self.group + rows - 1) // rows)
                    with T.If(rest.get() < own.get()):
                        with T.Then():
                            found.set(b)
                        with T.Else():
                            rest.set(rest.get() - own.get())
            with when(found.get() >= 0):
                # Late causal tiles are long: alternating from both ends balances the threads.
                turn = T.bind(rest.get())
                half = T.shift_right(turn, 1)
                last = own.get() - 1 - half
                row_tile = vx.keep_int(T.Select(T.bitwise_and(turn, 1) == 0, half, last))
                self._row_tile(T.bind(found.get()), T.bind(task // count), row_tile)

    def _row_tile(self, b: Any, head: Any, row_tile: Any) -> None:
        c, tile, group = self.config, self.tile, self.group
        dim, width = c.head_dim, tile.rows
        self.q0 = T.bind(self.q_indptr[b])
        tokens = T.bind(self.q_indptr[b + 1] - self.q0)
        self.row0 = T.bind(row_tile * width)
        self.rows = vx.keep_int(T.min(width, tokens * group - self.row0))
        self.head = head
        self.kv_len = self.keys.select(b)
        self.k_base: Any = 0
        if self.sliding or c.layer_window:
            # The ragged tree kernel has no k_position: its keys are its own tokens.
            alone = self.k_position is None
            self.k_base = T.bind(self.q_position[self.q0] if alone else self.k_position[b])
        # Scratch: queries [rows, d], outputs [rows, d], scores [block, keys], the staged keys;
        # the masses of a row's lanes are summed at the end.
        self.queries = T.alloc_buffer((width * dim,), "float32")
        self.sums = T.alloc_buffer((width * dim,), "float32")
        self.scores = T.alloc_buffer((tile.block * tile.keys,), "float32")
        self.k = T.alloc_buffer((tile.keys * dim,), "float32")
        self.v = T.alloc_buffer((tile.keys * dim,), "float32")
        self.top = T.alloc_buffer((width,), "float32")
        self.mass = T.alloc_buffer((width * tile.lanes,), "float32")
        self.inverse = T.alloc_buffer((width,), "float32")
        self.decay = T.alloc_buffer((tile.block,), "float32")
        task = Task(b, self.q0, tokens, self.kv_len, self.k_base)
        self.mask.enter(task, self.q_position, self.rule)
        if self.amx:
            self.blocks = tiles.TileBlocks(tile, self.rule, self.mask)
            with self._tiles_used():
                amx.configure()
        if self.sliding:
            self.row = T.alloc_buffer((dim,), "float32")
            self.rotation.prepare()
            turns = (max(tile.keys * self.rotation.half, 1),)
            self.turns = [T.alloc_buffer(turns, "float32") for _ in range(2)]
        with T.serial(0, width) as r:
            vx.store(self.top, r, vx.splat(NO_KEY, 1), 1)
            vx.store(self.mass, r * tile.lanes, vx.splat(0.0, tile.lanes), tile.lanes)
        with T.serial(0, width * dim // tile.dim_lanes) as i:
            zero = vx.splat(0.0, tile.dim_lanes)
            vx.store(self.sums, i * tile.dim_lanes, zero, tile.dim_lanes)
        self._phases()
        if self.amx:
            with self._tiles_used():
                amx.call(amx.RELEASE)  # threads that hold tiles are slower to switch
        self._finish()

    def _tiles_used(self) -> Any:
        return when(self.rope_scale == vx.splat(tiles.ON, 1))

    def _phases(self) -> None:
        """Go over the keys: once, or first the attention sinks and then the window."""
        last_token = T.bind((self.row0 + self.rows - 1) // self.group)
        end = self.kv_len
        if not self.paged and self.kind != "tree":
            end = vx.keep_int(T.min(end, self.mask.after(last_token)))
        if not self.sliding:
            self.mask.begin_rows(0, end, None)
            self._load_queries(None)
            self._key_tiles(self.mask.first_key(), end, 0)
            return
        window, sinks = self.config.sliding_window_size, self.config.attention_sink_size
        sink_end = vx.keep_int(T.min(T.max(sinks - self.k_base, 0), end))
        first = self.q_position[self.q0 + T.floordiv(self.row0, self.group)]
        oldest = first - (window - sinks) + 1 - self.k_base
        # Sinks see the query where StreamingLLM puts it: at most at the end of a full window.
        with T.serial(0 if sinks else 1, 2) as phase:
            in_window = phase == 1
            begin = vx.keep_int(T.Select(in_window, T.max(sink_end, oldest), 0))
            stop = vx.keep_int(T.Select(in_window, end, sink_end))
            with when(begin < stop):
                self.mask.begin_rows(begin, stop, in_window)
                self._load_queries(T.Select(in_window, 1 << 30, window - 1))
                shift = vx.keep_int(T.Select(in_window, self.keys.skip, 0))
                self._key_tiles(begin, stop, shift)

    def _load_queries(self, position_limit: Any) -> None:
        """Scaled queries, and each row's mask.

        Rows that do not exist keep what is in memory: no row reads another, and they see no key.
        """
        c, lanes = self.config, self.tile.dim_lanes
        with T.serial(0, self.rows) as r:
            row = T.bind(self.row0 + r)
            token = T.bind(row // self.group)
            where = (self.q0 + token) * c.num_attention_heads + self.head * self.stride
            base = T.bind((where + row % self.group) * c.head_dim)
            self.mask.row(r, token)
            source, start = self.q_flat, base
            if self.rotation:
                position = vx.keep_int(T.min(self.q_position[self.q0 + token], position_limit))
                self.rotation.query(
                    lambda d, lanes: vx.load(self.q_flat, base + d, lanes),
                    position,
                    lambda d, value, lanes: vx.store(self.row, d, value, lanes),
                )
                # LLVM's optimizer makes an invalid module of reads wider than the writes before.
                source, start, lanes = self.row, 0, 1
            with T.serial(0, c.head_dim // lanes) as i:
                value = vx.load(source, start + i * lanes, lanes) * vx.splat(self.scale, lanes)
                vx.store(self.queries, r * c.head_dim + i * lanes, value, lanes)
        if self.amx:
            with self._tiles_used():
                self.blocks.load_queries(self.rows, self.queries)

    def _key_tiles(self, begin: Any, stop: Any, shift: Any) -> None:
        """The keys from begin to stop, whose slots are `shift` further, in tiles of whole pages."""
        tile = self.tile
        slot0 = T.bind(self.keys.first(begin + shift))
        with T.serial(0, (stop + shift - slot0 + tile.keys - 1) // tile.keys) as t:
            slot = T.bind(slot0 + t * tile.keys)
            first = T.bind(slot - shift)
            count = vx.keep_int(T.min(tile.keys, stop - first))
            panels = T.bind((count + PAGE_SIZE - 1) // PAGE_SIZE)
            self.keys.stage(tile, self.head, slot, panels, self.k, self.v)
            if self.rotation:
                self.rotation.angles(self.turns, panels, T.bind(self.k_base + first))
                self.rotation.panels(self.k, self.turns, panels)
            if self.kind == "tree":
                with T.serial(0, panels * PAGE_SIZE) as j:
                    self.mask.key(j, first + j)
            if not self.amx:
                self._row_blocks(tile.block, first, self._block)
            else:
                with T.If(self.rope_scale == vx.splat(tiles.ON, 1)):
                    with T.Then():
                        self.blocks.stage(panels, self.k, self.v, begin - first, stop - first)
                        state = {"sums": self.sums, "top": self.top, "mass": self.mass}
                        self._row_blocks(
                            tiles.BLOCK,
                            first,
                            partial(self.blocks.block, state),
                        )
                    with T.Else():
                        self._row_blocks(tile.block, first, self._block)

    def _row_blocks(
        self, rows: int, first: Any, emit: Callable[[Any, Any, Any, Any], None]
    ) -> None:
        """Emit emit(row, first, low, high) for each block of rows that sees keys of the tile."""
        with T.serial(0, (self.rows + rows - 1) // rows) as i:
            row = T.bind(i * rows)
            low, high = self.mask.of_block(row, T.min(rows, self.rows - row))
            low = vx.keep_int(T.max(low - first, 0))
            high = vx.keep_int(T.min(high - first, self.tile.keys))
            with when(low < high):
                emit(row, first, low, high)

    def _block(self, row: Any, first: Any, low: Any, high: Any) -> None:
        """Take the keys low .. high - 1 of the tile into a block of rows."""
        lanes, count = self.tile.lanes, self.tile.vectors
        span = T.bind(count * lanes)
        begin, end = T.bind(low // span), T.bind((high + span - 1) // span)
        self._score(row, first, begin, end)
        self._softmax(row, T.bind(begin * count), T.bind(end * count))
        lanes, vectors = self.tile.dim_lanes, self.config.head_dim // self.tile.dim_lanes
        whole, rest = divmod(vectors, count)
        with T.serial(0, whole) as i:
            self._values(row, T.bind(i * (count * lanes)), count, low, high)
        if rest:
            self._values(row, whole * count * lanes, rest, low, high)

    def _score(self, row: Any, first: Any, begin: Any, end: Any) -> None:
        """scores[block, keys] = Q K, masked; `begin` and `end` count the vectors that go at once.

        These are parts of a panel, or panels one behind the other.
        """
        tile, lanes, dim = self.tile, self.tile.lanes, self.config.head_dim
        parts = PAGE_SIZE // lanes
        with T.serial(begin, end) as t:
            v0 = T.bind(t * tile.vectors)
            panel = T.bind(v0 // parts * (dim * PAGE_SIZE) + v0 % parts * lanes)

            def done(r: int, i: int, value: Any) -> None:
                place = T.bind((v0 + i) * lanes)
                score = T.Select(
                    self.mask.seen(row + r, first + place, place),
                    self.rule.capped(value, lanes),
                    vx.splat(MASKED, lanes),
                )
                vx.store(self.scores, r * tile.keys + place, score, lanes)

            emit_products(
                tile.block,
                tile.vectors,
                lanes,
                (0, dim),
                lambda d, r: vx.load(self.queries, (row + r) * dim + d, 1),
                lambda d, i: vx.load(
                    self.k,
                    panel + d * PAGE_SIZE + i // parts * (dim * PAGE_SIZE) + i % parts * lanes,
                    lanes,
                ),
                lambda r, i: vx.splat(0.0, lanes),
                done,
            )

    def _softmax(self, row: Any, begin: Any, end: Any) -> None:
        """Scores become weights relative to the new maximum; decay is what the old sums keep."""
        tile, lanes = self.tile, self.tile.lanes
        with T.serial(0, tile.block) as r:
            scores = T.bind(r * tile.keys)
            old = vx.keep(vx.load(self.top, row + r, 1), 1)
            top = vx.Reg(lanes, vx.splat(old, lanes))
            with T.serial(begin, end) as v:
                top.set(T.max(top.get(), vx.load(self.scores, scores + v * lanes, lanes)))
            top.set(vx.across(T.bind(top.get()), lanes, T.max))
            new = vx.keep(vx.load(top.buffer, 0, 1), 1)
            decay = vx.exp2(old - new, 1)
            at = T.bind((row + r) * lanes)
            mass = vx.Reg(lanes, vx.load(self.mass, at, lanes) * vx.splat(decay, lanes))
            with T.serial(begin, end) as v:
                score = vx.load(self.scores, scores + v * lanes, lanes)
                weight = vx.exp2(score - vx.splat(new, lanes), lanes)
                mass.set(mass.get() + weight)
                vx.store(self.scores, scores + v * lanes, weight, lanes)
            vx.store(self.top, row + r, new, 1)
            vx.store(self.mass, at, mass.get(), lanes)
            vx.store(self.decay, r, decay, 1)

    def _values(self, row: Any, d: Any, vectors: int, low: Any, high: Any) -> None:
        """sums[:, d ..] = decay * sums + P V, of so many vectors."""
        tile, lanes, dim = self.tile, self.tile.dim_lanes, self.config.head_dim

        def place(r: int, i: int) -> Any:
            return (row + r) * dim + d + i * lanes

        emit_products(
            tile.block,
            vectors,
            lanes,
            (low, high),
            lambda key, r: vx.load(self.scores, r * tile.keys + key, 1),
            lambda key, i: vx.load(self.v, key * dim + d + i * lanes, lanes),
            lambda r, i: (
                vx.load(self.sums, place(r, i), lanes) * vx.splat(vx.load(self.decay, r, 1), lanes)
            ),
            lambda r, i, value: vx.store(self.sums, place(r, i), value, lanes),
        )

    def _finish(self) -> None:
        """Divide by the weights' sums; write outputs and log-sum-exps of the rows that exist."""
        c, tile = self.config, self.tile
        lanes = tile.dim_lanes
        with T.serial(0, self.rows) as r:
            partial = T.bind(vx.load(self.mass, r * tile.lanes, tile.lanes))
            total = vx.across(partial, tile.lanes, lambda a, b: a + b)
            vx.store(self.mass, r * tile.lanes, total, tile.lanes)
            vx.store(self.mass, r, vx.load(self.mass, r * tile.lanes, 1), 1)
        with T.serial(0, tile.rows // tile.lanes) as v:
            emit_normalizer(self.top, self.mass, self.inverse, v * tile.lanes, tile.lanes)
        with T.serial(0, self.rows) as r:
            row = T.bind(self.row0 + r)
            where = (self.q0 + row // self.group) * c.num_attention_heads + self.head * self.stride
            at = T.bind(where + row % self.group)
            vx.store(self.lse_flat, at, vx.load(self.top, r, 1), 1)
            if c.returns_lse:
                lse = vx.load(self.top, r, 1)
                emit_carried(c, self.out_flat, where, row % self.group, lse)
            inverse = T.bind(vx.splat(vx.load(self.inverse, r, 1), lanes))
            for d in range(0, c.head_dim, lanes):
                value = vx.load(self.sums, r * c.head_dim + d, lanes) * inverse
                vx.store(self.out_flat, at * c.head_dim + d, value, lanes)
