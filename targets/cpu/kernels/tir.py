"""Small helpers around TVM's IR builder: kernels are Python functions that emit TIR."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.tirx.script.builder import ir as T

from qcc.targets.kernel import i64

AHEAD = 3072  # bytes from what a GEMV reads to what it prefetches
LINE = 64  # bytes
ITEMSIZE = {"uint32": 4, "float32": 4, "float16": 2, "uint16": 2, "uint8": 1}
MAX_STACK_BYTES = 1024  # TVM keeps a local buffer of up to this size on the stack


def serial(stop: Any) -> Any:
    """A serial loop over int64 0..stop."""
    return T.serial(i64(0), i64(stop) if isinstance(stop, int) else stop)


def parallel(stop: Any) -> Any:
    """A loop split over the thread pool."""
    return T.parallel(i64(0), i64(stop) if isinstance(stop, int) else stop)


def lanes_from(start: Any, lanes: int) -> Any:
    """The index vector start, start + 1, ...; a scalar index for one lane."""
    start = i64(start) if isinstance(start, int) else start
    return T.ramp(start, 1, lanes) if lanes > 1 else start


def splat(value: Any, lanes: int) -> Any:
    """A scalar in every lane."""
    return T.broadcast(value, lanes) if lanes > 1 else value


def fma(a: Any, b: Any, c: Any, vtype: str) -> Any:
    """a * b + c, rounded once."""
    return T.call_llvm_pure_intrin(vtype, "llvm.fma", a, b, c)


def zeros(lanes: int) -> Any:
    """A vector of f32 zeros."""
    return splat(T.float32(0), lanes)


def registers(count: int, lanes: int) -> list[Any]:
    """`count` local f32 vectors, each its own buffer so that LLVM keeps it in a register."""
    return [T.alloc_buffer((1,), f"float32x{lanes}", layout=None) for _ in range(count)]


def lines_ahead(packed: Any, block: Any, first: Any, count: int, ahead: int = AHEAD) -> list[Any]:
    """Addresses of the lines `ahead` bytes after columns first ... first + count of a block.

    `packed` [blocks, columns, L] goes on in the next block; what lies past its end is asked for in
    vain, which never faults.
    """
    size = int(packed.shape[2]) * ITEMSIZE[str(packed.dtype)]
    columns = range(0, count, max(1, LINE // size))
    return [T.address_of(packed[block, first + (ahead // size + i), 0]) for i in columns]


def prefetch(addresses: Sequence[Any]) -> None:
    """Ask for lines, which shall come into the second cache."""
    for where in addresses:
        read, second_cache, data = 0, 2, 1
        T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", where, read, second_cache, data))


def tree_sum(values: list[Any]) -> Any:
    """The sum of vectors in a balanced tree, bound to names level by level."""
    while len(values) > 1:
        pairs = [T.bind(a + b) for a, b in zip(values[::2], values[1::2], strict=False)]
        values = pairs + values[len(pairs) * 2 :]
    return values[0]
