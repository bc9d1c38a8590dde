"""Attention in numpy float64, of sequences whose keys and values lie in pages of TVM's cache.

A sequence brings queries and keys; `PagedBatch` lays the keys of several into pages in a random
order, between garbage, and calls the kernels of a cache with the arrays that TVM would give them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from qcc.targets.gpu.kv_cache import kv_kernels
from qcc.targets.gpu.limits import Limits
from qcc.targets.spec import PAGE_SIZE, KVCacheConfig, KVKernels

from ..attention_session import config, rotate
from ..wgsl import Compiled, garbage

# f32 sums of up to 1000 terms of order 1, against float64; f16: outputs of order 1, rounded to 11
# bits, and inputs that are exact.
TOLERANCE = {"float32": 1e-5, "float16": 1e-3}
# Queries and keys that a kernel rotates itself are rounded to 11 bits: a score of order 1, and so a
# weight, is off by 2^-10.
ROTATED = 5e-3
NO_KEY = -1e29  # any log-sum-exp below is that of a row without keys
LIMITS = Limits()


def gpu_config(dtype: str = "float32", max_positions: int = 1024, **shape: Any) -> KVCacheConfig:
    """As `config`, of a dtype, with trees."""
    wanted = {"dtype": dtype, "max_positions": max_positions, "trees": True}
    return dataclasses.replace(config(**shape), **wanted)


@functools.cache
def kernels(c: KVCacheConfig, limits: Limits = LIMITS) -> KVKernels:
    return kv_kernels(c, limits)


@functools.cache
def compiled(c: KVCacheConfig, slot: str, limits: Limits = LIMITS) -> Compiled:
    """A slot of KVKernels, built."""
    return Compiled(getattr(kernels(c, limits), slot))


@dataclasses.dataclass
class Part:
    """Queries [t, hq, d] of a sequence at positions [t], and keys and values [n, hkv, d] from one.

    `seen` [t, n] are the keys that a query sees, all of them unless given. `parents` are a tree's:
    its nodes are the last keys, the queries its last nodes. `sinks` keys come before the window,
    which begins `skipped` slots further in the pages. `places` are the positions of the keys.
    """

    q: np.ndarray
    positions: np.ndarray
    k: np.ndarray
    v: np.ndarray
    k_base: int = 0
    seen: np.ndarray | None = None
    parents: Sequence[int] = ()
    sinks: int = 0
    skipped: int = 0
    places: np.ndarray | None = None  # positions of the keys

    def __post_init__(self) -> None:
        if self.seen is None:
            self.seen = np.ones((len(self.q), len(self.k)), bool)
        if self.places is None:
            self.places = self.k_base + np.arange(len(self.k))


def random_part(
    c: KVCacheConfig, rng: Any, queries: int, keys: int, k_base: int = 0, **more: Any
) -> Part:
    """Queries that come right after the keys."""
    shapes = [(queries, c.num_attention_heads), (keys, c.num_key_value_heads)]
    shapes.append(shapes[1])
    q, k, v = (rng.standard_normal((*shape, c.head_dim)).astype(c.dtype) for shape in shapes)
    positions = (k_base + keys + np.arange(queries)).astype("int32")
    return Part(q, positions, k, v, k_base, **more)


def own_part(c: KVCacheConfig, rng: Any, tokens: int, causal: bool) -> Part:
    """Queries whose keys are those of their own tokens."""
    part = random_part(c, rng, tokens, tokens, k_base=5)
    part.positions -= tokens
    if causal:
        part.seen = np.tri(tokens, dtype=bool)
    return part


def tree_part(
    c: KVCacheConfig, rng: Any, parents: Sequence[int], queries: int, before: int
) -> Part:
    """The last nodes of a tree that follows `before` keys; all its nodes are keys."""
    nodes = len(parents)
    depth, seen = np.zeros(nodes, "int32"), np.zeros((nodes, before + nodes), bool)
    seen[:, :before] = True
    for node, parent in enumerate(parents):
        if parent >= 0:
            depth[node], seen[node] = depth[parent] + 1, seen[parent]
        seen[node, before + node] = True
    part = random_part(c, rng, queries, before + nodes, k_base=3, parents=parents)
    places = np.concatenate([np.arange(before), before + depth]) + part.k_base
    part.places = places
    part.positions = places[-queries:].astype("int32")
    part.seen = seen[-queries:]
    return part


def sliding_part(c: KVCacheConfig, rng: Any, queries: int, length: int, own: bool = False) -> Part:
    """Queries after a history of `length` tokens, of which a cache keeps sinks and a window.

    `own`: their keys are those of their own tokens.
    """
    window, sinks = c.sliding_window_size, c.attention_sink_size
    kept = min(length, window)
    part = random_part(c, rng, queries, queries if own else kept)
    part.positions = (np.arange(queries) + (0 if own else kept)).astype("int32")
    if not own and length > window:
        part.sinks, part.skipped = sinks, (length - window) % PAGE_SIZE
    places = np.arange(len(part.k))
    reached = part.positions[:, None] - places < window - sinks
    part.seen = (places < sinks) | reached
    if own:
        part.seen &= np.tri(queries, dtype=bool)
    return part


def attend(c: KVCacheConfig, part: Part, window: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Outputs [t, hq, d] and log-sum-exps [t, hq] in base 2, those of carriers NaN."""
    hkv, d, t = c.num_key_value_heads, c.head_dim, len(part.q)
    stride = c.num_attention_heads // hkv
    q, k, v = (x.astype(np.float64) for x in (part.q, part.k, part.v))
    own = np.arange(c.num_attention_heads) % stride < c.group
    q = q[:, own]
    places = part.places
    kh, vh = (np.repeat(x, c.group, axis=1) for x in (k, v))
    if c.sliding_window_size > 0:
        kh = rotate(c, kh, places)
        at_sinks = rotate(c, q, np.minimum(part.positions, c.sliding_window_size - 1))
        scores = np.einsum("ihd,jhd->hij", rotate(c, q, part.positions), kh)
        to_sinks = np.einsum("ihd,jhd->hij", at_sinks, kh)
        scores = np.where(places < c.attention_sink_size, to_sinks, scores)
    else:
        scores = np.einsum("ihd,jhd->hij", q, kh)
    scores = scores * d**-0.5
    if c.logit_soft_cap:
        scores = np.tanh(scores / c.logit_soft_cap) * c.logit_soft_cap
    seen = part.seen.copy()
    if window:
        seen &= places > part.positions[:, None] - c.layer_window
    scores = np.where(seen, scores, -np.inf)
    top = scores.max(-1, keepdims=True, initial=-1e300)
    weights = np.where(seen, np.exp(scores - top), 0)
    mass = weights.sum(-1)
    with np.errstate(divide="ignore"):
        lse = np.where(mass > 0, top[..., 0] + np.log(mass), -1e30 * np.log(2)).T  # [t, h]
    part_out = np.einsum("hij,jhd->ihd", weights / np.maximum(mass, 1e-300)[..., None], vh)
    out = np.zeros((t, c.num_attention_heads, d))
    out[:, own] = part_out
    lses = np.full((t, c.num_attention_heads), np.nan)
    lses[:, own] = lse / np.log(2)
    if c.returns_lse:
        out[:, ~own, : c.group] = np.maximum(lse, -65504).reshape(t, hkv, c.group)
    return out, lses


