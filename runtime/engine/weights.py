"""Slots from stored tensors: repacked once, written to the cache folder, mapped from then on.

The cache file holds the slots that cannot be mapped from the shards themselves, at multiples of 64
bytes in the order of the metadata; nothing else, so that its size is known before it is opened.
One tensor at a time is in memory while it is written. Where it cannot be written the slots stay in
memory, with a warning.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qcc.runtime.artifact import Artifact
from qcc.runtime.engine import tvm_runtime
from qcc.runtime.engine.library import Library
from qcc.runtime.engine.metadata import Slot, TensorType
from qcc.runtime.errors import QccError
from qcc.runtime.files import cache_dir, remove_stale, write_file

ALIGNMENT = 64  # bytes; TVM's kernels may assume it
Array = np.ndarray[Any, Any]
Progress = Callable[[int, int], None]  # bytes done, bytes in all


def load_slots(
    artifact: Artifact,
    library: Library,
    progress: Progress | None = None,
    settings: Mapping[str, Array] | None = None,
) -> list[Any]:
    """The tensors of the packed tuple, in its order; `settings` by name, 0 where it has none.

    Raises:
        QccError: the stored tensors are not those that the library was compiled for.
    """
    check_stored(artifact, library)
    layout, size = cache_layout(artifact, library.metadata.slots)
    total = sum(library.metadata.slots[index].type.nbytes for index in layout)
    maker = _SlotMaker(artifact, library, total, progress)
    path = cache_path(artifact, library)
    made: dict[int, Any] = {}
    if layout and not _usable(path, size):
        try:
            _write_cache(path, layout, size, maker)
            # The VM keeps what it freed: the repacked tensors' memory, of no more use.
            tvm_runtime.global_function("vm.builtin.memory_manager.clear")()
        except (QccError, OSError) as err:
            warnings.warn(
                f"repacked weights are not cached, so every start repacks them: {err}", stacklevel=2
            )
            made = {index: maker.tensor(maker.slots[index]) for index in layout}
    maps: dict[Path, Any] = {}

    def mapped(file: Path, offset: int, kind: TensorType) -> Any:
        if file not in maps:
            maps[file] = np.memmap(file, np.uint8, "c")
        return as_tensor(maps[file], offset, kind)

    def tensor(index: int, slot: Slot) -> Any:
        if slot.setting is not None:
            return _setting(slot.type, settings or {})
        if index in made:
            return made[index]
        if index in layout:
            return mapped(path, layout[index], slot.type)
        record = artifact.records[slot.stored[0]]
        return mapped(artifact.folder / record.shard, record.offset, slot.type)

    return [tensor(index, slot) for index, slot in enumerate(library.metadata.slots)]


def _setting(kind: TensorType, settings: Mapping[str, Array]) -> Any:
    """The tensor of a setting."""
    value = np.zeros(kind.shape, kind.dtype)
    value[...] = settings.get(kind.name, 0)
    memory = aligned_copy(np.atleast_1d(value).view(np.uint8))
    return as_tensor(memory, 0, kind)


def check_stored(artifact: Artifact, library: Library) -> None:
    """Compare the stored tensors with `_metadata.params`: the VM itself checks nothing."""
    for param in library.metadata.params:
        record = artifact.records.get(param.name)
        if record is None:
            raise QccError(
                f"{artifact.folder}: {library.path.name} needs a tensor {param.name!r} that "
                "tensor-cache.json lacks; compile the model again with qcc compile"
            )
        if tuple(record.shape) != param.shape or record.dtype != param.dtype:
            raise QccError(
                f"{artifact.folder}: {param.name!r} is {record.dtype}{list(record.shape)}, but "
                f"{library.path.name} needs {param}; compile the model again with qcc compile"
            )


def cache_layout(artifact: Artifact, slots: tuple[Slot, ...]) -> tuple[dict[int, int], int]:
    """({index of slot: offset in the cache file}, size of the file), both in bytes."""
    layout: dict[int, int] = {}
    end = 0
    for index, slot in enumerate(slots):
        if slot.setting is None and not _mappable(artifact, slot):
            layout[index] = end
            end += -(-slot.type.nbytes // ALIGNMENT) * ALIGNMENT
    return layout, end


def _mappable(artifact: Artifact, slot: Slot) -> bool:
    """Whether a slot lies in a shard just as a kernel wants it."""
    record = artifact.records[slot.stored[0]]
    return slot.repack is None and record.encoding == "raw" and record.offset % ALIGNMENT == 0


def cache_path(artifact: Artifact, library: Library) -> Path:
    """Where the repacked slots of this artifact and library are, or will be."""
    stat = library.path.stat()
    key = hashlib.sha256((artifact.folder / "tensor-cache.json").read_bytes())
    sums = [
        entry.sha256
        for entry in artifact.manifest.libraries.values()
        if artifact.folder / entry.file == library.path
    ]
    tvm = importlib.metadata.version("apache-tvm")
    key.update(repr((stat.st_size, stat.st_mtime_ns, tvm, sums)).encode())
    return cache_dir() / "repacked" / f"{_owner(library)}-{key.hexdigest()[:32]}.bin"


def _owner(library: Library) -> str:
    """The same for all states of one library file: what an older state left can be found."""
    return hashlib.sha256(str(library.path.resolve()).encode()).hexdigest()[:16]


def _usable(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _write_cache(path: Path, layout: dict[int, int], size: int, maker: _SlotMaker) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path.parent)

    def write(file: BinaryIO) -> None:
        for index, offset in layout.items():
            file.write(b"\0" * (offset - file.tell()))
            file.write(as_bytes(maker.tensor(maker.slots[index])).data)
        file.write(b"\0" * (size - file.tell()))
        file.flush()
        os.fsync(file.fileno())  # else a crash can leave a file of the right size without its bytes

    write_file(path, write)
    for old in path.parent.glob(f"{path.name.split('-')[0]}-*.bin"):
        if old != path:
            with suppress(OSError):
                old.unlink()


class _SlotMaker:
    """Makes slots one by one, and tells how far it is."""

    def __init__(
        self, artifact: Artifact, library: Library, total: int, progress: Progress | None
    ) -> None:
        self.artifact, self.library, self.total, self.progress = artifact, library, total, progress
        self.slots = library.metadata.slots
        self.done = 0

    def tensor(self, slot: Slot) -> Any:
        made = slot_of(self.library, slot, self.artifact.read)
        self.done += slot.type.nbytes
        if self.progress:
            self.progress(self.done, self.total)
        return made


def slot_of(library: Library, slot: Slot, read: Callable[[str], np.ndarray[Any, Any]]) -> Any:
    """The tensor of a slot, made of its stored tensors in the artifact's dtypes: read(name)."""
    types = {param.name: param for param in library.metadata.params}
    stored = []
    for name in slot.stored:
        flat = aligned_copy(np.ascontiguousarray(read(name)).reshape(-1).view(np.uint8))
        stored.append(as_tensor(flat, 0, types[name]))
    made = stored[0] if slot.repack is None else library.repack(slot.repack, stored)
    got = TensorType(slot.type.name, tuple(map(int, made.shape)), str(made.dtype))
    if got != slot.type:
        raise AssertionError(f"{slot.repack} made {got}, the library expects {slot.type}")
    return made


