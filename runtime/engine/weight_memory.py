"""Where weights lie while a model runs: mapped from their files, or read into memory of its own.

Mapped pages are shared with other processes and come from disk when first used. Memory of its own
lies in huge pages where the system gives them on request, which reads faster.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcc.runtime.engine import tvm_runtime
from qcc.runtime.engine.metadata import TensorType
from qcc.runtime.errors import QccError

ALIGNMENT = 64  # bytes; TVM's kernels may assume it
HUGE_PAGE = 2 << 20  # bytes
PIECE = 32 << 20  # bytes read at once
READERS = 2  # threads: copying from the page cache takes about one core for each GB/s or two
WEIGHTS = ("ram", "mmap")
Bytes = npt.NDArray[np.uint8]
Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class Part:
    """A tensor in a file, at a multiple of ALIGNMENT bytes."""

    file: Path
    offset: int
    type: TensorType


def check_weights(weights: str | None) -> str:
    """What `--weights` says; None: ram.

    Raises:
        QccError: neither ram nor mmap.
    """
    if weights is not None and weights not in WEIGHTS:
        raise QccError(f"--weights {weights}: must be one of {', '.join(WEIGHTS)}")
    return weights or WEIGHTS[0]


def place(parts: Sequence[Part], weights: str, progress: Progress | None = None) -> list[Any]:
    """The tensors of parts, in memory as `weights` says.

    Raises:
        QccError: a file is too short, or the memory is not there.
    """
    if weights == "mmap":
        maps = {part.file: np.memmap(part.file, np.uint8, "c") for part in parts}
        return [as_tensor(maps[part.file], part.offset, part.type) for part in parts]
    return _read(parts, progress)


def _read(parts: Sequence[Part], progress: Progress | None) -> list[Any]:
    places, end = [], 0
    for part in parts:
        places.append(end)
        end += -(-part.type.nbytes // ALIGNMENT) * ALIGNMENT
    memory = huge_memory(end)
    pieces = [
        (part.file, part.offset + at, place + at, min(PIECE, part.type.nbytes - at))
        for part, place in zip(parts, places, strict=True)
        for at in range(0, part.type.nbytes, PIECE)
    ]
    done, total = 0, sum(size for *_, size in pieces)
    with ThreadPoolExecutor(READERS) as pool:
        for size in pool.map(lambda piece: _read_piece(memory, *piece), pieces):
            done += size
            if progress:
                progress(done, total)
    return [as_tensor(memory, at, part.type) for part, at in zip(parts, places, strict=True)]


def _read_piece(memory: Bytes, file: Path, offset: int, place: int, size: int) -> int:
    """Fill memory[place : place + size] from a file; returns `size`."""
    target = memory[place : place + size].data
    with file.open("rb", buffering=0) as source:
        source.seek(offset)
        got = 0
        while got < size:
            count = source.readinto(target[got:])
            if not count:
                raise QccError(f"{file}: ends at byte {offset + got}, within a tensor")
            got += count
    return size


def huge_memory(size: int) -> Bytes:
    """uint8[size] of zeros at a multiple of HUGE_PAGE, in huge pages where that can be asked for.

    Raises:
        QccError: the system refuses so much memory.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return aligned_copy(np.zeros(size, np.uint8))
    try:
        # Private: shared anonymous memory is a file to Linux, and gets small pages.
        region = mmap.mmap(-1, size + 2 * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as err:
        raise QccError(
            f"no memory for {size / 1e6:,.0f} MB of weights: {os.strerror(err.errno or 0)}"
        ) from err
    region.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(region, np.uint8)
    start = -whole.ctypes.data % HUGE_PAGE
    return whole[start : start + size]


def aligned_copy(flat: Bytes) -> Bytes:
    """uint8[n] at an address that is a multiple of 64; `flat` itself where it lies so already."""
    if flat.ctypes.data % ALIGNMENT == 0:
        return flat
    room = np.empty(flat.size + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    room[start : start + flat.size] = flat
    return room[start : start + flat.size]


def aligned_zeros(shape: tuple[int, ...]) -> Any:
    """f32[*shape] of zeros, at an address that TVM's kernels may load vectors from."""
    size = math.prod(shape)
    room = np.zeros(size + ALIGNMENT // 4, np.float32)
    start = -room.ctypes.data % ALIGNMENT // 4
    return room[start : start + size].reshape(shape)


def as_tensor(memory: Bytes, offset: int, kind: TensorType) -> Any:
    """A tensor of TVM over bytes of `memory` (uint8[n], writable), which it keeps alive."""
    part = memory[offset : offset + kind.nbytes]
    ffi = tvm_runtime.load()
    if kind.dtype == "bfloat16":
        bits = ffi.from_dlpack(part.view(np.uint16).reshape(kind.shape))
        return tvm_runtime.bfloat16_view(bits, kind.shape)
    return ffi.from_dlpack(part.view(kind.dtype).reshape(kind.shape))
