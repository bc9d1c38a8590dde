"""sample_rows: a token from a row of falling probabilities, by one workgroup.

Each thread adds up a stretch of the row, one thread adds up the stretches, and a sum's place is
found first among the stretches and then, in the same way, within one. Running sums are formed so
that they never fall, so both searches agree. A row is read once, and two stretches of it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qcc.quant_schemes.attributes import ROLE
from qcc.targets.gpu.kernels.tir import block, registers, shared, threads
from qcc.targets.gpu.limits import Limits
from qcc.targets.kernel import Arg, kernel

INNER = 16  # elements that are added up before they meet the rest: a shorter chain of roundings


@cache
def sample_rows(role: str, width: int, limits: Limits) -> tirx.PrimFunc:
    """PrimFunc (f32[b, V] falling, tokens i32[b, V], u f32[n], rows i32[n], f32[b]) -> i32[n].

    The nucleus is the shortest prefix whose sum reaches top_p, never with a probability of 0, at
    least one token; the sample is its first token whose running sum exceeds u * (sum of all).
    """
    b, n = tirx.Var("b", "int64"), tirx.Var("n", "int64")
    args: list[Arg] = [
        ("probs", (b, width), "float32"),
        ("tokens", (b, width), "int32"),
        ("u", (n,), "float32"),
        ("rows", (n,), "int32"),
        ("top_p", (b,), "float32"),
        ("sampled", (n,), "int32"),
    ]
    work = _Sampling(n, width, limits.max_threads)
    return kernel("sample", args, work.emit, {ROLE: role})


@dataclass(frozen=True)
class _Sampling:
    samples: Any
    width: int
    threads: int

    @property
    def stretch(self) -> int:
        """Elements of a row that a thread adds up."""
        return -(-self.width // self.threads)

    def emit(self, probs: Any, tokens: Any, u: Any, rows: Any, top_p: Any, sampled: Any) -> None:
        with block(self.samples) as sample, threads(self.threads) as thread:
            row = T.bind(rows[sample])
            search = _Search(self, probs, row, thread)
            search.add_up()
            # rounded sums may reach 1 too early: no limit at 1
            limit = T.bind(T.Select(top_p[row] < 1, top_p[row], T.float32(2)))
            place, mass = search.find(lambda reached: reached >= limit)
            last = T.bind(T.min(place, T.max(search.positive, 1) - 1))
            goal = T.bind(u[sample] * mass)
            place, _ = search.find(lambda reached: reached > goal)
            with T.If(thread == 0), T.Then():
                T.buffer_store(sampled, tokens[row, T.min(place, last)], [sample])


class _Search:
    """The running sums of a row, and where they reach something."""

    def __init__(self, work: _Sampling, probs: Any, row: Any, thread: Any) -> None:
        self.work, self.probs, self.row, self.thread = work, probs, row, thread
        size = work.threads
        self.sums, self.counts = shared((size,), "float32"), shared((size,), "int32")
        self.ends = shared((size,), "float32")  # the running sum after each stretch
        self.inner = shared((size,), "float32")  # and after each part of one stretch
        self.found, self.above = shared((1,), "int32"), shared((1,), "int32")
        self.place = shared((1,), "int32")
        self.mass = shared((1,), "float32")
        self.positive: Any = None

    def add_up(self) -> None:
        """Fill `ends` and count what is above 0."""
        work, thread = self.work, self.thread
        acc, count = registers(2, 0.0), _integer(0)
        with T.serial(0, -(-work.stretch // INNER)) as outer:
            T.buffer_store(acc, T.float32(0), [1])
            with T.serial(0, INNER) as inner:
                at = T.bind(outer * INNER + inner)
                column = T.bind(thread * work.stretch + at)
                with T.If(T.And(at < work.stretch, column < work.width)), T.Then():
                    value = T.bind(self.probs[self.row, column])
                    T.buffer_store(acc, acc[1] + value, [1])
                    # by its bits: a GPU may take a denormal for 0
                    above = T.reinterpret("int32", value) > 0
                    T.buffer_store(count, count[0] + T.cast(above, "int32"), [0])
            T.buffer_store(acc, acc[0] + acc[1], [0])
        T.buffer_store(self.sums, acc[0], [thread])
        T.buffer_store(self.counts, count[0], [thread])
        _barrier()
        with T.If(thread == 0), T.Then():
            T.buffer_store(acc, T.float32(0), [0])
            T.buffer_store(count, 0, [0])
            with T.serial(0, work.threads) as i:
                T.buffer_store(acc, acc[0] + self.sums[i], [0])
                T.buffer_store(count, count[0] + self.counts[i], [0])
                T.buffer_store(self.ends, acc[0], [i])
            T.buffer_store(self.above, count[0], [0])
        _barrier()
        self.positive = T.bind(self.above[0])

    def find(self, reaches: Any) -> tuple[Any, Any]:
        """(the first element whose running sum `reaches`, that sum); else the last, and all."""
        work, thread = self.work, self.thread
        last = work.width - 1
        self._first(self.ends, reaches, last // work.stretch)
        stretch = T.bind(self.found[0])
        start = T.bind(stretch * work.stretch)
        stop = T.bind(T.min(start + work.stretch, work.width))
        before_value = T.bind(self.ends[T.max(stretch - 1, 0)])
        before = T.bind(T.Select(stretch > 0, before_value, T.float32(0)))
        whole = T.bind(self.ends[stretch])
        part = -(-work.stretch // work.threads)
        mine = T.bind(start + thread * part)
        acc = registers(1, 0.0)
        with T.serial(0, part) as i:
            with T.If(mine + i < stop), T.Then():
                T.buffer_store(acc, acc[0] + self.probs[self.row, mine + i], [0])
        T.buffer_store(self.sums, acc[0], [thread])
        _barrier()
        with T.If(thread == 0), T.Then():
            running = registers(1)
            T.buffer_store(running, before, [0])
            with T.serial(0, work.threads) as i:
                T.buffer_store(running, running[0] + self.sums[i], [0])
                # another order of summation: the stretch ends at its sum, and not above before
                ended = start + (i + 1) * part >= stop
                end = T.Select(ended, whole, T.min(running[0], whole))
                T.buffer_store(self.inner, end, [i])
        _barrier()
        self._first(self.inner, reaches, (work.stretch - 1) // part)
        which = T.bind(self.found[0])
        with T.If(thread == 0), T.Then():
            self._walk(reaches, which, start, stop, before, part)
        _barrier()
        return T.bind(self.place[0]), T.bind(self.mass[0])

    def _first(self, sums: Any, reaches: Any, default: int) -> None:
        """found[0] = the first of rising sums that `reaches`."""
        thread = self.thread
        _barrier()
        with T.If(thread == 0), T.Then():
            T.buffer_store(self.found, default, [0])
        _barrier()
        here, left = T.bind(sums[thread]), T.bind(sums[T.max(thread - 1, 0)])
        sooner = T.And(thread > 0, reaches(left))
        with T.If(T.And(reaches(here), T.Not(sooner))), T.Then():
            T.buffer_store(self.found, thread, [0])
        _barrier()

    def _walk(
        self, reaches: Any, which: Any, start: Any, stop: Any, before: Any, part: int
    ) -> None:
        """place[0] and mass[0]: the first element that `reaches` in a part of a stretch."""
        end, left = T.bind(self.inner[which]), T.bind(self.inner[T.max(which - 1, 0)])
        first = T.bind(start + which * part)
        # the running sum, and it at the place: at the last element of the part it is known
        running, place = registers(2), _integer(0)
        T.buffer_store(place, T.min(first + part, stop) - 1, [0])
        T.buffer_store(running, T.Select(which > 0, left, before), [0])
        T.buffer_store(running, end, [1])
        with T.serial(0, part - 1) as i:
            at = T.bind(first + i)
            with T.If(at < place[0]), T.Then():
                more = running[0] + self.probs[self.row, at]
                T.buffer_store(running, T.min(more, end), [0])
                with T.If(reaches(running[0])), T.Then():
                    T.buffer_store(place, at, [0])
                    T.buffer_store(running, running[0], [1])
        T.buffer_store(self.place, place[0], [0])
        T.buffer_store(self.mass, running[1], [0])


def _integer(value: int) -> Any:
    made = T.alloc_buffer((1,), "int32", scope="local", layout=None)
    T.buffer_store(made, value, [0])
    return made


def _barrier() -> None:
    T.evaluate(T.tvm_storage_sync("shared"))
