"""How many workgroups a scheduled PrimFunc starts, at most."""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import tirx

GRID = "blockIdx."


def largest_extent(mod: tvm.IRModule) -> int:
    """The largest of the bounds that BoundShapes gave to symbolic extents; 1: there are none."""
    found = 1
    for _, func in mod.functions_items():
        bounds = func.attrs.get("tir_var_upper_bound") if func.attrs else None
        found = max([found, *map(int, bounds.values() if bounds else ())])
    return found


def analyzer_of(func: tirx.PrimFunc, most: int) -> Any:
    """An analyzer for which every symbolic extent of the arguments is `most`."""
    analyzer, seen = tvm.sym.Analyzer(), set()
    for param in func.params:
        for extent in param.shape if isinstance(param.ty, tirx.BufferType) else ():
            if isinstance(extent, tirx.Var) and extent not in seen:
                analyzer.bind(extent, tirx.const(most, extent.ty.dtype))
                seen.add(extent)
    return analyzer


def widest_grid(func: tirx.PrimFunc, most: int) -> int:
    """The most workgroups in a dimension of any of its kernels.

    What hangs on an extent that no argument has counts as 0.
    """
    analyzer, extents = analyzer_of(func, most), []

    def visit(loop: tirx.For) -> None:
        binding = loop.thread_binding
        if binding is not None and str(binding.thread_tag).startswith(GRID):
            extents.append(analyzer.simplify(loop.extent))

    tvm_ffi.structural_walk(func.body, [(tirx.For, visit)], order="post")
    return max((int(e) for e in extents if isinstance(e, tirx.IntImm)), default=0)
