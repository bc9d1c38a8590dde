"""QuantizeActivations: what a quantized weight is multiplied with is rounded to int8, if asked for.

Before:  y = matmul(x, permute_dims(call_tir(dequantize, (q, s))))
After:   a = call_tir(quantize_activation, (x,))
         y = matmul(a, permute_dims(call_tir(dequantize, (q, s))))

"dynamic": a number of its own for each token and group of GROUP columns, computed in f32:
    s = max|x| / 127        a = clip(round_half_even(x / s), -127, 127) * s;  0 where s = 0
The result is floating: the module says what an int8 kernel computes, and runs without one. Targets
find the calls by `qcc.role`. Weights that stay floating are multiplied with x as it is.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import tvm
from tvm import relax as rx
from tvm import te, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from qcc.quant_schemes.attributes import QUANTIZE_ACTIVATION, ROLE
from qcc.quant_schemes.errors import SchemeError
from qcc.targets.matching import Bindings, match_linear, weighted_functions

GROUP = 32  # columns under one scale
TOP = 127


@tvm.transform.module_pass(opt_level=0, name="QuantizeActivations")
class QuantizeActivations:
    """The pass for a scheme's `activations`."""

    def __init__(self, activations: str) -> None:
        """`activations` is "none" or "dynamic".

        Raises:
            SchemeError: "static", which needs scales that no calibration makes yet.
        """
        if activations == "static":
            raise SchemeError("activations: static is not supported yet; use dynamic or none")
        assert activations in ("none", "dynamic"), activations
        self.activations = activations

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Rewrite every function that takes the packed parameters."""
        if self.activations == "none":
            return mod
        rewrite = _Rewrite(mod)
        for gv, func in weighted_functions(mod):
            rewrite.function(gv, func)
        return rewrite.builder_.get()


@cache
def quantize_activation_func(lead: tuple[int | None, ...], k: int, dtype: str) -> tirx.PrimFunc:
    """PrimFunc (x dtype[*lead, k]) -> dtype[*lead, k]; an extent None is a variable."""
    extents = [
        te.var(f"m{axis}", "int64") if extent is None else tirx.IntImm("int64", extent)
        for axis, extent in enumerate(lead)
    ]
    x = te.placeholder([*extents, tirx.IntImm("int64", k)], dtype, name="x")
    last = tirx.IntImm("int64", k - 1)
    member = te.reduce_axis((tirx.IntImm("int64", 0), tirx.IntImm("int64", GROUP)), name="member")

    def largest(*index: Any) -> Any:
        # The last group repeats its last column where the row ends.
        column = tirx.min(index[-1] * GROUP + member, last)
        return te.max(tirx.abs(x[(*index[:-1], column)].astype("float32")), axis=member)

    groups = tirx.IntImm("int64", -(-k // GROUP))
    top = te.compute([*extents, groups], _counted(largest, len(x.shape)), name="largest")

    def rounded(*index: Any) -> Any:
        scale = top[(*index[:-1], tirx.floordiv(index[-1], GROUP))] / tirx.const(TOP, "float32")
        zero = tirx.const(0, "float32")
        divisor = tirx.Select(scale > zero, scale, tirx.const(1, "float32"))
        code = tirx.nearbyint(x[index].astype("float32") / divisor)
        code = tirx.max(tirx.min(code, tirx.const(TOP, "float32")), tirx.const(-TOP, "float32"))
        return (code * scale).astype(dtype)

    out = te.compute(x.shape, _counted(rounded, len(x.shape)), name="quantize_activation")
    func = te.create_prim_func([x, out]).without_attr("global_symbol")
    return func.with_attr(ROLE, QUANTIZE_ACTIVATION)


def _counted(element: Any, count: int) -> Any:
    """`element` as a function of exactly `count` arguments: te.compute counts them."""
    return {1: lambda i: element(i), 2: lambda i, j: element(i, j)}.get(
        count, lambda i, j, c: element(i, j, c)
    )


@mutator
class _Rewrite(PyExprMutator):  # type: ignore[misc]
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.mod = mod
        self.bindings: Bindings = {}
        self.rounded: dict[Any, rx.Expr] = {}  # var of the old function -> its rounding, once

    def function(self, gv: Any, func: rx.Function) -> None:
        self.bindings, self.rounded = {}, {}
        self.builder_.update_func(gv, self.visit_expr(func))

    def visit_var_binding_(self, binding: rx.VarBinding) -> None:
        self.bindings[binding.var] = binding.value
        super().visit_var_binding_(binding)

    def visit_call_(self, call: rx.Call) -> rx.Expr:
        weight = match_linear(self.mod, self.bindings, call)
        if weight is None or weight.format.is_float:
            return super().visit_call_(call)
        x = call.args[0]
        if x not in self.rounded:
            self.rounded[x] = self._round(self.visit_expr(x))
        return rx.Call(
            call.op, [self.rounded[x], self.visit_expr(call.args[1])], call.attrs, call.ty_args
        )

    def _round(self, x: rx.Expr) -> rx.Expr:
        *lead, k = x.ty.shape
        known = tuple(int(d) if isinstance(d, tirx.IntImm) else None for d in lead)
        func = quantize_activation_func(known, int(k), str(x.ty.dtype))
        gv = self.builder_.add_func(func, "quantize_activation")
        return self.builder_.emit(rx.call_tir(gv, [x], out_ty=x.ty))
