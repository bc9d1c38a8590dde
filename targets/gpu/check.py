"""Whether the kernels of a built library keep within a GPU's limits, and what they need of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import tvm
from tvm import tirx

from qcc.runtime.errors import QccError
from qcc.targets.gpu.limits import Limits
from qcc.targets.gpu.shaders import Shader

WIDE = re.compile(r"\b[iuf]64\b")
NOT_FINITE = re.compile(r"\b(inff?|nanf?|INFINITY|NAN)\b")
F16_FEATURE = "shader-f16"  # as WebGPU names it
GRID = "blockIdx."


def check_shaders(shaders: Iterable[Shader], limits: Limits) -> list[str]:
    """The features of WebGPU that the kernels need, sorted.

    Raises:
        QccError: a kernel that no device within the limits runs, by name.
    """
    features = set()
    for shader in shaders:
        x, y, z = shader.threads
        for what, found, limit in (
            ("threads a workgroup", x * y * z, limits.max_threads),
            ("bytes of workgroup memory", shader.workgroup_bytes, limits.workgroup_bytes),
            ("storage buffers", len(shader.storage), limits.max_storage_buffers),
        ):
            if found > limit:
                raise QccError(f"kernel {shader.name}: {found} {what}; the limit is {limit}")
        wide = WIDE.search(shader.source)
        if limits.narrow_integers and wide:
            raise QccError(f"kernel {shader.name}: 64-bit numbers ({wide[0]})")
        if NOT_FINITE.search(shader.source):
            raise QccError(f"kernel {shader.name}: an infinity or NaN, which WGSL cannot write")
        if shader.needs_f16:
            features.add(F16_FEATURE)
    return sorted(features)


def check_grids(mod: tvm.IRModule, limits: Limits) -> None:
    """Refuse a kernel with more workgroups in a dimension than a device starts.

    A symbolic extent is taken for the largest that any function's is, by BoundShapes. No pass:
    TVM turns what a pass raises into errors of its own.

    Raises:
        QccError: such a kernel, by name.
    """
    functions = mod.functions_items()
    most = max((_bound(func) for _, func in functions), default=1)
    for gv, func in functions:
        if isinstance(func, tirx.PrimFunc):
            known = _known(func, most)
            sizes = [known.simplify(extent) for extent in _grid(func.body)]
            for size in sizes:
                if isinstance(size, tirx.IntImm) and int(size) > limits.max_grid:
                    raise QccError(
                        f"kernel {gv.name_hint}: {int(size)} workgroups in a dimension; the "
                        f"limit is {limits.max_grid}"
                    )


def _bound(func: Any) -> int:
    """The largest of a function's bounds of symbolic extents."""
    bounds = func.attrs.get("tir_var_upper_bound") if func.attrs else None
    return max((int(bound) for bound in bounds.values()), default=1) if bounds else 1


def _known(func: tirx.PrimFunc, most: int) -> Any:
    """An analyzer for which every symbolic extent of the arguments has its largest value."""
    analyzer, seen = tvm.sym.Analyzer(), set()
    for param in func.params:
        for extent in param.shape if isinstance(param.ty, tirx.BufferType) else ():
            if isinstance(extent, tirx.Var) and extent not in seen:
                analyzer.bind(extent, tirx.const(most, extent.ty.dtype))
                seen.add(extent)
    return analyzer


def _grid(stmt: Any) -> list[Any]:
    """The extents of the loops over workgroups."""
    found = []
    if isinstance(stmt, tirx.For) and stmt.thread_binding is not None:
        if str(stmt.thread_binding.thread_tag).startswith(GRID):
            found.append(stmt.extent)
    for name in ("body", "block", "then_case", "else_case"):
        inner = getattr(stmt, name, None)
        if inner is not None:
            found += _grid(inner)
    if isinstance(stmt, tirx.SeqStmt):
        found += [extent for each in stmt.seq for extent in _grid(each)]
    return found
