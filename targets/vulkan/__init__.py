"""qcc.targets.vulkan: the GPU kernels as WGSL, run natively through wgpu-native.

The library is a shared object whose host code runs here; qcc.runtime.native has the device.
"""

from __future__ import annotations

from typing import Any

from qcc.targets.gpu.limits import Limits
from qcc.targets.gpu.target import gpu_target
from qcc.targets.spec import BuildOptions

NAME = "vulkan"
DLPACK_VULKAN = 7  # the type of device for which TVM makes the same WGSL


def _resolve(options: BuildOptions) -> tuple[Any, str]:
    """(tvm Target, library suffix `vulkan`), for a host processor or a named one."""
    import tvm

    from qcc.targets.cpu.build import resolve

    host, _ = resolve(options)
    return tvm.target.Target(
        {"kind": "webgpu", "target_device_type": DLPACK_VULKAN}, host=host
    ), NAME


def _requires(target: Any) -> dict[str, Any]:
    """What the host's code needs of a processor."""
    from qcc.targets.cpu.build import requires

    return requires(target.host)


def _export(executable: Any, path: Any, options: BuildOptions, tell: Any) -> dict[str, Any]:
    """Check the kernels and link the shared library; returns the features that they need."""
    from qcc.targets.cpu.build import export
    from qcc.targets.gpu.check import check_shaders
    from qcc.targets.gpu.shaders import shaders

    features = check_shaders(shaders(executable.mod), Limits())
    return {"features": features, **export(executable, path, options, tell)}


TARGET = gpu_target(
    NAME,
    "Vulkan, Metal and DX12 through wgpu-native, and lavapipe on a CPU",
    Limits(),
    library_extension="so",
    resolve=_resolve,
    requires=_requires,
    export=_export,
)
