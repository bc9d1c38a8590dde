"""Which keys the rows of a prefill task see: causally, in a rolling window, or in a token tree.

A row sees the keys low <= key < high; in a tree, those of them that are its node's ancestors. A
layer's own window (KVCacheConfig.layer_window) goes with causal attention and with trees. It goes
by positions, which in a tree are not the places of the keys.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from qcc.targets.attention import Mask, Task, aux_buffer
from qcc.targets.cpu.kernels import vectors as vx
from qcc.targets.cpu.kernels.attention import EVERYTHING, ScoreRule, Tile, when
from qcc.targets.spec import KVCacheConfig


class RowMask:
    """Emits the mask of a kernel; plain sees every key, when ragged and `causal` no later ones."""

    def __init__(self, config: KVCacheConfig, tile: Tile, paged: bool, kind: Mask) -> None:
        self.config, self.tile, self.paged, self.kind = config, tile, paged, kind
        self.reach = config.sliding_window_size - config.attention_sink_size
        self.causal: Any = None  # the call's argument of that name

    def declare_tree(self) -> None:
        """Node i of sequence b's tree covers the preorder range tree_order[tree_indptr[b] + i]."""
        count, nodes = T.int32(), T.int32()
        self.tree_indptr = aux_buffer("tree_indptr", (count,))
        self.tree_order = aux_buffer("tree_order", (nodes, 2))

    def enter(self, task: Task, q_position: Any, rule: ScoreRule) -> None:
        """At the start of a task."""
        self.task, self.q_position, self.rule = task, q_position, rule
        rows, keys = (self.tile.rows,), (self.tile.keys,)
        self.low, self.high = (T.alloc_buffer(rows, "int32") for _ in range(2))
        if self.kind == "tree":
            self.own = T.alloc_buffer(rows, "int32")
            self.bounds = [T.alloc_buffer(keys, "int32") for _ in range(2)]
            self.tree0 = T.bind(self.tree_indptr[task.b])
            self.nodes = T.bind(self.tree_indptr[task.b + 1] - self.tree0)
        if self.config.layer_window and self.kind == "tree":
            # Positions from here on are relative to that of key 0.
            self.oldest = T.alloc_buffer(rows, "int32")
            self.positions = T.alloc_buffer(keys, "int32")

    def after(self, token: Any) -> Any:
        """One past the last key that a token of the chunk sees."""
        if self.kind == "sliding":
            return token + 1
        return T.Select(self.causal != 0, token + 1, self.task.kv_len)

    def begin_rows(self, begin: Any, stop: Any, in_window: Any) -> None:
        """Before the rows of a pass over the keys begin <= key < stop.

        Of the sinks every row sees all, of a rolling window (`in_window`) only what it reaches.
        """
        self.begin, self.stop, self.in_window = begin, stop, in_window
        self.first_seen = vx.Reg(1, stop, "int32")
        with T.serial(0, self.tile.rows) as r:
            vx.store(self.low, r, 0, 1)
            vx.store(self.high, r, 0, 1)
            if self.kind == "tree":
                vx.store(self.own, r, 0, 1)

    def row(self, r: Any, token: Any) -> None:
        """Keep what `seen` asks of row r."""
        task, c = self.task, self.config
        low, high = self.begin, self.stop
        if self.kind != "tree" and not self.paged:
            high = T.min(high, vx.keep_int(self.after(token)))
        position = self.q_position[task.q0 + token] - task.k_base
        if self.kind == "sliding":
            oldest = vx.keep_int(T.Select(self.in_window, position - self.reach + 1, low))
            low = T.max(low, oldest)
        if self.kind == "tree":
            node = self.tree0 + T.max(token + self.nodes - task.tokens, 0)
            value = T.if_then_else(self.nodes > 0, self.tree_order[node, 0], 0)
            vx.store(self.own, r, value, 1)
        if c.layer_window:
            oldest = vx.keep_int(self.rule.oldest(position))
            if self.kind == "tree":
                vx.store(self.oldest, r, oldest, 1)
            # No key comes before its position, in a tree either.
            low = T.max(low, oldest)
        low = vx.keep_int(low)
        vx.store(self.low, r, low, 1)
        vx.store(self.high, r, high, 1)
        self.first_seen.set(T.min(self.first_seen.get(), low))

    def first_key(self) -> Any:
        """The first key that a row of the task sees, after `row` of all; `stop` if none does."""
        return vx.keep_int(self.first_seen.get())

    def of_block(self, row: Any, count: Any) -> tuple[Any, Any]:
        """The first key that one of `count` rows sees, and one past the last."""
        low, high = vx.Reg(1, EVERYTHING, "int32"), vx.Reg(1, 0, "int32")
        with T.serial(0, count) as r:
            low.set(T.min(low.get(), vx.load(self.low, row + r, 1)))
            high.set(T.max(high.get(), vx.load(self.high, row + r, 1)))
        return low.get(), high.get()

    def key(self, j: Any, key: Any) -> None:
        """Keep what `seen` asks of the key at place j of the tile."""
        if self.kind != "tree":
            return
        # Keys before the tree are seen by all of its nodes.
        node = T.bind(T.min(key, self.stop - 1) - (self.task.kv_len - self.nodes))
        at = T.max(node, 0) + self.tree0
        low = T.if_then_else(node < 0, -(1 << 30), self.tree_order[at, 0])
        high = T.if_then_else(node < 0, 1 << 30, self.tree_order[at, 1])
        vx.store(self.bounds[0], j, low, 1)
        vx.store(self.bounds[1], j, high, 1)
        if self.config.layer_window:
            self._key_position(j, T.min(key, self.stop - 1), node)

    def _key_position(self, j: Any, key: Any, node: Any) -> None:
        """The position of a node is that of the tree's first plus the number of its ancestors."""
        if not self.paged:  # keys are the queries' own tokens
            position = self.q_position[self.task.q0 + key] - self.task.k_base
            vx.store(self.positions, j, position, 1)
            return
        vx.store(self.positions, j, key - T.max(node, 0), 1)
        with when(node > 0):
            own = T.bind(self.tree_order[self.tree0 + node, 0])
            with T.serial(0, node) as other:
                at = self.tree0 + other
                above = T.bitwise_and(self.tree_order[at, 0] < own, own < self.tree_order[at, 1])
                depth = vx.load(self.positions, j, 1) + vx.cast(above, "int32", 1)
                vx.store(self.positions, j, depth, 1)

    def seen(self, row: Any, key: Any, place: Any) -> Any:
        """Which keys of a vector a row sees: from `key` on, which is at `place` of the tile."""
        lanes = self.tile.lanes
        wide = vx.splat(key, lanes) + vx.constants(list(range(lanes)), "int32")
        high = wide < vx.splat(vx.load(self.high, row, 1), lanes)
        if self.kind != "tree":
            return T.bitwise_and(high, wide >= vx.splat(vx.load(self.low, row, 1), lanes))
        own = vx.splat(vx.load(self.own, row, 1), lanes)
        first, last = (vx.load(b, place, lanes) for b in self.bounds)
        seen = T.bitwise_and(high, T.bitwise_and(own >= first, own < last))
        if not self.config.layer_window:
            return seen
        oldest = vx.splat(vx.load(self.oldest, row, 1), lanes)
        return T.bitwise_and(seen, vx.load(self.positions, place, lanes) >= oldest)
