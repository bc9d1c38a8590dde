"""The frame of the kernels that a KV cache calls, of any target: arguments, PrimFuncs, tasks.

A kernel is a Python function that emits TIR.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from qcc.quant_schemes.attributes import OP_PATTERN, OPAQUE, SCHEDULED

_ATTRS = {"tirx.noalias": True, SCHEDULED: True, OP_PATTERN: OPAQUE}


class Build:
    """What `kernel` hands out: `body()` opens the body, `result()` is the PrimFunc afterwards."""

    def __init__(self, ib: Any) -> None:
        self._ib = ib

    @contextmanager
    def body(self) -> Iterator[None]:
        """The root block. Its reads and writes are empty: no pass looks inside an opaque kernel."""
        with T.sblock("root"):
            T.reads()
            T.writes()
            yield

    def result(self) -> Any:
        return self._ib.get()


@contextmanager
def kernel(name: str) -> Iterator[Build]:
    """Build a private PrimFunc: declare the arguments in order, then its body."""
    with IRBuilder() as ib:
        with T.prim_func(is_private=True, s_tir=True):
            T.func_name(name)
            T.func_attr(_ATTRS)
            yield Build(ib)


def tensor(name: str, shape: Sequence[Any], dtype: str) -> Any:
    """A compact array argument."""
    return T.match_buffer(T.arg(name, T.handle()), shape, dtype)


def rows_of(name: str, rows: Any) -> Any:
    """An f32 argument [rows, any, any], of which a kernel uses what it knows to be there."""
    return tensor(name, (rows, T.int32(), T.int32()), "float32")


def aux_buffer(name: str, shape: Sequence[Any]) -> Any:
    """An int32 argument that may be a view into a larger array, as the cache's index arrays are."""
    offset = T.int32()
    return T.match_buffer(T.arg(name, T.handle()), shape, "int32", elem_offset=offset)


Mask = Literal["plain", "sliding", "tree"]


@dataclass(frozen=True)
class Task:
    """The sequence of a task: its tokens from q0 on, its keys, and the position of the first."""

    b: Any
    q0: Any
    tokens: Any
    kv_len: Any
    k_base: Any
