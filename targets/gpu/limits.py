"""What a kernel may take of a GPU; the defaults hold wherever WebGPU runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Of one workgroup and one launch; a target's kernels are made for them and checked by them.

    Attributes:
        max_threads: of a workgroup.
        workgroup_bytes: of its shared memory.
        max_storage_buffers: that a kernel binds.
        max_grid: workgroups in a dimension.
        max_buffer_bytes: of a tensor that a kernel binds.
        narrow_integers: no 64-bit types.
        paired_trees: TVM's KV cache hands over the ranges of a token tree's nodes as [n, 2], as it
            does on CUDA, and not as [2 * n].
    """

    max_threads: int = 256
    workgroup_bytes: int = 32 * 1024
    max_storage_buffers: int = 10
    max_grid: int = 65535
    max_buffer_bytes: int = 1 << 30
    narrow_integers: bool = True
    paired_trees: bool = False
