"""Blocked attention of many queries: against the chunk itself (ragged) or against cached pages.

A row is one (token, head of the group) of a kv head. A workgroup has a tile of rows, whose queries
stay in its memory, and goes over tiles of keys:
    S = Q K, P = exp2(S - max), O = O * decay + P V
K and V take the same memory one after the other. attention_block.py has these steps; here are the
tasks, and what is read and written.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx import truncdiv, truncmod
from tvm.tirx.script import builder as T

from qcc.targets.attention import Mask, Task, aux_buffer, kernel, tensor
from qcc.targets.gpu.kernels.attention_block import Block, Tile
from qcc.targets.gpu.kernels.attention_func import (
    Plan,
    Reg,
    barrier,
    ceil_div,
    f32,
    flat,
    grid,
    keep_int,
    strided,
    when,
)
from qcc.targets.gpu.kernels.attention_keys import PagedKeys, RaggedKeys, Sequences
from qcc.targets.gpu.kernels.attention_mask import RowMask
from qcc.targets.gpu.kernels.attention_rope import Rotation
from qcc.targets.gpu.kernels.attention_score import EVERYTHING, ScoreRule, emit_carried


def prefill_kernel(plan: Plan, paged: bool, mask: Mask) -> Any:
    """The PrimFunc of one slot of the cache."""
    return _Prefill(plan, paged, mask).build()


class _Prefill:
    def __init__(self, plan: Plan, paged: bool, mask: Mask) -> None:
        self.plan, self.config, self.paged, self.kind = plan, plan.config, paged, mask
        self.sliding = mask == "sliding"
        self.rotation: Any = Rotation(plan) if self.sliding else None
        self.tile = Tile(plan, self.rotation.bytes if self.rotation else 0)
        self.mask = RowMask(plan, self.tile.rows, self.tile.keys, paged, mask)

    def build(self) -> Any:
        with kernel(f"{'paged' if self.paged else 'ragged'}_prefill_{self.kind}") as build:
            self._declare()
            with build.body():
                self._tasks()
        return build.result()

    def _declare(self) -> None:
        c, plan = self.config, self.plan
        # The batch's size comes from an index array: a tree kernel gets no array of length batch.
        total, bounds = T.int32(), T.int32()
        self.total, self.batch = total, bounds - 1
        self.sequences = Sequences(plan)
        self.keys: Any = (
            PagedKeys(plan, self.sequences, self.batch, self.sliding)
            if self.paged
            else RaggedKeys(plan, self.sequences, self.batch)
        )
        heads = c.num_attention_heads
        self.q = tensor("q", (total, heads, c.head_dim), c.dtype)
        self.sequences.add("q_indptr", aux_buffer("q_indptr", (bounds,)))
        self.keys.declare()
        self.q_position = aux_buffer("q_rope_position", (total,))
        based = self.sliding or c.layer_window > 0
        if not self.paged and self.kind != "tree":
            k_position = aux_buffer("k_rope_pos_offset", (self.batch,))
            if based:
                self.sequences.add("k_position", k_position)
        if not self.paged and self.kind == "tree":
            self.mask.declare_tree(self.sequences)
        self.out = tensor("output", (total, heads, c.head_dim), c.dtype)
        self.lse = tensor("lse", (total, heads), "float32")
        causal = T.arg("causal", T.int32()) if self.kind != "tree" else None
        T.arg("rotary_mode", T.int32())
        T.arg("rope_scale", T.float32())
        T.arg("rope_theta", T.float32())
        self.rule = ScoreRule(c, T.arg("sm_scale", T.float32()))
        # Of cached keys every one is older than the queries.
        self.mask.causal = None if self.paged else causal
        if self.paged and self.kind == "tree":
            self.mask.declare_tree(self.sequences)

    def _tasks(self) -> None:
        """Find each workgroup's sequence and row tile; sequences have ragged numbers of tiles."""
        c, plan, rows = self.config, self.plan, self.tile.rows
        size = self.total * (c.num_attention_heads * c.head_dim)
        self.queries_in = plan.vectors(self.q, size)
        # A carrier gets single numbers, so that then the output is no array of vectors.
        self.out_flat = (flat if c.returns_lse else plan.vectors)(self.out, size)
        self.lse_flat = flat(self.lse, self.total * c.num_attention_heads)
        self.keys.enter()
        self.sequences.gather(self.batch, self.keys.arrays + 3 + self.mask.buffers)
        count = ceil_div(self.total * c.group, rows) + self.batch
        with grid(self.tile.threads, count, c.num_key_value_heads) as (task, head, thread):
            self.thread, self.head = thread, head
            found, rest, own = Reg(-1, "int32"), Reg(task, "int32"), Reg(0, "int32")
            with T.serial(0, self.batch) as b:
                with when(found.get() < 0):
                    tokens = self.sequences("q_indptr", b + 1) - self.sequences("q_indptr", b)
                    own.set((tokens * c.group + rows - 1) // rows)
                    with T.If(rest.get() < own.get()):
                        with T.Then():
                            found.set(b)
                        with T.Else():
                            rest.set(rest.get() - own.get())
            with when(found.get() >= 0):
                # Late causal tiles are long: they start first.
                self._row_tile(found.get(), keep_int(own.get() - 1 - rest.get()))

    def _row_tile(self, b: Any, row_tile: Any) -> None:
        c, tile = self.config, self.tile
        self.q0 = keep_int(self.sequences("q_indptr", b))
        tokens = keep_int(self.sequences("q_indptr", b + 1) - self.q0)
        self.row0 = keep_int(row_tile * tile.rows)
        self.rows = keep_int(T.min(tile.rows, tokens * c.group - self.row0))
        self.kv_len = self.keys.select(b)
        self.k_base: Any = 0
        if self.sliding or c.layer_window:
            # The ragged tree kernel has no k_position: its keys are its own tokens.
            alone = "k_position" not in self.sequences.columns
            self.k_base = keep_int(
                self.q_position[self.q0] if alone else self.sequences("k_position", b)
            )
        self.scale = self.rule.factor()
        self.block = Block(self.plan, self.tile, self.thread, self.paged)
        task = Task(b, self.q0, tokens, self.kv_len, self.k_base)
        self.mask.enter(task, self.sequences, self.q_position, self.rule)
        if self.rotation:
            self.rotation.prepare(self.thread)
        self._phases()
        self.block.finish(self.rows, self._state, self._output)

    def _token(self, row: Any) -> Any:
        return truncdiv(self.row0 + row, self.config.group)

    def _phases(self) -> None:
        """Go over the keys: once, or first the attention sinks and then the window."""
        c = self.config
        end = keep_int(T.min(self.kv_len, self.mask.after(self._token(self.rows - 1))))
        oldest: Any = 0
        if self.sliding or c.layer_window:
            oldest = keep_int(T.max(self.mask.oldest_seen(self._earliest() - self.k_base), 0))
        if not self.sliding:
            self._pass(keep_int(T.min(oldest, end)), end, 0, None, None)
            return
        window, sinks = c.sliding_window_size, c.attention_sink_size
        sink_end = keep_int(T.min(T.max(sinks - self.k_base, 0), end))
        with T.serial(0 if sinks else 1, 2) as phase:
            in_window = phase == 1
            begin = keep_int(T.Select(in_window, T.min(T.max(sink_end, oldest), end), 0))
            stop = keep_int(T.Select(in_window, end, sink_end))
            shift = keep_int(T.Select(in_window, self.keys.skip, 0))
            last = keep_int(T.Select(in_window, EVERYTHING, window - 1))
            self._pass(begin, stop, shift, in_window, last)

    def _earliest(self) -> Any:
        """The least position of the tile's tokens: queries of several sequences may meet in it."""
        first, last = keep_int(self._token(0)), keep_int(self._token(self.rows - 1))
        found = Reg(self.q_position[self.q0 + first], "int32")
        with T.serial(first + 1, last + 1) as token:
            found.set(T.min(found.get(), self.q_position[self.q0 + token]))
        return found.get()

    def _pass(self, begin: Any, stop: Any, shift: Any, in_window: Any, last: Any) -> None:
        """Take the keys from begin to stop, whose slots are `shift` further.

        Queries are rotated as if their positions were at most `last`.
        """
        barrier()  # what an earlier pass left is no longer read

        def bounds(r: Any) -> None:
            with T.If(r < self.rows):
                with T.Then():
                    self.mask.row(r, self._token(r), begin, stop, in_window)
                with T.Else():
                    T.buffer_store(self.mask.low, 0, [r])
                    T.buffer_store(self.mask.high, 0, [r])

        strided(self.tile.rows, self.thread, self.tile.threads, bounds)
        self._load_queries(last)
        barrier()
        keys = self.tile.keys
        factor = self.scale * f32(self.rotation.scale if self.rotation else 1.0)
        with T.serial(0, keep_int((T.max(stop - begin, 0) + keys - 1) // keys)) as t:
            self.first = keep_int(begin + t * keys)
            self.count = keep_int(T.min(keys, stop - self.first))
            self._stage_keys(shift)
            barrier()
            self.block.score(self.first, self.mask, self.rule, factor)
            barrier()
            self.block.maximum()
            self._stage_values(shift)
            barrier()
            self.block.softmax()
            barrier()
            self.block.values(self.count)
            barrier()

    def _load_queries(self, last: Any) -> None:
        plan, c = self.plan, self.config
        steps = self.rotation.steps if self.rotation else plan.chunks

        def one(i: Any) -> None:
            r, step = T.bind(i // steps), T.bind(i % steps)
            with when(r < self.rows):
                token = self.q0 + self._token(r)
                head = self.head * plan.stride + truncmod(self.row0 + r, c.group)
                base = keep_int((token * c.num_attention_heads + head) * plan.chunks)
                if not self.rotation:
                    T.buffer_store(self.block.queries, self.queries_in[base + step], [i])
                    return
                self.rotation.step(
                    step,
                    keep_int(T.min(self.q_position[token], last)),
                    lambda chunk: plan.load(self.queries_in, base + chunk),
                    lambda chunk, value: plan.store(
                        self.block.queries, r * plan.chunks + chunk, value
                    ),
                )

        strided(self.tile.rows * steps, self.thread, self.tile.threads, one)

    def _stage_keys(self, shift: Any) -> None:
        """cells[chunk, key] <- the tile's keys, rotated if the cache has them unrotated."""
        plan, keys, threads = self.plan, self.tile.keys, self.tile.threads
        cells, pitch = self.block.cells, self.block.pitch
        steps = self.rotation.steps if self.rotation else plan.chunks

        def one(key: Any, step: Any, cell_at: Any) -> None:
            if not self.rotation:
                T.buffer_store(cells, cell_at(step), [step * pitch + key])
                return
            self.rotation.step(
                step,
                keep_int(self.k_base + self.first + key),
                lambda chunk: plan.cast(cell_at(chunk), "float32"),
                lambda chunk, value: plan.store(cells, chunk * pitch + key, value),
            )

        if self.paged:  # a thread has one key
            key, own = T.bind(self.thread % keys), T.bind(self.thread // keys)
            with when(key < self.count):
                cell_at = self.keys.key_at(keep_int(self.first + shift + key), self.head)
                strided(steps, own, threads // keys, lambda i: one(key, i, cell_at))
        else:

            def cell(i: Any) -> None:
                key, step = T.bind(i // steps), T.bind(i % steps)
                with when(key < self.count):
                    one(key, step, self.keys.key_at(self.first + key, self.head))

            strided(keys * steps, self.thread, threads, cell)
        if self.kind == "tree":
            with when(self.thread < self.count):
                self.mask.key(self.thread, keep_int(self.first + self.thread))

    def _stage_values(self, shift: Any) -> None:
        """cells[key, chunk] <- the tile's values."""
        plan = self.plan

        def one(i: Any) -> None:
            key, chunk = T.bind(i // plan.chunks), T.bind(i % plan.chunks)
            with when(key < self.count):
                slot = self.first + shift + key
                T.buffer_store(self.block.cells, self.keys.value_at(slot, self.head, chunk), [i])

        strided(self.tile.keys * plan.chunks, self.thread, self.tile.threads, one)

    def _state(self, row: Any, lse: Any) -> None:
        first, member = self._out_row(row)
        T.buffer_store(self.lse_flat, lse, [first + member])
        if self.config.returns_lse:
            emit_carried(self.plan, self.out_flat, first, member, lse)

    def _output(self, row: Any, chunk: Any, value: Any) -> None:
        first, member = self._out_row(row)
        self.plan.store(self.out_flat, (first + member) * self.plan.chunks + chunk, value)

    def _out_row(self, row: Any) -> tuple[Any, Any]:
        """Where the group of a row begins in the output, and the row's number in the group."""
        token = self.q0 + self._token(row)
        first = token * self.config.num_attention_heads + self.head * self.plan.stride
        return keep_int(first), keep_int(truncmod(self.row0 + row, self.config.group))
