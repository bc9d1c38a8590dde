"""ScheduleLoops: the PrimFuncs that no kernel took get parallel outer and vectorized inner loops.

Before:  for i, j in grid(m, 2048): y[i, j] = f(x[i, j])
After:   for i in parallel(m): for j0 in range(128): for j1 in vectorized(16): y[...] = f(x[...])

Elementwise producers are inlined first. Reductions keep their order of summation: rows in
parallel, each row's sum as written.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import s_tir, tirx

from qcc.quant_schemes.attributes import SCHEDULED
from qcc.targets.cpu.isa import Isa

# Below this many elements a parallel region costs more than it saves (1.5 us a launch).
MIN_PARALLEL = 16384


@tvm.transform.module_pass(opt_level=0, name="ScheduleLoops")
class ScheduleLoops:
    """The pass for one processor."""

    def __init__(self, isa: Isa) -> None:
        """`isa` gives the vector width."""
        self.isa = isa

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Schedule every PrimFunc that is not marked as scheduled."""
        scheduled = {}
        for gv, func in mod.functions_items():
            if isinstance(func, tirx.PrimFunc) and not (func.attrs and SCHEDULED in func.attrs):
                scheduled[gv] = schedule_loops(func, self.isa).with_attr(SCHEDULED, True)
        result = mod.clone()
        for gv, func in scheduled.items():
            result.update_func(gv, func)
        return result


def schedule_loops(func: tirx.PrimFunc, isa: Isa) -> tirx.PrimFunc:
    """Return `func` with inlined elementwise blocks, parallel outer and vectorized inner loops."""
    schedule = s_tir.Schedule(func)
    root = schedule.get_sblock("root")
    for block in schedule.get_child_blocks(root):
        try:
            schedule.compute_inline(block)
        except s_tir.ScheduleError:
            continue  # a reduction, or the output
    for block in schedule.get_child_blocks(root):
        _schedule_block(schedule, block, isa)
    return schedule.mod["main"]


def _schedule_block(schedule: s_tir.Schedule, block: Any, isa: Isa) -> None:
    loops = schedule.get_loops(block)
    kinds = [var.iter_type for var in schedule.get(block).iter_vars]
    if not loops or len(loops) != len(kinds):
        return
    spatial = [
        loop for loop, kind in zip(loops, kinds, strict=True) if kind == tirx.IterVar.DataPar
    ]
    reduced = [
        loop for loop, kind in zip(loops, kinds, strict=True) if kind == tirx.IterVar.CommReduce
    ]
    if len(spatial) + len(reduced) != len(loops) or not spatial:
        return
    schedule.reorder(*spatial, *reduced)
    *outer, inner = spatial
    extent = schedule.get(inner).extent
    if not reduced and isinstance(extent, tirx.IntImm) and int(extent) % isa.lanes == 0:
        split, lanes = schedule.split(inner, [None, isa.lanes])
        schedule.vectorize(lanes)
        outer.append(split)
        outer = _widest_outer(schedule, outer, int(extent))
    else:
        outer.append(inner)
    work = isa.lanes
    for loop in reduced:
        size = schedule.get(loop).extent
        work *= int(size) if isinstance(size, tirx.IntImm) else 1
    fused = schedule.fuse(*outer)
    size = schedule.get(fused).extent
    if not isinstance(size, tirx.IntImm) or int(size) * work >= MIN_PARALLEL:
        schedule.parallel(fused)


def _widest_outer(schedule: s_tir.Schedule, outer: list[Any], inner_extent: int) -> list[Any]:
    """Leave the loop over vectors serial where the rows alone give enough parallel work."""
    rows = outer[:-1]
    symbolic = any(not isinstance(schedule.get(loop).extent, tirx.IntImm) for loop in rows)
    return rows if symbolic and inner_extent < MIN_PARALLEL and rows else outer
