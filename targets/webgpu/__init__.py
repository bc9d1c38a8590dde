"""qcc.targets.webgpu: WGSL kernels and a wasm module, for browsers.

build.py  the target, and the wasm from what TVM compiled
wasm/     the runtime that every wasm has in it, and the linking
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qcc.targets.spec import KVCacheConfig, KVKernels, TargetSpec
from qcc.targets.webgpu.build import export, requires, resolve
from qcc.targets.webgpu.package import package_site

if TYPE_CHECKING:
    import tvm


def _passes(phase: str, target: tvm.target.Target, opt: int) -> Sequence[Any]:
    """The GPU's passes of a phase: `lower` (O1 and up) or `schedule`."""
    from qcc.targets.gpu.limits import Limits
    from qcc.targets.gpu.passes import lowering, scheduling

    return lowering(Limits(), opt) if phase == "lower" else scheduling(target, Limits())


def _kv_kernels(config: KVCacheConfig, _target: tvm.target.Target) -> KVKernels:
    from qcc.targets.gpu.kv_cache import kv_kernels
    from qcc.targets.gpu.limits import Limits

    return kv_kernels(config, Limits())


TARGET = TargetSpec(
    name="webgpu",
    description="WebGPU: a wasm module with WGSL kernels, for browsers",
    compute_dtype=None,
    default_prefill_chunk=2048,
    library_extension="wasm",
    resolve=resolve,
    passes=_passes,
    requires=requires,
    kv_kernels=_kv_kernels,
    export=export,
    packages={"web": package_site},
)