def indptr(counts: Sequence[int]) -> np.ndarray:
    return np.cumsum([0, *counts]).astype("int32")


def tree_order(parents: Sequence[int]) -> np.ndarray:
    """[nodes, 2]: a node's place in preorder, and one past those of its descendants."""
    order = np.zeros((len(parents), 2), "int32")
    count = 0

    def visit(node: int) -> None:
        nonlocal count
        order[node, 0] = count
        count += 1
        for child in (i for i, parent in enumerate(parents) if parent == node):
            visit(child)
        order[node, 1] = count

    for root in (i for i, parent in enumerate(parents) if parent == -1):
        visit(root)
    return order


class PagedBatch:
    """The arrays of a call; keys and values lie in pages that hold garbage besides."""

    def __init__(self, c: KVCacheConfig, parts: Sequence[Part], limits: Limits = LIMITS) -> None:
        self.c, self.parts, self.limits = c, parts, limits
        rng = np.random.default_rng(len(parts))
        sliding = c.sliding_window_size > 0
        ends = [len(p.k) + p.skipped for p in parts]
        counts = [-(-end // PAGE_SIZE) for end in ends]
        self.page_indptr = indptr(counts)
        total = int(self.page_indptr[-1])
        self.page_values = rng.permutation(total + 3)[:total].astype("int32")
        last = [
            end - (count - 1) * PAGE_SIZE if count else 0
            for end, count in zip(ends, counts, strict=True)
        ]
        infos = [last, [p.sinks + p.skipped for p in parts], [p.sinks for p in parts]]
        self.length_info = np.array(infos if sliding else last, "int32")
        self.k_position = np.array([p.k_base for p in parts], "int32")
        shape = (total + 3, 2, c.num_key_value_heads, PAGE_SIZE, c.head_dim)
        self.pages = garbage(shape, c.dtype)
        slots = []
        for p, first in zip(parts, self.page_indptr[:-1], strict=True):
            place = np.arange(len(p.k))
            place = np.where(place < p.sinks, place, place + p.skipped)
            page = self.page_values[first + place // PAGE_SIZE]
            slots.append(page * PAGE_SIZE + place % PAGE_SIZE)
        append = compiled(c, "transpose_append", limits)
        k, v = (np.concatenate(x) for x in zip(*((p.k, p.v) for p in parts), strict=True))
        if len(k):
            self.pages = append([self.pages, k, v, np.concatenate(slots).astype("int32")], [0])[0]

    def _outputs(self) -> tuple[np.ndarray, ...]:
        total = sum(len(p.q) for p in self.parts)
        heads = self.c.num_attention_heads
        out = garbage((total, heads, self.c.head_dim), self.c.dtype)
        return out, garbage((total, heads), "float32")

    def _scale(self, window: bool) -> float:
        return self.c.head_dim**-0.5 * (-1 if window else 1)

    def _queries(self) -> tuple[np.ndarray, ...]:
        q = np.concatenate([p.q for p in self.parts])
        positions = np.concatenate([p.positions for p in self.parts]).astype("int32")
        return q, indptr([len(p.q) for p in self.parts]), positions

    def _paged(self) -> list[np.ndarray]:
        return [self.pages, self.page_indptr, self.page_values, self.length_info, self.k_position]

    def decode(self, window: bool = False, adapter: str = "lavapipe") -> None:
        q, _, positions = self._queries()
        tail = [0, 1.0, 1.0, self._scale(window)]
        args = [q, *self._paged(), positions, *self._outputs(), *tail]
        found = compiled(self.c, "decode", self.limits)(args, [7, 8], adapter)
        self._check(found, window)

    def prefill(self, window: bool = False, adapter: str = "lavapipe") -> None:
        q, q_indptr, positions = self._queries()
        tail = [0, 0, 1.0, 1.0, self._scale(window)]
        args = [q, q_indptr, *self._paged(), positions, *self._outputs(), *tail]
        found = compiled(self.c, "prefill", self.limits)(args, [8, 9], adapter)
        self._check(found, window)

    def tree(self, window: bool = False, adapter: str = "lavapipe") -> None:
        q, q_indptr, positions = self._queries()
        tail = [0, 1.0, 1.0, self._scale(window)]
        args = [q, q_indptr, *self._paged(), positions, *self._outputs(), *tail, *self._trees()]
        found = compiled(self.c, "tree_prefill_paged", self.limits)(args, [8, 9], adapter)
        self._check(found, window)

    def _trees(self) -> list[np.ndarray]:
        order = np.concatenate([tree_order(p.parents) for p in self.parts])
        if not self.limits.paired_trees:
            order = order.reshape(-1)
        return [indptr([len(p.parents) for p in self.parts]), order]

    def _ragged(self) -> list[np.ndarray]:
        q, q_indptr, _ = self._queries()
        k, v = (np.concatenate(x) for x in zip(*((p.k, p.v) for p in self.parts), strict=True))
        return [q, q_indptr, k, v, indptr([len(p.k) for p in self.parts])]

    def ragged(self, causal: bool, window: bool = False, adapter: str = "lavapipe") -> None:
        positions = self._queries()[2]
        tail = [int(causal), 0, 1.0, 1.0, self._scale(window)]
        args = [*self._ragged(), positions, self.k_position, *self._outputs(), *tail]
        found = compiled(self.c, "prefill_ragged", self.limits)(args, [7, 8], adapter)
        self._check(found, window)

    def ragged_tree(self, window: bool = False, adapter: str = "lavapipe") -> None:
        positions = self._queries()[2]
        tail = [0, 1.0, 1.0, self._scale(window)]
        args = [*self._ragged(), positions, *self._trees(), *self._outputs(), *tail]
        found = compiled(self.c, "tree_prefill", self.limits)(args, [8, 9], adapter)
        self._check(found, window)

    def _check(self, found: Sequence[np.ndarray], window: bool) -> None:
        expected = [attend(self.c, p, window) for p in self.parts]
        outs, lses = (np.concatenate(x) for x in zip(*expected, strict=True))
        tolerance = TOLERANCE[self.c.dtype]
        if self.c.sliding_window_size > 0 and self.c.dtype == "float16":
            tolerance = ROTATED
        np.testing.assert_allclose(
            found[0].astype("float64"), outs, rtol=tolerance, atol=tolerance, err_msg="output"
        )
        used = ~np.isnan(lses)
        got = found[1].astype("float64")[used]
        empty = lses[used] < NO_KEY
        assert (got[empty] < NO_KEY).all()
        tolerance = ROTATED if tolerance == ROTATED else 1e-5  # these are f32
        np.testing.assert_allclose(got[~empty], lses[used][~empty], rtol=tolerance, atol=tolerance)
