"""WidenMatmul: the products that no kernel took sum in float32.

Before:  y = matmul(a, b)                                # f16, and so would be its sums
After:   y = astype(matmul(a, b, out_dtype="float32"), "float16")
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax as rx
from tvm.relax.expr_functor import PyExprMutator, mutator

from qcc.targets.matching import is_op

NARROW = ("float16", "bfloat16")


@tvm.transform.module_pass(opt_level=0, name="WidenMatmul")
class WidenMatmul:
    """The pass."""

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Rewrite every Relax function."""
        rewrite = _Rewrite(mod)
        for gv, func in mod.functions_items():
            if isinstance(func, rx.Function):
                rewrite.builder_.update_func(gv, rewrite.visit_expr(func))
        return rewrite.builder_.get()


@mutator
class _Rewrite(PyExprMutator):  # type: ignore[misc]
    def visit_call_(self, call: rx.Call) -> rx.Expr:
        call = super().visit_call_(call)
        if not is_op(call, "relax.matmul") or str(call.ty.dtype) not in NARROW:
            return call
        wide = self.builder_.emit(rx.op.matmul(*call.args, out_dtype="float32"))
        return rx.op.astype(wide, call.ty.dtype)
