"""The frame of the KV cache's GPU kernels: arguments, grids, vectors, and numbers kept by name.

A kernel is a Python function that emits TIR. Arrays of numbers are seen as vectors of a few lanes
through a pointer of another type, which the code generators turn into wide loads and stores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from qcc.targets.gpu.kernels.tir import VECTOR, as_vectors
from qcc.targets.gpu.limits import Limits
from qcc.targets.spec import KVCacheConfig


@contextmanager
def grid(threads: int, x: Any, y: Any = 1) -> Iterator[tuple[Any, Any, Any]]:
    """A launch of x * y workgroups of `threads`: (number in x, in y, of the thread)."""
    with (
        T.thread_binding(0, x, thread="blockIdx.x") as i,
        T.thread_binding(0, y, thread="blockIdx.y") as j,
        T.thread_binding(0, threads, thread="threadIdx.x") as thread,
    ):
        yield i, j, thread


@contextmanager
def when(condition: Any) -> Iterator[None]:
    """Emit the body under a condition."""
    with T.If(condition), T.Then():
        yield


def strided(count: Any, thread: Any, threads: int, emit: Callable[[Any], None]) -> None:
    """Emit emit(i) for i < count, shared among the threads of a workgroup."""
    with T.serial(0, ceil_div(count, threads)) as step:
        i = T.bind(step * threads + thread)
        if isinstance(count, int) and count % threads == 0:
            emit(i)
        else:
            with when(i < count):
                emit(i)


def barrier() -> None:
    """All threads of a workgroup arrive, and see what the others wrote to its memory."""
    T.evaluate(T.tvm_storage_sync("shared"))


def ceil_div(a: Any, b: int) -> Any:
    return -(-a // b) if isinstance(a, int) else (a + (b - 1)) // b


def f32(value: float) -> Any:
    return tirx.FloatImm("float32", value)


def shared(count: int, dtype: str = "float32") -> Any:
    """Memory of a workgroup."""
    return T.alloc_buffer((count,), dtype, scope="shared")


class Reg:
    """A number or vector of a thread that can be assigned in a loop."""

    def __init__(self, value: Any, dtype: str = "float32") -> None:
        self.buffer = T.alloc_buffer((1,), dtype, scope="local")
        self.set(value)

    def get(self) -> Any:
        return self.buffer[0]

    def set(self, value: Any) -> None:
        T.buffer_store(self.buffer, value, [0])


def keep(value: Any, dtype: str = "float32") -> Any:
    """Name a value that is used more than once: TVM writes a T.bind out again at each use."""
    return Reg(value, dtype).get()


def keep_int(value: Any) -> Any:
    return keep(value, "int32")


@dataclass(frozen=True)
class Plan:
    """What the kernels of a cache have in common."""

    config: KVCacheConfig
    limits: Limits

    @property
    def lanes(self) -> int:
        """Of all vectors: they divide a head's numbers, and the halves that rope pairs."""
        c = self.config
        return math.gcd(VECTOR, c.head_dim, c.rotary_dim // 2)

    @property
    def chunks(self) -> int:
        """Vectors of a head's keys, queries, or values."""
        return self.config.head_dim // self.lanes

    @property
    def stride(self) -> int:
        """Query heads of a kv head, a carrier included."""
        return self.config.num_attention_heads // self.config.num_key_value_heads

    def threads(self, items: int) -> int:
        """Of a workgroup that goes over `items`: in steps of 32."""
        return min(self.limits.max_threads, -(-items // 32) * 32)

    def typed(self, dtype: str) -> str:
        """The dtype of a vector."""
        return dtype if self.lanes == 1 else f"{dtype}x{self.lanes}"

    def splat(self, value: Any) -> Any:
        """A scalar in every lane; a Python float is an f32."""
        value = f32(value) if isinstance(value, float) else value
        return value if self.lanes == 1 else T.broadcast(value, self.lanes)

    def cast(self, value: Any, dtype: str) -> Any:
        """A vector with lanes of another dtype."""
        return T.Cast(self.typed(dtype), value)

    def lane_sum(self, value: Any) -> Any:
        """The sum of the lanes of a vector that is a variable."""
        if self.lanes == 1:
            return value
        parts = [tirx.Shuffle([value], [tirx.IntImm("int32", i)]) for i in range(self.lanes)]
        return sum(parts[1:], parts[0])

    def literals(self, values: Sequence[int]) -> Any:
        """A vector of uint32 literals."""
        found = [tirx.IntImm("uint32", value) for value in values]
        order = [tirx.IntImm("int32", i) for i in range(len(values))]
        return found[0] if len(values) == 1 else tirx.Shuffle(found, order)

    def vectors(self, buffer: Any, size: Any) -> Any:
        """An array argument of `size` numbers as vectors, flat; outside of every grid."""
        if self.lanes == 1:
            return flat(buffer, size)
        return as_vectors(buffer, size, self.lanes)

    def load(self, buffer: Any, i: Any) -> Any:
        """The i-th vector of an array of vectors or of numbers, as f32."""
        value = buffer[self._at(buffer, i)]
        return value if buffer.dtype.startswith("float32") else self.cast(value, "float32")

    def store(self, buffer: Any, i: Any, value: Any) -> None:
        """Write a vector of f32, rounded to what the buffer holds."""
        if not buffer.dtype.startswith("float32"):
            value = self.cast(value, "float16")
        T.buffer_store(buffer, value, [self._at(buffer, i)])

    def _at(self, buffer: Any, i: Any) -> Any:
        numbers = self.lanes > 1 and "x" not in buffer.dtype
        return T.ramp(i * self.lanes, 1, self.lanes) if numbers else i


def flat(buffer: Any, size: Any) -> Any:
    """A 1-D alias of a compact array argument."""
    return T.decl_buffer((size,), buffer.dtype, data=buffer.data)
