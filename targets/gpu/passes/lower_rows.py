"""LowerRows: what is done to rows of logits becomes kernels with many threads a row.

Before:  call_tir(argsort_rows, ...), call_tir(sample_rows, ...), call_tir_inplace(apply_..., ...)
         of a thread a row or a whole call; softmax_with_temperature in four steps
After:   the same calls, of kernels of the same arguments; softmax in one PrimFunc
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tvm
from tvm import relax as rx
from tvm import tirx

from qcc.quant_schemes.attributes import ROLE
from qcc.targets.gpu.kernels.logits import bitmask, logit_bias, penalty
from qcc.targets.gpu.kernels.softmax import softmax_rows, softmax_tiles
from qcc.targets.gpu.kernels.sort import argsort_rows
from qcc.targets.gpu.kernels.top_p import sample_rows
from qcc.targets.gpu.limits import Limits

# role -> (role, width of a row, limits) -> PrimFunc of the arguments that it had
KERNELS: Mapping[str, Callable[[str, int, Limits], tirx.PrimFunc]] = {
    "argsort_probs": argsort_rows,
    "sample_with_top_p": sample_rows,
    "apply_logit_bias_inplace": logit_bias,
    "apply_penalty_inplace": penalty,
    "apply_bitmask_inplace": bitmask,
}
SOFTMAX = "softmax_with_temperature"  # the role of a Relax function


@tvm.transform.module_pass(opt_level=0, name="LowerRows")
class LowerRows:
    """The pass for GPUs of some limits."""

    def __init__(self, limits: Limits) -> None:
        """`limits` parametrize the kernels."""
        self.limits = limits

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Replace every function of these roles."""
        result = mod.clone()
        for gv, func in mod.functions_items():
            role = str(func.attrs[ROLE]) if func.attrs and ROLE in func.attrs else ""
            if isinstance(func, tirx.PrimFunc) and role in KERNELS:
                width = int(func.params[0].shape[1])
                result.update_func(gv, KERNELS[role](role, width, self.limits))
            elif isinstance(func, rx.Function) and role == SOFTMAX:
                result = _softmax(result, gv, func, self.limits)
        return result


def _softmax(mod: tvm.IRModule, gv: Any, func: rx.Function, limits: Limits) -> tvm.IRModule:
    """The module with another body of (logits f32[b, 1, V], temperature f32[b]) -> f32[b, 1, V]."""
    logits, temperature = func.params
    rows, _, width = logits.ty.shape
    builder = rx.BlockBuilder(mod)
    kernel = builder.add_func(softmax_rows(SOFTMAX, int(width), limits), "softmax_rows")
    parts = rx.TensorType((rows, 2 * softmax_tiles(int(width), limits)), "float32")
    with builder.function(f"{gv.name_hint}_rows", [logits, temperature]):
        with builder.dataflow():
            out_ty = [logits.ty, parts]
            both = builder.emit(rx.call_tir(kernel, [logits, temperature], out_ty=out_ty))
            probs = builder.emit_output(both[0])
        made = builder.emit_func_output(probs)
    result = builder.finalize()
    body = result[made].with_attrs(dict(func.attrs.items()))
    result.update_func(result.get_global_var(gv.name_hint), body)
    del result[made]
    return result
