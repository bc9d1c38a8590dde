"""Extents that the runtime chooses when it loads a library: those of tensors behind the weights.

In a target's lowering reading one is

    raw = call_pure_packed("qcc.extent", name)    # Tensor(ndim=1, uint8)
    _ = match_cast(raw, Tensor((name,), uint8))

until HoistRepack makes it the last entry of the packed parameters.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax as rx
from tvm import tirx

from qcc.targets.matching import is_op

MARKER = "qcc.extent"
DTYPE = "uint8"


def extent(builder: Any, name: str) -> tirx.Var:
    """Emit the reading of an extent where `builder` is; once a function."""
    kind = rx.TensorType(ndim=1, dtype=DTYPE)
    raw = builder.emit(rx.call_pure_packed(MARKER, tvm.ir.StringImm(name), ty_args=kind))
    value = tirx.Var(name, "int64")
    builder.match_cast(raw, rx.TensorType((value,), DTYPE))
    return value


def extent_of(value: Any) -> str | None:
    """The name of the extent that an expression reads; None: it is something else."""
    if not is_op(value, "relax.call_pure_packed"):
        return None
    return str(value.args[1].value) if str(value.args[0].global_symbol) == MARKER else None
