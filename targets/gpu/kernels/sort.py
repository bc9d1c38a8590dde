"""argsort_rows: rows of probabilities in falling order, by merging; no atomics, no subgroups.

A workgroup sorts a tile of 2048 elements in its memory; then each pass over the row merges pairs of
sorted runs, every workgroup writing one tile of the result, which it finds by bisection. A row of
V takes ceil(log2(V / 2048)) passes after the first, each reading and writing 8 bytes an element:
V = 32000: 1 + 4 launches and 2.4 MB; 151936: 1 + 7 and 18.8 MB. A radix sort of four 8-bit digits
would move 12.2 MB there, in 12 launches: for each digit counts, sums of counts and moves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qcc.quant_schemes.attributes import ROLE
from qcc.targets.gpu.kernels.tir import block, shared, threads
from qcc.targets.gpu.limits import Limits
from qcc.targets.kernel import Arg, kernel

EACH = 8  # elements of a thread
LOWEST = -(2**31 - 1)  # a key below those of all floats; WGSL takes no literal -2**31


@cache
def argsort_rows(role: str, width: int, limits: Limits) -> tirx.PrimFunc:
    """PrimFunc (f32[b, width]) -> values f32, tokens i32, and two workspaces of these types.

    Values fall along a row, equal ones keep their order; any finite values, and -0 follows 0.
    """
    shape = (tirx.Var("b", "int64"), width)
    args: list[Arg] = [("probs", shape, "float32")]
    for name in ("", "spare_"):
        args += [(f"{name}values", shape, "float32"), (f"{name}tokens", shape, "int32")]
    work = _Argsort(shape[0], width, limits.max_threads)
    return kernel("argsort", args, work.emit, {ROLE: role}, outputs=4)


@dataclass(frozen=True)
class _Run:
    """Sorted elements: the place of the first, how many."""

    first: Any
    count: Any


@dataclass(frozen=True)
class _Argsort:
    rows: Any
    width: int
    threads: int

    @property
    def tile(self) -> int:
        """Elements of a workgroup."""
        return self.threads * EACH

    @property
    def tiles(self) -> int:
        return -(-self.width // self.tile)

    def emit(self, probs: Any, values: Any, tokens: Any, spare: Any, spare_tokens: Any) -> None:
        """All launches; the last one writes the first two outputs."""
        final, other = (values, tokens), (spare, spare_tokens)
        passes = (self.tiles - 1).bit_length()
        self._sort_tiles(probs, other if passes % 2 else final)
        # loop and condition are the host's: two kernels, however many passes
        with T.serial(0, passes) as step:
            length = T.shift_left(self.tile, step)
            with T.If((passes - step) % 2 == 1):
                with T.Then():
                    self._merge_runs(other, final, length)
                with T.Else():
                    self._merge_runs(final, other, length)

    def _sort_tiles(self, probs: Any, to: tuple[Any, Any]) -> None:
        with block(self.rows, "y") as row, block(self.tiles) as tile:
            with threads(self.threads) as thread:
                memory = shared((self.tile,), "int32")
                mine = _Registers(memory, thread)
                first = T.bind(tile * self.tile)
                with T.serial(0, EACH) as e:
                    place = T.bind(e * self.threads + thread)
                    key = _key(probs[row, T.min(first + place, self.width - 1)])
                    inside = first + place < self.width
                    T.buffer_store(memory, T.Select(inside, key, LOWEST), [place])
                _barrier()
                with T.serial(0, EACH) as e:
                    place = T.bind(thread * EACH + e)
                    T.buffer_store(mine.keys, memory[place], [e])
                    T.buffer_store(mine.ids, first + place, [e])
                mine.sort()
                with T.serial(0, self.threads.bit_length() - 1) as step:
                    count = T.bind(T.shift_left(EACH, step))
                    at = T.bind(thread * EACH)
                    start = T.bind(at & ~(count * 2 - 1))
                    mine.put(mine.keys)
                    mine.merge(_Run(start, count), _Run(start + count, count), at - start)
                    mine.put(mine.ids)
                    with T.serial(0, EACH) as e:
                        T.buffer_store(mine.ids, memory[mine.places[e]], [e])
                self._store(mine, row, first, to)

    def _merge_runs(self, source: tuple[Any, Any], to: tuple[Any, Any], length: Any) -> None:
        """Runs of `length` elements become runs of twice as many."""
        values, tokens = source
        with block(self.rows, "y") as row, block(self.tiles) as tile:
            with threads(self.threads) as thread:
                memory = shared((self.tile,), "int32")
                mine = _Registers(memory, thread)
                first = T.bind(tile * self.tile)
                start = T.bind(first & ~(length * 2 - 1))
                middle = T.bind(T.min(start + length, self.width))
                end = T.bind(T.min(start + length * 2, self.width))
                a, b = _Run(start, middle - start), _Run(middle, end - middle)
                # where the tile begins and ends in the merged run: an even and an odd thread
                low = T.bind(first - start)
                high = T.bind(T.min(first + self.tile, end) - start)
                goal = T.bind(T.Select(thread % 2 == 0, low, high))
                split = _split(lambda i: _key(values[row, i]), a, b, goal)
                with T.If(thread < 2), T.Then():
                    T.buffer_store(memory, split, [thread])
                _barrier()
                a_low, a_high = T.bind(memory[0]), T.bind(memory[1])
                _barrier()
                part = _Run(0, T.bind(a_high - a_low))
                rest = _Run(part.count, T.bind(high - low - part.count))

                def column(place: Any) -> Any:
                    """Where the place in memory was; past the end of a row nobody looks at it."""
                    from_b = middle + (low - a_low) + (place - part.count)
                    found = T.Select(place < part.count, start + a_low + place, from_b)
                    return T.bind(T.min(found, self.width - 1))

                with T.serial(0, EACH) as e:
                    place = T.bind(e * self.threads + thread)
                    T.buffer_store(memory, _key(values[row, column(place)]), [place])
                _barrier()
                mine.merge(part, rest, T.bind(T.min(thread * EACH, high - low)))
                with T.serial(0, EACH) as e:
                    T.buffer_store(mine.ids, tokens[row, column(T.bind(mine.places[e]))], [e])
                self._store(mine, row, first, to)

    def _store(self, mine: _Registers, row: Any, first: Any, to: tuple[Any, Any]) -> None:
        """Write a tile, neighbours by neighbouring threads."""
        for source, sink, convert in ((mine.keys, to[0], _value), (mine.ids, to[1], _same)):
            mine.put(source)
            with T.serial(0, EACH) as e:
                place = T.bind(e * self.threads + mine.thread)
                with T.If(first + place < self.width), T.Then():
                    T.buffer_store(sink, convert(mine.memory[place]), [row, first + place])


class _Registers:
    """A thread's elements: their keys, columns, and where they were in the workgroup's memory.

    That has room for keys or columns only: half the memory, and twice as many barriers.
    """

    def __init__(self, memory: Any, thread: Any) -> None:
        self.memory, self.thread = memory, thread
        self.keys, self.ids, self.places = _local(EACH), _local(EACH), _local(EACH)

    def sort(self) -> None:
        """Odd-even transposition: neighbours change places where they must, so it is stable."""
        with T.serial(0, EACH) as step:
            with T.serial(0, EACH // 2) as pair:
                e = T.bind(pair * 2 + step % 2)
                with T.If(T.And(e + 1 < EACH, self.keys[e] < self.keys[T.min(e + 1, EACH - 1)])):
                    with T.Then():
                        for each in (self.keys, self.ids):
                            value = T.bind(each[e])
                            T.buffer_store(each, each[e + 1], [e])
                            T.buffer_store(each, value, [e + 1])

    def put(self, source: Any) -> None:
        """Every thread's keys or columns to the memory, when all have read what they need."""
        _barrier()
        with T.serial(0, EACH) as e:
            T.buffer_store(self.memory, source[e], [self.thread * EACH + e])
        _barrier()

    def merge(self, a: _Run, b: _Run, at: Any) -> None:
        """The keys from `at` on of what two runs in memory make; of equal ones a's first."""
        i, last = _local(1), int(self.memory.shape[0]) - 1
        T.buffer_store(i, _split(lambda place: self.memory[place], a, b, at), [0])
        with T.serial(0, EACH) as e:
            so_far = T.bind(i[0])  # of a's
            j = at + e - so_far
            left = T.bind(T.min(a.first + so_far, last))
            right = T.bind(T.min(b.first + j, last))
            left_key, right_key = T.bind(self.memory[left]), T.bind(self.memory[right])
            sooner = T.Or(j >= b.count, T.And(so_far < a.count, left_key >= right_key))
            T.buffer_store(i, so_far + T.cast(sooner, "int32"), [0])
            taken = i[0] > so_far
            T.buffer_store(self.keys, T.Select(taken, left_key, right_key), [e])
            T.buffer_store(self.places, T.Select(taken, left, right), [e])


