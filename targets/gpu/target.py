"""gpu_target: the TargetSpec of a GPU, with the kernels and passes that all GPUs share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qcc.targets.gpu.limits import Limits
from qcc.targets.spec import KVCacheConfig, KVKernels, TargetSpec

PREFILL_CHUNK = 2048  # tokens, where no one says


def gpu_target(name: str, description: str, limits: Limits, **others: Any) -> TargetSpec:
    """A TargetSpec whose kernels keep to `limits`; `others` are its fields that differ by target.

    The graph computes in the scheme's dtype, every sum in float32.
    """

    def passes(phase: str, target: Any, opt: int) -> Sequence[Any]:
        from qcc.targets.gpu.passes import lowering, scheduling

        return lowering(limits, opt) if phase == "lower" else scheduling(target, limits)

    def kv_kernels(config: KVCacheConfig, _target: Any) -> KVKernels:
        from qcc.targets.gpu import kv_cache

        return kv_cache.kv_kernels(config, limits)

    def check(module: Any) -> None:
        from qcc.targets.gpu.check import check_grids

        check_grids(module, limits)

    return TargetSpec(
        name=name,
        description=description,
        compute_dtype=None,
        default_prefill_chunk=PREFILL_CHUNK,
        passes=passes,
        kv_kernels=kv_kernels,
        dtypes=("float32", "float16"),
        check=check,
        **others,
    )
