"""Which rows that linear layers multiply `prepare` can compute itself: norms, gated activations."""

from __future__ import annotations

from typing import Any

from qcc.targets.cpu.kernels.row_sources import Gated, Normed, RowSource
from qcc.targets.matching import Bindings
from qcc.targets.sources import match_gate, match_norm


def match_source(bindings: Bindings, x: Any, k: int) -> tuple[RowSource, list[Any]] | None:
    """The source of x [..., k], and the expressions that it is computed from, all float32."""
    norm = match_norm(bindings, x)
    if norm is not None:
        data, weight, eps = norm
        return (Normed(k, eps), [data, weight]) if _is_f32(data) and _is_f32(weight) else None
    gate = match_gate(bindings, bindings.get(x))
    if gate is not None:
        return (Gated(k, gate.activation), [gate.both]) if _is_f32(gate.both) else None
    return None


def _is_f32(value: Any) -> bool:
    return str(value.ty.dtype) == "float32"
