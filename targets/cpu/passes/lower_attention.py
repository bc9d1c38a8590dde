"""LowerAttention: attention over a cache whose storage is chosen when it is made.

Before:  y = call_dps_packed("...attention_with_fused_qkv", (cache, layer, scale, qkv),
                             out_ty=Tensor((n, hq, d)))
After:   _ = extent("kv")                                     # Tensor((kv,)), see extents.py
         all = reshape(qkv, (n, (hq + 2 hkv) * d, 1))
         o = call_dps_packed("...attention_with_fused_qkv", (cache, layer, scale, all),
                             out_ty=Tensor((n, kv, 1)))
         y = view(o, (n, hq, d))                              # its first numbers

KVStorage says why: for TVM's cache keys and values are what is left of qkv behind `kv` query heads.
The functions that make a cache lose the one without a choice; its name goes to the first storage.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax as rx
from tvm import tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from qcc.targets.extents import extent
from qcc.targets.matching import is_op, weighted_functions

ATTENTION = "vm.builtin.attention_kv_cache_attention_with_fused_qkv"
CREATE = "create_tir_paged_kv_cache"
EXTENT = "kv"


@tvm.transform.module_pass(opt_level=0, name="LowerAttention")
class LowerAttention:
    """The pass, for modules that have functions for caches of every storage."""

    def __init__(self, storages: tuple[str, ...]) -> None:
        """`storages`: their names, that of the compute dtype first."""
        self.storages = storages

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Rewrite every function that takes the packed parameters."""
        default = f"{CREATE}_{self.storages[0]}"
        if default not in {str(gv.name_hint) for gv in mod.get_global_vars()}:
            return mod
        rewrite = _Rewrite(mod)
        for gv, func in weighted_functions(mod):
            rewrite.size = None
            rewrite.builder_.update_func(gv, rewrite.visit_expr(func))
        mod = rewrite.builder_.get()
        made = rx.utils.copy_with_new_vars(mod[default])
        mod.update_func(mod.get_global_var(CREATE), made.with_attr("global_symbol", CREATE))
        return mod


@mutator
class _Rewrite(PyExprMutator):  # type: ignore[misc]
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.size: tirx.Var | None = None  # of the function that is being rewritten

    def visit_call_(self, call: rx.Call) -> rx.Expr:
        call = super().visit_call_(call)
        if not is_op(call, "relax.call_dps_packed"):
            return call
        if str(call.args[0].global_symbol) != ATTENTION:
            return call
        if self.size is None:
            self.size = extent(self.builder_, EXTENT)
        cache, layer, scale, qkv = call.args[1]
        n, heads, dim = qkv.ty.shape
        numbers = self.builder_.emit(rx.op.reshape(qkv, rx.ShapeExpr([n, heads * dim, 1])))
        out = self.builder_.emit(
            rx.call_dps_packed(
                ATTENTION,
                [cache, layer, scale, numbers],
                out_ty=rx.TensorType((n, self.size, 1), call.ty.dtype),
            )
        )
        return rx.op.memory.view(out, call.ty.shape, call.ty.dtype, 0)
