"""StorageInBytes: planned storages get the element type that their size is counted in.

Before:  alloc_storage(shape([4194304]), dtype float32)    # planner: bytes; VM: elements, 16 MiB
After:   alloc_storage(shape([4194304]), dtype uint8)      # 4 MiB
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax as rx
from tvm.relax.expr_functor import PyExprMutator, mutator

_UINT8 = tvm.ir.GenericConst(tvm.DataType("uint8"), rx.AnyType())


@tvm.transform.module_pass(opt_level=0, name="StorageInBytes")
class StorageInBytes:
    """The pass; it follows StaticPlanBlockMemory."""

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
        if call.op != tvm.ir.Op.get("relax.memory.alloc_storage"):
            return super().visit_call_(call)
        args = [*call.args[:3], _UINT8]
        return rx.Call(call.op, args, call.attrs, call.ty_args)
