"""What the rows come from that a linear layer multiplies: norms, gated activations.

Before a target's lowering these are Relax operators; the matches name the variables that a kernel
may compute from.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from tvm import relax as rx
from tvm import tirx
from tvm.relax.expr_functor import PyExprVisitor, visitor

from qcc.targets.matching import Bindings, is_op

ACTIVATIONS = {"relax.nn.silu": "silu", "relax.nn.gelu_tanh": "gelu_tanh"}
Uses = dict[Any, list[rx.Call | None]]  # variable -> the calls that use it; None: any other use


def match_norm(bindings: Bindings, x: Any) -> tuple[Any, Any, float] | None:
    """(data, weight, epsilon) of x = rms_norm over the last axis; else None."""
    value: Any = bindings.get(x)
    if not is_op(value, "relax.nn.rms_norm"):
        return None
    data, weight = value.args
    last = [int(axis) % len(x.ty.shape) for axis in value.attrs.axes]
    if last != [len(x.ty.shape) - 1]:
        return None
    return data, weight, float(value.attrs.epsilon)


@dataclass(frozen=True)
class Gate:
    """act(first half) * second half: `both` halves, the `pair` of them, the variables after it."""

    activation: str
    both: Any
    pair: Any
    after: tuple[Any, ...]


def match_gate(bindings: Bindings, value: Any) -> Gate | None:
    """The gate that an expression is; else None."""
    if not is_op(value, "relax.multiply"):
        return None
    gate_var, up_var = value.args
    gate: Any
    gate, up = bindings.get(gate_var), bindings.get(up_var)
    for name, activation in ACTIVATIONS.items():
        if is_op(gate, name):
            first_var = gate.args[0]
            first: Any = bindings.get(first_var)
            halves: Any = _halves(bindings, first, up)
            if halves is not None:
                after = gate_var, up_var, first_var
                return Gate(activation, halves.args[0], first.tuple_value, after)
    return None


def _halves(bindings: Bindings, first: Any, second: Any) -> Any | None:
    """The split along the last axis whose two halves these are."""
    if not isinstance(first, rx.TupleGetItem) or not isinstance(second, rx.TupleGetItem):
        return None
    if not first.tuple_value.same_as(second.tuple_value) or (first.index, second.index) != (0, 1):
        return None
    split: Any = bindings.get(first.tuple_value)
    if not is_op(split, "relax.split") or len(split.ty.fields) != 2:
        return None
    halves = [field.shape[-1] for field in split.ty.fields]
    axis = int(split.attrs.axis) % len(split.args[0].ty.shape)
    equal = all(isinstance(half, tirx.IntImm) for half in halves) and halves[0] == halves[1]
    return split if equal and axis == len(split.args[0].ty.shape) - 1 else None


def uses_of(func: rx.Function) -> Uses:
    """The calls that use each variable of a function; None stands for any other use."""
    found = _FindUses()
    found.visit_expr(func.body)
    return found.of


@visitor
class _FindUses(PyExprVisitor):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.of: Uses = defaultdict(list)

    def visit_call_(self, call: rx.Call) -> None:
        """Its arguments are used by it; those in a tuple by something else."""
        for arg in call.args:
            if isinstance(arg, rx.Var):
                self.of[arg].append(call)
            else:
                self.visit_expr(arg)

    def visit_var_(self, var: rx.Var) -> None:
        """A use that is no argument of a call."""
        self.of[var].append(None)

    visit_dataflow_var_ = visit_var_
