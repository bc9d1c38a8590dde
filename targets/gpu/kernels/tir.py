"""Small helpers to write GPU kernels: bound loops, registers, sums over a workgroup's threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import ir, tirx
from tvm.tirx.script.builder import ir as T

VECTOR = 4  # numbers that one load of a shader takes


def ceil_div(a: Any, b: int) -> Any:
    """ceil(a / b) of a nonnegative int or expression."""
    return -(-a // b) if isinstance(a, int) else tirx.floordiv(a + (b - 1), b)


def block(extent: Any, axis: str = "x") -> Any:
    """A loop over workgroups."""
    return T.thread_binding(0, extent, thread=f"blockIdx.{axis}")


def threads(extent: int) -> Any:
    """The loop over a workgroup's threads."""
    return T.thread_binding(0, extent, thread="threadIdx.x")


def registers(count: int, value: float | None = None) -> Any:
    """`count` f32 of a thread, each `value` unless None."""
    found = T.alloc_buffer((count,), "float32", scope="local", layout=None)
    for i in range(count if value is not None else 0):
        T.buffer_store(found, T.float32(value), [i])
    return found


def shared(shape: Sequence[int], dtype: str) -> Any:
    """Memory of a workgroup."""
    return T.alloc_buffer(tuple(shape), dtype, scope="shared", layout=None)


def as_vectors(buffer: Any, size: Any, lanes: int = VECTOR) -> Any:
    """An array argument of `size` numbers as vectors, flat.

    Emit it outside of every grid. All of a kernel's accesses must go through it; the shader's array
    is then one of vectors.
    """
    dtype = f"{buffer.dtype}x{lanes}"
    pointer = tirx.call_intrin(
        ir.PointerType(ir.PrimType(dtype), "global"), "tirx.reinterpret", buffer.data
    )
    return T.decl_buffer((size // lanes,), dtype, data=T.bind(pointer))


def elements(vector: Any) -> list[Any]:
    """The numbers of a vector."""
    return [tirx.Shuffle([vector], [tirx.IntImm("int32", i)]) for i in range(VECTOR)]


def when(condition: Any, emit: Callable[[], None]) -> None:
    """Emit statements under a condition; True: without one."""
    if condition is True:
        emit()
        return
    with T.If(condition), T.Then():
        emit()


def tree_reduce(
    memories: Sequence[Any], index: Callable[[Any], list[Any]], lane: Any, lanes: int
) -> None:
    """Add memory[index(i)] over i < lanes, a power of two, into index(0), in each of some memories.

    Threads `lane` share the work; TVM puts a barrier between the steps, and would put more between
    sums in one memory.
    """
    step = lanes // 2
    while step:
        with T.If(lane < step), T.Then():
            for memory in memories:
                total = memory[tuple(index(lane))] + memory[tuple(index(lane + step))]
                T.buffer_store(memory, total, index(lane))
        step //= 2
