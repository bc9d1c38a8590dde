"""kernel: a PrimFunc that is written by hand, as Python functions that emit TIR; of any target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from qcc.quant_schemes.attributes import OP_PATTERN, OPAQUE, SCHEDULED

Arg = tuple[str, tuple[Any, ...], str]  # name, shape (ints or int64 variables), dtype


def i64(value: int) -> tirx.IntImm:
    """An int64 constant; FuseTIR wants int64 extents everywhere."""
    return tirx.IntImm("int64", value)


def kernel(
    name: str,
    args: Sequence[Arg],
    body: Callable[..., None],
    attrs: dict[str, Any],
    outputs: int = 1,
) -> tirx.PrimFunc:
    """A scheduled PrimFunc whose last arguments are written and the others read.

    Args:
        name: of the block, which survives fusion and shows in profiles.
        args: (name, shape, dtype) of each buffer; extents are ints or int64 variables.
        body: called with the buffers, emits the statements.
        attrs: attributes such as qcc.role.
        outputs: how many arguments are written.
    """
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True, private=True):
            T.func_attr({"tirx.noalias": True, SCHEDULED: True, OP_PATTERN: OPAQUE, **attrs})
            buffers = [
                T.arg(arg, T.buffer(extents(shape), dtype, layout=None))
                for arg, shape, dtype in args
            ]
            with T.sblock("root"):
                with T.sblock(name):
                    T.reads(*(_whole(buffer) for buffer in buffers[:-outputs]))
                    T.writes(*(_whole(buffer) for buffer in buffers[-outputs:]))
                    body(*buffers)
    return builder.get()


def extents(shape: Sequence[Any]) -> tuple[Any, ...]:
    """A shape with ints as int64 constants."""
    return tuple(i64(d) if isinstance(d, int) else d for d in shape)


def _whole(buffer: Any) -> Any:
    return buffer[tuple(slice(0, extent) for extent in buffer.shape)]
