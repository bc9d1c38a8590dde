"""row_kernel: a hand-written PrimFunc of one independent block a row.

It names no device: every target's scheduler takes such a function, in parallel over the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from qcc.quant_schemes.attributes import OP_PATTERN, OPAQUE, ROLE

Args = Sequence[tuple[str, tuple[Any, ...], str]]  # name, shape, dtype


def i64(value: int) -> tirx.IntImm:
    """An int64 constant; FuseTIR wants int64 extents everywhere."""
    return tirx.IntImm("int64", value)


def row_kernel(
    name: str,
    rows: Any,
    inputs: Args,
    outputs: Args,
    body: Callable[..., None],
    scattered: bool = False,
) -> tirx.PrimFunc:
    """A PrimFunc of one block a row: `body(row, *buffers)` writes that row of every output.

    `scattered`: it writes elements of its own of every output, wherever they are.
    """
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True, private=True):
            T.func_attr({"tirx.noalias": True, OP_PATTERN: OPAQUE, ROLE: name})
            buffers = [
                T.arg(arg, T.buffer(shape, dtype, layout=None))
                for arg, shape, dtype in [*inputs, *outputs]
            ]
            with T.sblock("root"):
                with T.serial(i64(0), rows) as i:
                    with T.sblock(name):
                        row = T.axis.spatial(rows, i)
                        # workspace rows are read as well, after this block wrote them: not reads
                        T.reads(*(_region(buffer, None) for buffer in buffers[: len(inputs)]))
                        at = None if scattered else row
                        T.writes(*(_region(buffer, at) for buffer in buffers[len(inputs) :]))
                        body(row, *buffers)
    return builder.get()


def _region(buffer: Any, row: Any) -> Any:
    """The whole buffer, or a row of it."""
    whole = [slice(i64(0), extent) for extent in buffer.shape]
    return buffer[tuple(whole if row is None else [row, *whole[1:]])]


def local(dtype: str, value: Any) -> Any:
    """A variable that starts with `value`."""
    buffer = T.alloc_buffer((1,), dtype, scope="local", layout=None)
    T.buffer_store(buffer, value, [0])
    return buffer
