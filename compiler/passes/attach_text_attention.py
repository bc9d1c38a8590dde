"""AttachTextAttention: attention over texts end to end becomes a call of the target's kernel.

Before:  y = call_dps_packed("qcc.text_attention", (q, k, v, starts, positions, zeros, scale))
After:   both = call_tir(text_attention, (q, starts, k, v, starts, positions, zeros))
         y = both[0]                                     # both[1]: log-sum-exps, of no use here

The kernel is `prefill_ragged` of KVKernels, its scalar arguments fixed.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax as rx
from tvm import tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from qcc.compiler.models.texts import ATTENTION
from qcc.targets.matching import is_op, weighted_functions

SCALARS = 5  # the kernel's last arguments: causal, rotary_mode, rope_scale, rope_theta, sm_scale
NO_ROTATION = 0


@tvm.transform.module_pass(opt_level=0, name="AttachTextAttention")
class AttachTextAttention:
    """The pass for one target's kernel."""

    def __init__(self, kernel: tirx.PrimFunc, causal: bool) -> None:
        """`causal`: a token does not see those behind it."""
        self.kernel, self.causal = kernel, causal

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Rewrite every function that takes the packed parameters."""
        rewrite = _Rewrite(mod, self.kernel, self.causal)
        for gv, func in weighted_functions(mod):
            rewrite.builder_.update_func(gv, rewrite.visit_expr(func))
        return rewrite.builder_.get()


@mutator
class _Rewrite(PyExprMutator):  # type: ignore[misc]
    def __init__(self, mod: tvm.IRModule, kernel: tirx.PrimFunc, causal: bool) -> None:
        super().__init__(mod)
        self.kernel, self.causal = kernel, causal
        self.kernels: dict[float, Any] = {}  # by the scale

    def visit_call_(self, call: rx.Call) -> rx.Expr:
        if not is_op(call, "relax.call_dps_packed"):
            return super().visit_call_(call)
        if str(call.args[0].global_symbol) != ATTENTION:
            return super().visit_call_(call)
        *tensors, scale = call.args[1]
        q, k, v, starts, positions, zeros = (self.visit_expr(tensor) for tensor in tensors)
        n, heads, _ = call.ty.shape
        kernel = self._kernel(float(scale.value))
        out = [call.ty, rx.TensorType((n, heads), "float32")]
        args = [q, starts, k, v, starts, positions, zeros]
        both = self.builder_.emit(rx.call_tir(kernel, args, out_ty=out))
        return rx.TupleGetItem(both, 0)

    def _kernel(self, scale: float) -> Any:
        """The kernel with its scalars fixed."""
        if scale not in self.kernels:
            # Variables of its own: TVM renames only some of those that two functions share.
            kernel = tvm.ir.load_json(tvm.ir.save_json(self.kernel))
            params = list(kernel.params)[-SCALARS:]
            values = (int(self.causal), NO_ROTATION, 1.0, 1.0, scale)
            fixed = {
                param: tirx.const(value, str(param.ty.dtype))
                for param, value in zip(params, values, strict=True)
            }
            func = kernel.specialize(fixed)
            self.kernels[scale] = self.builder_.add_func(func, "text_attention")
        return self.kernels[scale]
