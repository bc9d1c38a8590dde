"""Where the keys and values of a sequence lie: in pages of the cache, or in the chunk itself.

A slot is a place in the pages of a sequence; without a sliding window the slot of a key is its
number. What a kernel asks of each sequence are index arrays, in storage buffers of their own;
where a device cannot bind so many, a first small kernel gathers them into one table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from qcc.targets.attention import aux_buffer, tensor
from qcc.targets.gpu.kernels.attention_func import Plan, ceil_div, grid, keep_int, when
from qcc.targets.gpu.kernels.attention_pages import Pages
from qcc.targets.spec import PAGE_SIZE

_THREADS = 64


def _reader(read: Callable[[Any, int], Any], i: int) -> Callable[[Any], Any]:
    return lambda b: read(b, i)


class Sequences:
    """Integers of each sequence, by name; a name ends in "indptr" if there is one more of them."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.columns: dict[str, Callable[[Any], Any]] = {}
        self.buffers = 0

    def add(self, name: str, buffer: Any, rows: int = 1) -> None:
        """An index array [b] or [rows, b], of which the kernel uses all."""
        self.buffers += 1
        if rows == 1:
            self.columns[name] = lambda b: buffer[b]
            return
        for row in range(rows):
            self.columns[f"{name}{row}"] = _reader(lambda b, row: buffer[row, b], row)

    def gather(self, batch: Any, other_buffers: int) -> None:
        """Before the kernel's own grid: make the table if the arrays are too many."""
        if self.buffers + other_buffers <= self.plan.limits.max_storage_buffers:
            return
        width = len(self.columns)
        table = T.alloc_buffer(((batch + 1) * width,), "int32", scope="global")
        with grid(_THREADS, ceil_div(batch + 1, _THREADS)) as (block, _, thread):
            b = T.bind(block * _THREADS + thread)
            for i, (name, get) in enumerate(self.columns.items()):
                with when(b <= batch if name.endswith("indptr") else b < batch):
                    T.buffer_store(table, get(b), [b * width + i])
        for i, name in enumerate(self.columns):
            self.columns[name] = _reader(lambda b, i: table[b * width + i], i)

    def __call__(self, name: str, b: Any) -> Any:
        return self.columns[name](b)


class PagedKeys:
    """The pages argument with its index arrays; page_values[page_indptr[b] : ...] are b's pages."""

    arrays = 2  # besides those of `sequences`: pages, page_values

    def __init__(self, plan: Plan, sequences: Sequences, batch: Any, sliding: bool) -> None:
        self.plan, self.sequences, self.batch, self.sliding = plan, sequences, batch, sliding
        self.pages = Pages(plan)

    def declare(self) -> None:
        """pages, page_indptr, page_values, length_info i32[b] or [3, b], k_rope_pos_offset."""
        self.pages.declare()
        self.listed = T.int32()
        indptr = aux_buffer("page_indptr", (self.batch + 1,))
        self.values = aux_buffer("page_values", (self.listed,))
        shape = (3, self.batch) if self.sliding else (self.batch,)
        lengths = aux_buffer("length_info", shape)
        positions = aux_buffer("k_rope_pos_offset", (self.batch,))
        self.sequences.add("page_indptr", indptr)
        self.sequences.add("length", lengths, 3 if self.sliding else 1)
        if self.sliding or self.plan.config.layer_window:
            self.sequences.add("k_position", positions)

    def enter(self) -> None:
        """At the start of the body, outside of every grid."""
        self.pages.enter()

    def select(self, b: Any) -> Any:
        """Fix the sequence; returns the number of its keys.

        With a sliding window length_info holds the length of the last page, where the window starts
        after the sinks, and the number of sinks: behind these the slot of a key is `skip` more.
        """
        get = self.sequences
        self.begin = keep_int(get("page_indptr", b))
        self.count = keep_int(get("page_indptr", b + 1) - self.begin)
        full = (self.count - 1) * PAGE_SIZE
        self.skip: Any = 0
        if self.sliding:
            self.skip = keep_int(get("length1", b) - get("length2", b))
            length = full + get("length0", b) - self.skip
        else:
            length = full + get("length", b)
        return keep_int(T.Select(self.count > 0, length, 0))

    def page(self, number: Any) -> Any:
        """The sequence's page of a number; its last for those beyond."""
        return self.values[self.begin + T.min(number, self.count - 1)]

    def key_at(self, slot: Any, head: Any) -> Callable[[Any], Any]:
        """A function that reads a vector of the key of a slot, as it is stored."""
        base = keep_int(
            self.pages.key(self.page(T.shift_right(slot, 4)), head, 0, slot % PAGE_SIZE)
        )
        return lambda chunk: self.pages.cells[base + chunk * PAGE_SIZE]

    def value_at(self, slot: Any, head: Any, chunk: Any) -> Any:
        """A vector of the value of a slot, as it is stored."""
        page = self.page(T.shift_right(slot, 4))
        return self.pages.cells[self.pages.value(page, head, chunk, slot % PAGE_SIZE)]


class RaggedKeys:
    """k, v of the chunk itself, token by token; sequence b at kv_indptr[b] : kv_indptr[b + 1]."""

    arrays = 2
    skip: Any = 0

    def __init__(self, plan: Plan, sequences: Sequences, batch: Any) -> None:
        self.plan, self.sequences, self.batch = plan, sequences, batch

    def declare(self) -> None:
        """k, v, kv_indptr."""
        c = self.plan.config
        self.total = T.int32()
        shape = (self.total, c.num_key_value_heads, c.head_dim)
        self.buffers = [tensor(name, shape, c.dtype) for name in ("k", "v")]
        self.sequences.add("kv_indptr", aux_buffer("kv_indptr", (self.batch + 1,)))

    def enter(self) -> None:
        c = self.plan.config
        size = self.total * (c.num_key_value_heads * c.head_dim)
        self.k, self.v = (self.plan.vectors(buffer, size) for buffer in self.buffers)

    def select(self, b: Any) -> Any:
        self.begin = keep_int(self.sequences("kv_indptr", b))
        return keep_int(self.sequences("kv_indptr", b + 1) - self.begin)

    def _row(self, slot: Any, head: Any) -> Any:
        token = self.begin + slot
        return (token * self.plan.config.num_key_value_heads + head) * self.plan.chunks

    def key_at(self, slot: Any, head: Any) -> Callable[[Any], Any]:
        """As PagedKeys.key_at."""
        base = keep_int(self._row(slot, head))
        return lambda chunk: self.k[base + chunk]

    def value_at(self, slot: Any, head: Any, chunk: Any) -> Any:
        """As PagedKeys.value_at."""
        return self.v[self._row(slot, head) + chunk]
