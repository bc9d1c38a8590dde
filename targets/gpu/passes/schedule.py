"""ScheduleKernels: the PrimFuncs that no kernel took get threads from TVM's rules for GPUs.

Before:  for i, j in grid(m, 2048): y[i, j] = f(x[i, j])
After:   the same over blockIdx.x and threadIdx.x

Every PrimFunc is tried with the rules for reductions, then with the one that takes anything: where
an odd reduction makes the first fail the second serves.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import tirx
from tvm.s_tir import dlight

from qcc.quant_schemes.attributes import SCHEDULED


@tvm.transform.module_pass(opt_level=0, name="ScheduleKernels")
class ScheduleKernels:
    """The pass for one target."""

    def __init__(self, target: tvm.target.Target) -> None:
        """`target` gives the rules its limits."""
        self.target = target

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Schedule every PrimFunc that is not marked as scheduled."""
        with self.target:
            for gv, func in mod.functions_items():
                if isinstance(func, tirx.PrimFunc) and not (func.attrs and SCHEDULED in func.attrs):
                    mod = _updated(mod, gv, self._scheduled(func))
        return mod

    def _scheduled(self, func: tirx.PrimFunc) -> tirx.PrimFunc:
        gpu = dlight.gpu
        for rules in ((gpu.Reduction(), gpu.GeneralReduction()), (gpu.Fallback(),)):
            try:
                alone = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
                found = dlight.ApplyDefaultSchedule(*rules)(alone)["main"]
            except (tvm.error.InternalError, AssertionError, tvm.s_tir.ScheduleError):
                continue
            if found.attrs and SCHEDULED in found.attrs:
                return found.without_attr("global_symbol")
        raise AssertionError(f"no schedule for {func.script()}")


def _updated(mod: tvm.IRModule, gv: Any, func: tirx.PrimFunc) -> tvm.IRModule:
    mod = mod.clone()
    mod.update_func(gv, func)
    return mod