def aligned_copy(flat: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8[n] at an address that is a multiple of 64; `flat` itself where it lies so already."""
    if flat.ctypes.data % ALIGNMENT == 0:
        return flat
    room = np.empty(flat.size + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    room[start : start + flat.size] = flat
    return room[start : start + flat.size]


def as_tensor(memory: np.ndarray[Any, np.dtype[np.uint8]], offset: int, kind: TensorType) -> Any:
    """A tensor of TVM over bytes of `memory` (uint8[n], writable), which it keeps alive."""
    part = memory[offset : offset + kind.nbytes]
    ffi = tvm_runtime.load()
    if kind.dtype == "bfloat16":
        bits = ffi.from_dlpack(part.view(np.uint16).reshape(kind.shape))
        return tvm_runtime.bfloat16_view(bits, kind.shape)
    return ffi.from_dlpack(part.view(kind.dtype).reshape(kind.shape))


def as_bytes(tensor: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8[n] over a tensor's memory."""
    if str(tensor.dtype) == "bfloat16":
        view = tvm_runtime.global_function("runtime.TVMTensorCreateView")
        tensor = view(tensor, tensor.shape, tvm_runtime.load().dtype("uint16"), 0)
    return np.from_dlpack(tensor).reshape(-1).view(np.uint8)