def _split(key_at: Callable[[Any], Any], a: _Run, b: _Run, goal: Any) -> Any:
    """How many of the first `goal` elements of a and b, merged, are a's."""
    low, high = _local(1), _local(1)
    T.buffer_store(low, T.max(goal - b.count, 0), [0])
    T.buffer_store(high, T.min(goal, a.count), [0])
    with T.While(low[0] < high[0]):
        middle = T.bind((low[0] + high[0]) >> 1)
        # bound before the condition: TVM takes no load of workgroup memory inside one
        left = T.bind(key_at(a.first + middle))
        right = T.bind(key_at(b.first + (goal - 1 - middle)))
        with T.If(left >= right):
            with T.Then():
                T.buffer_store(low, middle + 1, [0])
            with T.Else():
                T.buffer_store(high, middle, [0])
    return low[0]


def _key(value: Any) -> Any:
    """An int32 that rises with the float; integers, as a GPU may take denormal floats for 0."""
    return _folded(T.reinterpret("int32", value))


def _value(key: Any) -> Any:
    return T.reinterpret("float32", _folded(key))


def _same(column: Any) -> Any:
    return column


def _folded(bits: Any) -> Any:
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _local(count: int) -> Any:
    return T.alloc_buffer((count,), "int32", scope="local", layout=None)


def _barrier() -> None:
    T.evaluate(T.tvm_storage_sync("shared"))
