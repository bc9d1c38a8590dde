"""qcc.targets.cpu: LLVM CPUs, x86-64 and aarch64.

In the order in which data passes:
  isa.py        what the vector unit can do, from the LLVM target's features
  passes/       linear layers to kernels, the rest scheduled
  kernels/      the TIR kernels and the weight layout that they read
  kv_cache.py   the kernels of the paged KV cache
  build.py      processor names, cross compiling, the shared library
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qcc.targets.cpu.build import export, requires, resolve
from qcc.targets.spec import KVCacheConfig, KVKernels, KVStorage, TargetSpec

if TYPE_CHECKING:
    import tvm


def _passes(phase: str, target: tvm.target.Target, opt: int) -> Sequence[Any]:
    """The CPU's passes of a phase: `lower` (O1 and up) or `schedule`."""
    from qcc.targets.cpu.isa import isa_of
    from qcc.targets.cpu.kernels.attention_storage import STORAGES
    from qcc.targets.cpu.passes.lower_attention import LowerAttention
    from qcc.targets.cpu.passes.lower_linear import LowerLinear
    from qcc.targets.cpu.passes.lower_scans import LowerScans
    from qcc.targets.cpu.passes.schedule import ScheduleLoops

    isa = isa_of(target)
    if phase == "lower":
        attention = LowerAttention(tuple(storage.name for storage in STORAGES))
        return [LowerLinear(isa), LowerScans(isa), attention] if opt >= 1 else [attention]
    assert phase == "schedule", phase
    return [ScheduleLoops(isa)]


def _rank(target: tvm.target.Target) -> tuple[str, int]:
    from qcc.targets.cpu.isa import rank_of

    return rank_of(target)


def _kv_kernels(config: KVCacheConfig, target: tvm.target.Target) -> KVKernels:
    from qcc.targets.cpu.kv_cache import kv_kernels

    return kv_kernels(config, target)


def _kv_storages(config: KVCacheConfig, target: tvm.target.Target) -> tuple[KVStorage, ...]:
    from qcc.targets.cpu.kv_cache import kv_storages

    return kv_storages(config, target)


TARGET = TargetSpec(
    name="cpu",
    description="LLVM CPU: x86-64 (SSE, AVX2, AVX-512, VNNI, AMX), aarch64 (NEON, dotprod, i8mm)",
    compute_dtype="float32",
    default_prefill_chunk=512,
    library_extension="so",
    resolve=resolve,
    passes=_passes,
    requires=requires,
    rank=_rank,
    kv_kernels=_kv_kernels,
    kv_storages=_kv_storages,
    export=export,
    # Schedules put no buffer into a loop that it could shrink to; on the kernels it takes a second.
    # Storage reuse gives the memory of bytes to vectors, which the next pass refuses.
    needless_passes=("s_tir.CompactBufferAllocation", "tirx.StorageRewrite"),
)
