"""Which keys the rows of a prefill task see: causally, in a rolling window, or in a token tree.

A row sees the keys low <= key < high; in a tree, those of them that are its node's ancestors. A
layer's own window (KVCacheConfig.layer_window) goes with causal attention and with trees. It goes
by positions, which in a tree are not the places of the keys.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from qcc.targets.attention import Mask, Task, aux_buffer
from qcc.targets.gpu.kernels.attention_func import Plan, Reg, keep_int, shared, when
from qcc.targets.gpu.kernels.attention_keys import Sequences
from qcc.targets.gpu.kernels.attention_score import EVERYTHING, ScoreRule


class RowMask:
    """Emits the mask of a kernel; plain sees every key, when ragged and `causal` no later ones.

    Of a tile's rows the bounds are in workgroup memory; of a tree also each row's own node, and of
    each key the nodes that see it.
    """

    def __init__(self, plan: Plan, rows: int, keys: int, paged: bool, kind: Mask) -> None:
        self.config, self.limits, self.rows, self.keys = plan.config, plan.limits, rows, keys
        self.paged, self.kind = paged, kind
        c = self.config
        self.reach = c.sliding_window_size - c.attention_sink_size
        self.windowed_tree = kind == "tree" and c.layer_window > 0
        self.causal: Any = None  # the call's argument of that name

    @property
    def buffers(self) -> int:
        """Storage buffers besides those of `sequences`."""
        of_positions = self.kind == "sliding" or self.config.layer_window > 0
        return (self.kind == "tree") + of_positions

    def declare_tree(self, sequences: Sequences) -> None:
        """Node i of sequence b's tree covers the preorder range tree_order[tree_indptr[b] + i]."""
        count, nodes = T.int32(), T.int32()
        sequences.add("tree_indptr", aux_buffer("tree_indptr", (count,)))
        shape = (nodes, 2) if self.limits.paired_trees else (nodes,)
        self.tree_order = aux_buffer("tree_order", shape)

    def _range(self, node: Any, end: int) -> Any:
        """Where the preorder range of a node begins (end 0) or ends (1)."""
        paired = self.limits.paired_trees
        return self.tree_order[node, end] if paired else self.tree_order[node * 2 + end]

    def enter(self, task: Task, sequences: Sequences, q_position: Any, rule: ScoreRule) -> None:
        """At the start of a task."""
        self.task, self.q_position, self.rule = task, q_position, rule
        self.low, self.high = (shared(self.rows, "int32") for _ in range(2))
        if self.kind == "tree":
            self.own = shared(self.rows, "int32")
            self.first, self.last = (shared(self.keys, "int32") for _ in range(2))
            self.tree0 = keep_int(sequences("tree_indptr", task.b))
            self.nodes = keep_int(sequences("tree_indptr", task.b + 1) - self.tree0)
        if self.windowed_tree:
            # Positions from here on are relative to that of key 0.
            self.oldest = shared(self.rows, "int32")
            self.positions = shared(self.keys, "int32")

    def after(self, token: Any) -> Any:
        """One past the last key that a token of the chunk sees."""
        if self.paged or self.kind == "tree":
            return self.task.kv_len
        if self.kind == "sliding":
            return token + 1
        return T.Select(self.causal != 0, token + 1, self.task.kv_len)

    def oldest_seen(self, position: Any) -> Any:
        """The first key that a query at a position, relative to key 0, sees of a window."""
        if self.kind == "sliding":
            return position - self.reach + 1
        return self.rule.oldest(position)

    def row(self, r: Any, token: Any, begin: Any, stop: Any, in_window: Any) -> None:
        """Keep what `seen` asks of row r, in a pass over the keys begin <= key < stop.

        Of the sinks every row sees all, of a rolling window (`in_window`) only what it reaches.
        """
        task, c = self.task, self.config
        low, high = Reg(begin, "int32"), T.min(stop, self.after(token))
        if self.kind == "sliding" or c.layer_window:
            position = keep_int(self.q_position[task.q0 + token] - task.k_base)
        if self.kind == "sliding":
            low.set(T.Select(in_window, T.max(begin, self.oldest_seen(position)), begin))
        if self.kind == "tree":
            node = self.tree0 + T.max(token + self.nodes - task.tokens, 0)
            own = Reg(0, "int32")
            with when(self.nodes > 0):
                own.set(self._range(node, 0))
            T.buffer_store(self.own, own.get(), [r])
        if c.layer_window:
            oldest = keep_int(self.oldest_seen(position))
            if self.windowed_tree:
                T.buffer_store(self.oldest, oldest, [r])
            # No key comes before its position, in a tree either.
            low.set(T.max(low.get(), oldest))
        T.buffer_store(self.low, low.get(), [r])
        T.buffer_store(self.high, high, [r])

    def key(self, j: Any, key: Any) -> None:
        """Keep what `seen` asks of the key at place j of the tile, an existing one."""
        if self.kind != "tree":
            return
        # Keys before the tree are seen by all of its nodes.
        node = keep_int(key - (self.task.kv_len - self.nodes))
        first, last = Reg(-EVERYTHING, "int32"), Reg(EVERYTHING, "int32")
        with when(node >= 0):
            first.set(self._range(self.tree0 + node, 0))
            last.set(self._range(self.tree0 + node, 1))
        T.buffer_store(self.first, first.get(), [j])
        T.buffer_store(self.last, last.get(), [j])
        if self.windowed_tree:
            self._key_position(j, key, node, first)

    def _key_position(self, j: Any, key: Any, node: Any, own: Reg) -> None:
        """The position of a node is that of the tree's first plus the number of its ancestors."""
        if not self.paged:  # keys are the queries' own tokens
            position = self.q_position[self.task.q0 + key] - self.task.k_base
            T.buffer_store(self.positions, position, [j])
            return
        depth = Reg(0, "int32")
        with T.serial(0, T.max(node, 0)) as other:
            at = self.tree0 + other
            first, last = self._range(at, 0), self._range(at, 1)
            above = T.bitwise_and(first < own.get(), own.get() < last)
            depth.set(depth.get() + T.Select(above, 1, 0))
        T.buffer_store(self.positions, key - T.max(node, 0) + depth.get(), [j])

    def seen(self, r: Any, key: Any, j: Any) -> Any:
        """Whether row r sees a key, which is at place j of the tile."""
        found = T.bitwise_and(key >= self.low[r], key < self.high[r])
        if self.kind == "tree":
            own = self.own[r]
            ancestor = T.bitwise_and(own >= self.first[j], own < self.last[j])
            found = T.bitwise_and(found, ancestor)
        if self.windowed_tree:
            found = T.bitwise_and(found, self.positions[j] >= self.oldest[r])
        return found
