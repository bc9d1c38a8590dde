"""Blocked attention of many queries: against the chunk itself (ragged) or against cached pages.

A row is one (token, head of the group) of a kv head. A task takes `tile.rows` rows: lanes hold
rows, so that maxima and sums over keys need no shuffles. For each tile of keys
    S = K Q^T (key_block keys x all rows in registers), P = exp2(S - max), O = O * scale + P V.
Tasks run in parallel over (kv head, sequence, row tile).
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from qcc.targets.cpu.kernels import attention_vector as vx
from qcc.targets.cpu.kernels.attention import (
    MASKED,
    NO_KEY,
    PagedKeys,
    RaggedKeys,
    ScoreRule,
    Tile,
    emit_carried,
    emit_normalizer,
    emit_pv,
    when,
)
from qcc.targets.cpu.kernels.attention_func import aux_buffer, kernel, tensor
from qcc.targets.cpu.kernels.attention_mask import Mask, RowMask, Task
from qcc.targets.cpu.kernels.rope import Rotation
from qcc.targets.spec import PAGE_SIZE, KVCacheConfig


def prefill_kernel(config: KVCacheConfig, tile: Tile, paged: bool, mask: Mask) -> Any:
    """The PrimFunc of one slot of the cache."""
    return _Prefill(config, tile, paged, mask).build()


class _Prefill:
    def __init__(self, config: KVCacheConfig, tile: Tile, paged: bool, mask: Mask) -> None:
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
        rows = (total, c.num_attention_heads, c.head_dim)
        self.q = tensor("q", rows, c.dtype)
        self.q_indptr = aux_buffer("q_indptr", (bounds,))
        self.keys.declare()
        self.k_position: Any = self.keys.k_position if self.paged else None
        self.q_position = aux_buffer("q_rope_position", (total,))
        if not self.paged and self.kind != "tree":
            self.k_position = aux_buffer("k_rope_pos_offset", (self.batch,))
        if not self.paged and self.kind == "tree":
            self.mask.declare_tree()
        self.out = tensor("output", rows, c.dtype)
        self.lse = tensor("lse", rows[:2], "float32")
        causal = T.arg("causal", T.int32()) if self.kind != "tree" else None
        T.arg("rotary_mode", T.int32())
        T.arg("rope_scale", T.float32())
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
        tiles = T.bind((self.total * self.group + rows - 1) // rows + self.batch)
        with T.parallel(0, tiles * c.num_key_value_heads) as task:
            found = vx.Reg(1, -1, "int32")
            rest = vx.Reg(1, task % tiles, "int32")
            count = vx.Reg(1, 0, "int32")
            with T.serial(0, self.batch) as b:
                with when(found.get() < 0):
                    tokens = self.q_indptr[b + 1] - self.q_indptr[b]
                    count.set((tokens * self.group + rows - 1) // rows)
                    with T.If(rest.get() < count.get()):
                        with T.Then():
                            found.set(b)
                        with T.Else():
                            rest.set(rest.get() - count.get())
            with when(found.get() >= 0):
                # Late causal tiles are long: alternating from both ends balances the threads.
                turn = T.bind(rest.get())
                half = T.shift_right(turn, 1)
                last = count.get() - 1 - half
                row_tile = vx.keep_int(T.Select(T.bitwise_and(turn, 1) == 0, half, last))
                self._row_tile(T.bind(found.get()), T.bind(task // tiles), row_tile)

    def _row_tile(self, b: Any, head: Any, row_tile: Any) -> None:
        c, tile, group = self.config, self.tile, self.group
        dim, width = c.head_dim, tile.rows
        self.q0 = T.bind(self.q_indptr[b])
        tokens = T.bind(self.q_indptr[b + 1] - self.q0)
        self.row0 = T.bind(row_tile * width)
        self.rows = vx.keep_int(T.min(width, tokens * group - self.row0))
        self.head = head
        self.kv_len = self.keys.select(b, head)
        self.k_base: Any = 0
        if self.sliding or c.layer_window:
            # The ragged tree kernel has no k_position: its keys are its own tokens.
            alone = self.k_position is None
            self.k_base = T.bind(self.q_position[self.q0] if alone else self.k_position[b])
        # Scratch: queries [d, rows], scores [keys, rows], outputs [rows, d].
        self.queries = T.alloc_buffer((dim * width,), "float32")
        self.scores = T.alloc_buffer((tile.keys * width,), "float32")
        self.sums = T.alloc_buffer((width * dim,), "float32")
        self.offsets = T.alloc_buffer((tile.keys,), "int64")
        self.top = T.alloc_buffer((width,), "float32")
        self.mass = T.alloc_buffer((width,), "float32")
        self.decay = T.alloc_buffer((width,), "float32")
        task = Task(b, self.q0, tokens, self.kv_len, self.k_base)
        self.mask.enter(task, self.q_position, self.rule)
        if self.sliding:
            self.rotated = T.alloc_buffer((tile.keys * dim,), "float32")
            self.row = T.alloc_buffer((dim,), "float32")
            self.rotation.prepare(PAGE_SIZE)
        for v in range(0, width, tile.lanes):
            vx.store(self.top, v, vx.splat(NO_KEY, tile.lanes), tile.lanes)
            vx.store(self.mass, v, vx.splat(0.0, tile.lanes), tile.lanes)
        with T.serial(0, width * dim // tile.dim_lanes) as i:
            zero = vx.splat(0.0, tile.dim_lanes)
            vx.store(self.sums, i * tile.dim_lanes, zero, tile.dim_lanes)
        self._phases()
        self._finish()

    def _phases(self) -> None:
        """Go over the keys: once, or first the attention sinks and then the window."""
        last_token = T.bind((self.row0 + self.rows - 1) // self.group)
        end = self.kv_len
        if not self.paged and self.kind != "tree":
            end = vx.keep_int(T.min(end, self.mask.after(last_token)))
        if not self.sliding:
            self._load_queries(None)
            self._key_tiles(self.mask.begin(end), end)
            return
        window, sinks = self.config.sliding_window_size, self.config.attention_sink_size
        sink_end = vx.keep_int(T.min(T.max(sinks - self.k_base, 0), end))
        first = self.q_position[self.q0 + T.floordiv(self.row0, self.group)]
        oldest = first - (window - sinks) + 1 - self.k_base
        # Sinks see the query where StreamingLLM puts it: at most at the end of a full window.
        with T.serial(0 if sinks else 1, 2) as phase:
            in_window = phase == 1
            self.mask.in_window = in_window
            begin = vx.keep_int(T.Select(in_window, T.max(sink_end, oldest), 0))
            stop = vx.keep_int(T.Select(in_window, end, sink_end))
            with when(begin < stop):
                self._load_queries(T.Select(in_window, 1 << 30, window - 1))
                self._key_tiles(begin, stop)

    def _load_queries(self, position_limit: Any) -> None:
        """Scaled queries, transposed, and each row's mask.

        Lanes of rows that do not exist keep what is in memory: no lane reads another.
        """
        c, tile = self.config, self.tile
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
                source, start = self.row, 0
            with T.serial(0, c.head_dim) as d:
                value = vx.load(source, start + d, 1) * self.scale
                vx.store(self.queries, d * tile.rows + r, value, 1)

    def _key_tiles(self, begin: Any, stop: Any) -> None:
        tile = self.tile
        self.mask.stop = stop
        with T.serial(0, (stop - begin + tile.keys - 1) // tile.keys) as t:
            first = T.bind(begin + t * tile.keys)
            count = vx.keep_int(T.min(tile.keys, stop - first))
            with T.serial(0, (count + PAGE_SIZE - 1) // PAGE_SIZE * PAGE_SIZE) as j:
                key = vx.keep_int(T.min(first + j, stop - 1))
                vx.store(self.offsets, j, self.keys.offset(key), 1)
                self.mask.key(j, key)
            if self.rotation:
                self._rotate_keys(first, count)
            self._score(first, count)
            self._softmax((count + tile.key_block - 1) // tile.key_block * tile.key_block)
            emit_pv(
                tile,
                self.rows,
                tile.rows_at_once(tile.rows),
                self.sums,
                lambda row: vx.load(self.decay, row, 1),
                lambda key, row: vx.load(self.scores, key * tile.rows + row, 1),
                count,
                lambda key: (self.keys.v, vx.load(self.offsets, key, 1) + self.keys.v_shift),
            )

    def _rotate_keys(self, first: Any, count: Any) -> None:
        dim = self.config.head_dim
        with T.serial(0, (count + PAGE_SIZE - 1) // PAGE_SIZE) as g:
            self.rotation.keys(
                PAGE_SIZE,
                T.bind(self.k_base + first + g * PAGE_SIZE),
                lambda k, d, lanes: vx.load(
                    self.keys.k, vx.load(self.offsets, g * PAGE_SIZE + k, 1) + d, lanes
                ),
                lambda k, d, value, lanes: vx.store(
                    self.rotated, (g * PAGE_SIZE + k) * dim + d, value, lanes
                ),
            )

    def _score(self, first: Any, count: Any) -> None:
        """scores[key, row] = K[key] . Q[row], masked."""
        tile, lanes, dim = self.tile, self.tile.lanes, self.config.head_dim
        with T.serial(0, (count + tile.key_block - 1) // tile.key_block) as block:
            place0 = T.bind(block * tile.key_block)
            if self.rotation:
                source = self.rotated
                at = [T.bind((place0 + k) * dim) for k in range(tile.key_block)]
            else:
                source = self.keys.k
                at = [T.bind(vx.load(self.offsets, place0 + k, 1)) for k in range(tile.key_block)]
            cells = [(k, v) for k in range(tile.key_block) for v in range(tile.row_vectors)]
            sums = {cell: vx.Reg(lanes, vx.splat(0.0, lanes)) for cell in cells}
            with T.serial(0, dim) as d:
                queries = [
                    T.bind(vx.load(self.queries, d * tile.rows + v * lanes, lanes))
                    for v in range(tile.row_vectors)
                ]
                for k in range(tile.key_block):
                    value = T.bind(vx.splat(vx.load(source, at[k] + d, 1), lanes))
                    for v, query in enumerate(queries):
                        sums[k, v].set(vx.fma(value, query, sums[k, v].get(), lanes))
            for k, v in cells:
                place = place0 + k
                score = T.Select(
                    self.mask.seen(first + place, place, v),
                    self.rule.capped(sums[k, v].get(), lanes),
                    vx.splat(MASKED, lanes),
                )
                vx.store(self.scores, place * tile.rows + v * lanes, score, lanes)

    def _softmax(self, count: Any) -> None:
        """Scores become weights relative to the new maximum; decay is what the old sums keep."""
        tile, lanes = self.tile, self.tile.lanes
        for v in range(0, tile.rows, lanes):
            old = T.bind(vx.load(self.top, v, lanes))
            top = vx.Reg(lanes, old)
            with T.serial(0, count) as key:
                top.set(T.max(top.get(), vx.load(self.scores, key * tile.rows + v, lanes)))
            new = T.bind(top.get())
            decay = vx.exp2(old - new, lanes)
            mass = vx.Reg(lanes, vx.load(self.mass, v, lanes) * decay)
            with T.serial(0, count) as key:
                weight = vx.exp2(vx.load(self.scores, key * tile.rows + v, lanes) - new, lanes)
                mass.set(mass.get() + weight)
                vx.store(self.scores, key * tile.rows + v, weight, lanes)
            vx.store(self.top, v, new, lanes)
            vx.store(self.mass, v, mass.get(), lanes)
            vx.store(self.decay, v, decay, lanes)

    def _finish(self) -> None:
        """Divide by the weights' sums; write outputs and log-sum-exps of the rows that exist."""
        c, tile = self.config, self.tile
        for v in range(0, tile.rows, tile.lanes):
            emit_normalizer(self.top, self.mass, self.decay, v, tile.lanes)
        with T.serial(0, self.rows) as r:
            row = T.bind(self.row0 + r)
            where = (self.q0 + row // self.group) * c.num_attention_heads + self.head * self.stride
            at = T.bind(where + row % self.group)
            vx.store(self.lse_flat, at, vx.load(self.top, r, 1), 1)
            if c.returns_lse:
                lse = vx.load(self.top, r, 1)
                emit_carried(c, self.out_flat, where, row % self.group, lse)
            inverse = T.bind(vx.splat(vx.load(self.decay, r, 1), tile.dim_lanes))
            for d in range(0, c.head_dim, tile.dim_lanes):
                value = vx.load(self.sums, r * c.head_dim + d, tile.dim_lanes) * inverse
                vx.store(self.out_flat, at * c.head_dim + d, value, tile.dim_lanes)
