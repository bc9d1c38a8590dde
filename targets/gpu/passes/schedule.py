"""ScheduleKernels: the PrimFuncs that no kernel took get threads.

Before:  for i, j in grid(m, 2048): y[i, j] = f(x[i, j])
After:   the same over blockIdx.x and threadIdx.x

Reductions by TVM's rules; where these do not take a function, or would start more workgroups than
a device does, each thread makes elements of its own, so many that the grid is small enough.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.s_tir import dlight

from qcc.quant_schemes.attributes import SCHEDULED
from qcc.targets.gpu.grids import analyzer_of, largest_extent, widest_grid
from qcc.targets.gpu.limits import Limits


@tvm.transform.module_pass(opt_level=0, name="ScheduleKernels")
class ScheduleKernels:
    """The pass for one target."""

    def __init__(self, target: tvm.target.Target, limits: Limits) -> None:
        """`target` for TVM's rules, `limits` for grids."""
        self.target, self.limits = target, limits

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Schedule every PrimFunc that is not marked as scheduled."""
        most, result = largest_extent(mod), mod.clone()
        with self.target:
            for gv, func in mod.functions_items():
                if isinstance(func, tirx.PrimFunc) and not (func.attrs and SCHEDULED in func.attrs):
                    result.update_func(gv, self._scheduled(func, most))
        return result

    def _scheduled(self, func: tirx.PrimFunc, most: int) -> tirx.PrimFunc:
        found = _by_rules(func)
        if found is None or widest_grid(found, most) > self.limits.max_grid:
            found = schedule_elements(func, most, self.limits)
        return found.with_attr(SCHEDULED, True)


def _by_rules(func: tirx.PrimFunc) -> tirx.PrimFunc | None:
    """What TVM's rules for reductions make of it; None: they are not for it, or failed."""
    alone = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    try:
        rules = dlight.gpu.Reduction(), dlight.gpu.GeneralReduction()
        found = dlight.ApplyDefaultSchedule(*rules)(alone)["main"]
    except (tvm.error.InternalError, AssertionError, s_tir.ScheduleError):
        return None  # an odd reduction: these rules assert what they do not expect
    is_done = found.attrs and SCHEDULED in found.attrs
    return found.without_attr("global_symbol") if is_done else None


def schedule_elements(func: tirx.PrimFunc, most: int, limits: Limits) -> tirx.PrimFunc:
    """Elements over threads, a reduction's terms one after the other; no grid beyond the limits.

    `most` is the largest value of any symbolic extent.
    """
    schedule, analyzer = s_tir.Schedule(func), analyzer_of(func, most)
    blocks = dlight.base.try_inline(schedule, dlight.analysis.normalize_prim_func(schedule))
    for info in blocks:
        block = info.block_rv
        loops: dict[str, list[Any]] = {"S": [], "R": [], "O": []}
        for loop, kind in zip(schedule.get_loops(block), info.dom_kind(), strict=True):
            loops[kind].append(loop)
        elements = loops["S"] or [schedule.add_unit_loop(block)]
        schedule.reorder(*elements, *loops["R"], *loops["O"])
        fused = schedule.fuse(*elements)
        size = analyzer.simplify(schedule.get(fused).extent)
        wave = limits.max_threads * limits.max_grid
        each = -(-int(size) // wave) if isinstance(size, tirx.IntImm) else 1
        grid, own, thread = schedule.split(fused, [None, each, limits.max_threads])
        schedule.reorder(grid, thread, own)
        schedule.bind(grid, "blockIdx.x")
        schedule.bind(thread, "threadIdx.x")
        if loops["R"]:
            schedule.decompose_reduction(block, loops["R"][0])
    return schedule.mod["main"]
