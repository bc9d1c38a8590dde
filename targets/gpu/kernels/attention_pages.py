"""Tokens into pages, out of them and from page to page.

A page is [2][hkv][16 * head_dim] numbers, in vectors of `Plan.lanes`:
  keys    [hkv][chunks][16]    neighbouring threads have neighbouring keys
  values  [hkv][16][chunks]    neighbouring threads have neighbouring numbers of a head
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tvm.tirx.script import builder as T

from qcc.targets.attention import aux_buffer, kernel, tensor
from qcc.targets.gpu.kernels.attention_func import Plan, ceil_div, grid, when
from qcc.targets.spec import PAGE_SIZE


class Pages:
    """The pages argument, and where a head's vectors lie in it."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.config = plan, plan.config
        self.head = PAGE_SIZE * plan.chunks  # vectors of a head in half a page
        self.half = self.config.num_key_value_heads * self.head

    def declare(self) -> None:
        c = self.config
        self.count = T.int32()
        shape = (self.count, 2, c.num_key_value_heads, PAGE_SIZE, c.head_dim)
        self.buffer = tensor("pages", shape, c.dtype)

    def enter(self) -> None:
        """At the start of the body, outside of every grid."""
        size = self.count * (2 * self.half * self.plan.lanes)
        self.cells = self.plan.vectors(self.buffer, size)

    def key(self, page: Any, head: Any, chunk: Any, place: Any) -> Any:
        return page * (2 * self.half) + head * self.head + chunk * PAGE_SIZE + place

    def value(self, page: Any, head: Any, chunk: Any, place: Any) -> Any:
        first = page * (2 * self.half) + self.half
        return first + head * self.head + place * self.plan.chunks + chunk

    def at_slot(self, slot: Any, head: Any, chunk: Any) -> tuple[Any, Any]:
        """Where the key's and the value's vector of a token are: slot = page * 16 + place."""
        page, place = T.bind(T.shift_right(slot, 4)), T.bind(T.bitwise_and(slot, PAGE_SIZE - 1))
        return self.key(page, head, chunk, place), self.value(page, head, chunk, place)


def transpose_append(plan: Plan) -> Any:
    """Put k, v of n tokens into their slots: page * 16 + place, -1 for a token to drop."""
    c, pages = plan.config, Pages(plan)
    row = c.num_key_value_heads * plan.chunks
    with kernel("kv_cache_transpose_append") as build:
        pages.declare()
        n = T.int32()
        shape = (n, c.num_key_value_heads, c.head_dim)
        new = [tensor(name, shape, c.dtype) for name in ("k_data", "v_data")]
        slots = aux_buffer("position_map", (n,))
        with build.body():
            pages.enter()
            k, v = (plan.vectors(each, n * (row * plan.lanes)) for each in new)
            with _over_tokens(plan, n) as (i, token, head, chunk):
                slot = T.bind(slots[token])
                with when(slot >= 0):
                    at_key, at_value = pages.at_slot(slot, head, chunk)
                    T.buffer_store(pages.cells, k[token * row + i], [at_key])
                    T.buffer_store(pages.cells, v[token * row + i], [at_value])
    return build.result()


def debug_get_kv(plan: Plan) -> Any:
    """k_data, v_data [layers, n, hkv, d] of a layer <- what the slots hold."""
    c, pages = plan.config, Pages(plan)
    row = c.num_key_value_heads * plan.chunks
    with kernel("kv_cache_debug_get_kv") as build:
        pages.declare()
        n, layers = T.int32(), T.int32()
        slots = aux_buffer("position_map", (n,))
        shape = (layers, n, c.num_key_value_heads, c.head_dim)
        found = [tensor(name, shape, c.dtype) for name in ("k_data", "v_data")]
        layer = T.arg("layer_id", T.int32())
        with build.body():
            pages.enter()
            k, v = (plan.vectors(each, layers * n * (row * plan.lanes)) for each in found)
            with _over_tokens(plan, n) as (i, token, head, chunk):
                at_key, at_value = pages.at_slot(T.bind(slots[token]), head, chunk)
                at = T.bind((layer * n + token) * row + i)
                T.buffer_store(k, pages.cells[at_key], [at])
                T.buffer_store(v, pages.cells[at_value], [at])
    return build.result()


def compact_copy(plan: Plan) -> Any:
    """Move tokens from slots to slots of the same sequence, in the order that is given.

    A thread moves its numbers of all tokens, so that the order holds.
    """
    pages = Pages(plan)
    with kernel("kv_cache_compact_copy") as build:
        pages.declare()
        total, batch = T.int32(), T.int32()
        indptr = aux_buffer("copy_length_indptr", (batch + 1,))
        moves = aux_buffer("copy_src_dst_pos", (2, total))
        T.arg("batch_size", batch)
        with build.body():
            pages.enter()
            with _over_tokens(plan, 1) as (_, _, head, chunk):
                with T.serial(0, indptr[batch]) as token:
                    source, target = (T.bind(moves[which, token]) for which in range(2))
                    of_source = pages.at_slot(source, head, chunk)
                    for a, b in zip(of_source, pages.at_slot(target, head, chunk), strict=True):
                        T.buffer_store(pages.cells, pages.cells[a], [b])
    return build.result()


def copy_single_page(plan: Plan) -> Any:
    """Copy a page; what it holds beyond `copy_length` tokens is no one's, so it may come along."""
    pages = Pages(plan)
    size, threads = 2 * pages.half, plan.threads(2 * pages.half)
    with kernel("kv_cache_copy_single_page") as build:
        pages.declare()
        source, target = T.arg("from_page", T.int32()), T.arg("to_page", T.int32())
        T.arg("copy_length", T.int32())
        with build.body():
            pages.enter()
            with grid(threads, ceil_div(size, threads)) as (block, _, thread):
                i = T.bind(block * threads + thread)
                with when(i < size):
                    value = pages.cells[source * size + i]
                    T.buffer_store(pages.cells, value, [target * size + i])
    return build.result()


@contextmanager
def _over_tokens(plan: Plan, tokens: Any) -> Iterator[tuple[Any, Any, Any, Any]]:
    """A grid over tokens and the vectors of one: (number, token, kv head, chunk) of a thread."""
    row = plan.config.num_key_value_heads * plan.chunks
    threads = plan.threads(row)
    with grid(threads, ceil_div(row, threads), tokens) as (block, token, thread):
        i = T.bind(block * threads + thread)
        with when(i < row):
            yield i, token, T.bind(i // plan.chunks), T.bind(i % plan.chunks)
