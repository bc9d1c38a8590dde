"""Which rows that linear layers multiply `prepare` can compute itself: norms, gated activations."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from tvm import relax as rx
from tvm import tirx
from tvm.relax.expr_functor import PyExprVisitor, visitor

from qcc.targets.cpu.kernels.row_sources import Gated, Normed, RowSource
from qcc.targets.matching import Bindings, is_op

ACTIVATIONS = {"relax.nn.silu": "silu", "relax.nn.gelu_tanh": "gelu_tanh"}


def match_source(bindings: Bindings, x: Any, k: int) -> tuple[RowSource, list[Any]] | None:
    """The source of x [..., k], and the expressions that it is computed from."""
    value: Any = bindings.get(x)
    if is_op(value, "relax.nn.rms_norm"):
        data, weight = value.args
        last = [int(axis) % len(x.ty.shape) for axis in value.attrs.axes]
        if last == [len(x.ty.shape) - 1] and _is_f32(data) and _is_f32(weight):
            return Normed(k, float(value.attrs.epsilon)), [data, weight]
    if is_op(value, "relax.multiply"):
        gate: Any
        gate, up = (bindings.get(arg) for arg in value.args)
        for name, activation in ACTIVATIONS.items():
            if is_op(gate, name):
                both = _halves(bindings, bindings.get(gate.args[0]), up)
                if both is not None and _is_f32(both):
                    return Gated(k, activation), [both]
    return None


def _is_f32(value: Any) -> bool:
    return str(value.ty.dtype) == "float32"


def _halves(bindings: Bindings, first: Any, second: Any) -> Any | None:
    """What two expressions are the halves of, along the last axis."""
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
    return split.args[0] if equal and axis == len(split.args[0].ty.shape) - 1 else None


@visitor
class Uses(PyExprVisitor):  # type: ignore[misc]
    """The calls that use each variable of a function, in `of`; None stands for any other use."""

    def __init__(self) -> None:
        """Start with none."""
        super().__init__()
        self.of: dict[Any, list[rx.Call | None]] = defaultdict(list)

    def find(self, func: rx.Function) -> dict[Any, list[rx.Call | None]]:
        """Read a function."""
        self.visit_expr(func.body)
        return self.of

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
