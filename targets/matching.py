"""What a target's lowering looks for in a quantized module: linear layers, experts, table rows.

Decides on `qcc.role` and `qcc.format` alone; knows no device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax as rx
from tvm import tirx
from tvm.relax.expr_functor import PyExprVisitor, visitor

from qcc.quant_schemes.attributes import (
    DEQUANTIZE,
    DEQUANTIZE_ROWS,
    EXPERT_LINEAR,
    FORMAT,
    ROLE,
)
from qcc.quant_schemes.format import FLOAT_DTYPES, WeightFormat, float_format

Bindings = dict[Any, Any]  # variable -> the expression that it is bound to


@dataclass(frozen=True)
class Weight:
    """A matched weight [n, k]: its format and the variables of its stored parts."""

    format: WeightFormat
    n: int
    k: int
    parts: tuple[Any, ...]


def weighted_functions(mod: tvm.IRModule) -> list[tuple[Any, rx.Function]]:
    """The functions that take the packed parameters, by name."""
    found = [
        (gv, func)
        for gv, func in mod.functions_items()
        if isinstance(func, rx.Function) and func.attrs and "num_input" in func.attrs
    ]
    return sorted(found, key=lambda item: str(item[0].name_hint))


def is_one(extent: Any) -> bool:
    """Whether an extent is the constant 1."""
    return isinstance(extent, tirx.IntImm) and int(extent) == 1


def product_of(extents: Iterable[Any]) -> Any:
    """The product of extents of a shape, an IntImm where it is known."""
    found: Any = tirx.IntImm("int64", 1)
    for extent in extents:
        found = found * extent
    return tvm.sym.Analyzer().simplify(found)


def is_op(call: Any, name: str) -> bool:
    """Whether an expression is a call of Relax operator `name`."""
    return isinstance(call, rx.Call) and call.op == tvm.ir.Op.get(name)


def role_of(mod: tvm.IRModule, call: Any) -> str | None:
    """`qcc.role` of the PrimFunc that a call_tir calls."""
    if not is_op(call, "relax.call_tir"):
        return None
    attrs = mod[call.args[0]].attrs
    return str(attrs[ROLE]) if attrs and ROLE in attrs else None


def _format(mod: tvm.IRModule, call: Any) -> WeightFormat:
    return WeightFormat.from_dict(mod[call.args[0]].attrs[FORMAT])


@dataclass(frozen=True)
class ExpertLayer:
    """A matched linear layer of experts: `weight` [experts * n, k], rows n of each expert.

    Attributes:
        x: the variable [m, k], or [m, s, k] where each of a token's experts has a row of its own.
        ids: the variable int32[m, s].
    """

    weight: Weight
    n: int
    x: Any
    ids: Any

    @property
    def experts(self) -> int:
        """How many there are."""
        return self.weight.n // self.n


def packed_index(bindings: Bindings, var: Any) -> int | None:
    """The index in the packed tuple of a stored tensor's variable."""
    value = bindings.get(var)
    return int(value.index) if isinstance(value, rx.TupleGetItem) else None


def match_linear(mod: tvm.IRModule, bindings: Bindings, call: Any) -> Weight | None:
    """W of matmul(x, permute_dims(W)), W dequantized or a stored float matrix; else None."""
    if not is_op(call, "relax.matmul"):
        return None
    transposed: Any = bindings.get(call.args[1])
    if not is_op(transposed, "relax.permute_dims") or len(transposed.ty.shape) != 2:
        return None
    return _weight(mod, bindings, transposed.args[0])


def match_experts(mod: tvm.IRModule, bindings: Bindings, call: Any) -> ExpertLayer | None:
    """The layer that a call of role `expert_linear` is; its weight as in `match_linear`."""
    if role_of(mod, call) != EXPERT_LINEAR:
        return None
    x, weight, ids = call.args[1]
    found = _weight(mod, bindings, weight)
    return ExpertLayer(found, int(call.ty.shape[-1]), x, ids) if found else None


def _weight(mod: tvm.IRModule, bindings: Bindings, weight: Any) -> Weight | None:
    """What a variable [n, k] holds: a dequantized or a stored float matrix; else None."""
    value: Any = bindings.get(weight)
    n, k = (int(d) for d in weight.ty.shape)
    if role_of(mod, value) == DEQUANTIZE:
        return Weight(_format(mod, value), n, k, tuple(value.args[1]))
    if packed_index(bindings, weight) is not None:
        dtype = str(weight.ty.dtype)
        return Weight(float_format(dtype), n, k, (weight,))
    return None


def match_rows(mod: tvm.IRModule, call: Any) -> tuple[Weight, Any] | None:
    """(table, ids) of a dequantize_rows, or of take(W, ids) of a float matrix; else None."""
    if role_of(mod, call) == DEQUANTIZE_ROWS:
        *parts, ids = call.args[1]
        fmt = _format(mod, call)
    elif is_op(call, "relax.take") and int(call.attrs.axis) == 0:
        parts, ids = [call.args[0]], call.args[1]
        dtype = str(parts[0].ty.dtype)
        if dtype not in FLOAT_DTYPES or len(parts[0].ty.shape) != 2:
            return None
        fmt = float_format(dtype)
    else:
        return None
    shape = parts[0].ty.shape
    n = int(shape[1] if fmt.layout == "KN" and not fmt.is_float else shape[0])
    return Weight(fmt, n, int(call.ty.shape[-1]), tuple(parts)), ids


def multiplied(mod: tvm.IRModule) -> set[int]:
    """First tuple index of every weight that some function multiplies with."""
    found = _FindMultiplied(mod)
    for _, func in weighted_functions(mod):
        found.find(func)
    return found.indices


@visitor
class _FindMultiplied(PyExprVisitor):  # type: ignore[misc]
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__()
        self.mod = mod
        self.bindings: Bindings = {}
        self.indices: set[int] = set()

    def find(self, func: rx.Function) -> None:
        self.bindings = {}
        self.visit_expr(func.body)

    def visit_var_binding_(self, binding: rx.VarBinding) -> None:
        self.bindings[binding.var] = binding.value
        match = match_linear(self.mod, self.bindings, binding.value)
        if match:
            index = packed_index(self.bindings, match.parts[0])
            assert index is not None, "a stored part is an element of the packed tuple"
            self.indices.add(index)
