"""Which keys the rows of a prefill task see: causally, in a rolling window, or in a token tree.

A layer's own window (KVCacheConfig.layer_window) goes with causal attention and with trees. It goes
by positions, which in a tree are not the places of the keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tvm.tirx.script import builder as T

from qcc.targets.cpu.kernels import attention_vector as vx
from qcc.targets.cpu.kernels.attention import EVERYTHING, ScoreRule, Tile, when
from qcc.targets.cpu.kernels.attention_func import aux_buffer
from qcc.targets.spec import KVCacheConfig

Mask = Literal["plain", "sliding", "tree"]


@dataclass(frozen=True)
class Task:
    """The sequence of a task: its tokens from q0 on, its keys, and the position of the first."""

    b: Any
    q0: Any
    tokens: Any
    kv_len: Any
    k_base: Any


class RowMask:
    """Emits the mask of a kernel; plain sees every key, when ragged and `causal` no later ones."""

    def __init__(self, config: KVCacheConfig, tile: Tile, paged: bool, kind: Mask) -> None:
        self.config, self.tile, self.paged, self.kind = config, tile, paged, kind
        self.reach = config.sliding_window_size - config.attention_sink_size
        # Of the running pass over the keys: one past its last, and whether it is over the window.
        self.stop: Any = None
        self.in_window: Any = None
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
        self.row_info = T.alloc_buffer(rows, "int32")
        if self.kind == "tree":
            self.bounds = [T.alloc_buffer(keys, "int32") for _ in range(2)]
            self.tree0 = T.bind(self.tree_indptr[task.b])
            self.nodes = T.bind(self.tree_indptr[task.b + 1] - self.tree0)
        if self.config.layer_window:
            # Positions from here on are relative to that of key 0.
            self.oldest = T.alloc_buffer(rows, "int32")
            self.first_seen = vx.Reg(1, EVERYTHING, "int32")
            if self.kind == "tree":
                self.positions = T.alloc_buffer(keys, "int32")

    def after(self, token: Any) -> Any:
        """One past the last key that a token of the chunk sees."""
        if self.kind == "sliding":
            return token + 1
        return T.Select(self.causal != 0, token + 1, self.task.kv_len)

    def row(self, r: Any, token: Any) -> None:
        """Keep what `seen` asks of row r.

        plain: one past the last key; sliding: the first key of the window; tree: preorder.
        """
        task = self.task
        if self.kind == "tree":
            node = self.tree0 + T.max(token + self.nodes - task.tokens, 0)
            value = T.if_then_else(self.nodes > 0, self.tree_order[node, 0], 0)
        elif self.kind == "sliding":
            value = self.q_position[task.q0 + token] - self.reach + 1 - task.k_base
        else:
            value = task.kv_len if self.paged else vx.keep_int(self.after(token))
        vx.store(self.row_info, r, value, 1)
        if self.config.layer_window:
            position = self.q_position[task.q0 + token] - task.k_base
            oldest = vx.keep_int(self.rule.oldest(position))
            vx.store(self.oldest, r, oldest, 1)
            self.first_seen.set(T.min(self.first_seen.get(), oldest))

    def begin(self, stop: Any) -> Any:
        """Where to start on the keys, after `row` of all rows: no key comes before its position."""
        if not self.config.layer_window:
            return 0
        return vx.keep_int(T.min(T.max(self.first_seen.get(), 0), stop))

    def key(self, j: Any, key: Any) -> None:
        """Keep what `seen` asks of the key at place j of the tile."""
        if self.kind != "tree":
            return
        # Keys before the tree are seen by all of its nodes.
        node = T.bind(key - (self.task.kv_len - self.nodes))
        at = T.max(node, 0) + self.tree0
        low = T.if_then_else(node < 0, -(1 << 30), self.tree_order[at, 0])
        high = T.if_then_else(node < 0, 1 << 30, self.tree_order[at, 1])
        vx.store(self.bounds[0], j, low, 1)
        vx.store(self.bounds[1], j, high, 1)
        if self.config.layer_window:
            self._key_position(j, key, node)

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

    def seen(self, key: Any, place: Any, v: int) -> Any:
        """Which rows of vector v see a key; `place` is its place in the tile."""
        lanes = self.tile.lanes
        info = vx.load(self.row_info, v * lanes, lanes)
        wide = vx.splat(key, lanes)
        if self.kind == "tree":
            low, high = (vx.splat(vx.load(b, place, 1), lanes) for b in self.bounds)
            seen = T.bitwise_and(info >= low, info < high)
            seen = T.bitwise_and(seen, wide < vx.splat(self.task.kv_len, lanes))
        elif self.kind == "sliding":
            # Of the sinks every row sees all; of the window, from its oldest key on.
            old = T.Select(self.in_window, key, EVERYTHING)
            seen = T.bitwise_and(vx.splat(old, lanes) >= info, wide < vx.splat(self.stop, lanes))
            if not self.paged:
                # In the chunk a row is where its window starts, plus the window's length.
                seen = T.bitwise_and(seen, wide < info + vx.splat(self.reach, lanes))
        else:
            seen = wide < info
        if not self.config.layer_window:
            return seen
        if self.kind == "tree":
            wide = vx.splat(vx.load(self.positions, place, 1), lanes)
        return T.bitwise_and(seen, wide >= vx.load(self.oldest, v * lanes, lanes))
