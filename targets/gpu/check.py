"""Whether the kernels of a built library keep within a GPU's limits, and what they need of it."""

from __future__ import annotations

import re
from collections.abc import Iterable

import tvm
from tvm import tirx

from qcc.runtime.errors import QccError
from qcc.targets.gpu.grids import largest_extent, widest_grid
from qcc.targets.gpu.limits import Limits
from qcc.targets.gpu.shaders import Shader

WIDE = re.compile(r"\b[iuf]64\b")
NOT_FINITE = re.compile(r"\b(inff?|nanf?|INFINITY|NAN)\b")
F16_FEATURE = "shader-f16"  # as WebGPU names it


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

    A symbolic extent is taken for the largest that any function's is. No pass: TVM turns what a
    pass raises into errors of its own.

    Raises:
        QccError: such a kernel, by name.
    """
    most = largest_extent(mod)
    for gv, func in mod.functions_items():
        if isinstance(func, tirx.PrimFunc):
            found = widest_grid(func, most)
            if found > limits.max_grid:
                raise QccError(
                    f"kernel {gv.name_hint}: {found} workgroups in a dimension; the limit is "
                    f"{limits.max_grid}"
                )
