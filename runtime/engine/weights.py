"""Slots from stored tensors: repacked once, written to the cache folder, mapped from then on.

The cache file holds the slots that cannot be mapped from the shards themselves, at multiples of 64
bytes in the order of the metadata; nothing else, so that its size is known before it is opened.
One tensor at a time is in memory while it is written. Caches of other artifacts give way to it, the
one used longest ago first, where the disk is full. Where it cannot be written the slots stay in
memory, with a warning.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qcc.runtime.artifact import Artifact
from qcc.runtime.engine import tvm_runtime
from qcc.runtime.engine.library import Library
from qcc.runtime.engine.metadata import Slot, TensorType
from qcc.runtime.engine.weight_memory import (
    ALIGNMENT,
    Part,
    Progress,
    aligned_copy,
    as_tensor,
    place,
)
from qcc.runtime.errors import QccError
from qcc.runtime.files import cache_dir, remove_stale, write_file

Array = np.ndarray[Any, Any]


def load_slots(
    artifact: Artifact,
    library: Library,
    progress: Progress | None = None,
    settings: Mapping[str, Array] | None = None,
    weights: str = "mmap",
) -> list[Any]:
    """The tensors of the packed tuple, in its order; `settings` by name, 0 where it has none.

    `weights` is ram or mmap, as weight_memory.py has it.

    Raises:
        QccError: the stored tensors are not those that the library was compiled for.
    """
    check_stored(artifact, library)
    if not library.device.is_host:
        return _slots_of_device(artifact, library, progress, settings or {})
    layout, size = cache_layout(artifact, library.metadata.slots)
    total = sum(library.metadata.slots[index].type.nbytes for index in layout)
    maker = _SlotMaker(artifact, library, total, progress)
    path = cache_path(artifact, library)
    made: dict[int, Any] = {}
    if _usable(path, size):
        with suppress(OSError):
            os.utime(path)  # when it was used last
    elif layout:
        try:
            _write_cache(path, layout, size, maker)
            # The VM keeps what it freed: the repacked tensors' memory, of no more use.
            tvm_runtime.global_function("vm.builtin.memory_manager.clear")()
        except (QccError, OSError) as err:
            warnings.warn(
                f"repacked weights are not cached, so every start repacks them: {err}", stacklevel=2
            )
            made = {index: maker.tensor(maker.slots[index]) for index in layout}
    slots = dict(enumerate(library.metadata.slots))
    given = {i: _setting(s.type, settings or {}) for i, s in slots.items() if s.setting is not None}
    rest = [index for index in slots if index not in given and index not in made]

    def part(index: int) -> Part:
        kind = slots[index].type
        if index in layout:
            return Part(path, layout[index], kind)
        record = artifact.records[slots[index].stored[0]]
        return Part(artifact.folder / record.shard, record.offset, kind)

    placed = dict(zip(rest, place([part(i) for i in rest], weights, progress), strict=True))
    found = given | made | placed
    return [found[index] for index in slots]


def _slots_of_device(
    artifact: Artifact, library: Library, progress: Progress | None, settings: Mapping[str, Array]
) -> list[Any]:
    """The same for a device with memory of its own: one tensor after another goes there."""
    slots = library.metadata.slots
    library.device.check_tensors(slot.type for slot in slots)
    total = sum(slot.type.nbytes for slot in slots)
    maker, found = _SlotMaker(artifact, library, total, progress), []
    for slot in slots:
        given = slot.setting is not None
        found.append(_setting(slot.type, settings) if given else maker.tensor(slot))
        with library.device.errors(f"{artifact.folder}: {slot.type.name}"):
            found[-1] = library.device.put(found[-1])
    return found


def _setting(kind: TensorType, settings: Mapping[str, Array]) -> Any:
    """The tensor of a setting."""
    value = np.zeros(kind.shape, kind.dtype)
    value[...] = settings.get(kind.name, 0)
    memory = aligned_copy(np.atleast_1d(value).view(np.uint8))
    return as_tensor(memory, 0, kind)


def with_settings(
    slots: Sequence[Any], library: Library, settings: Mapping[str, Array]
) -> list[Any]:
    """The tensors of the packed tuple with other settings; the weights are the same tensors."""
    kinds = library.metadata.slots
    return [
        tensor if kind.setting is None else _setting(kind.type, settings)
        for kind, tensor in zip(kinds, slots, strict=True)
    ]


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
    _make_room(path, size)

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


def _make_room(path: Path, size: int) -> None:
    """Remove other caches, the one used longest ago first, until there is room for `size` bytes.

    None where all of them together would not make it.
    """
    with suppress(OSError):
        others = {other: other.stat() for other in path.parent.glob("*.bin") if other != path}
        room = sum(stat.st_size for stat in others.values())
        if shutil.disk_usage(path.parent).free + room < size:
            return
        for other in sorted(others, key=lambda other: others[other].st_mtime):
            if shutil.disk_usage(path.parent).free >= size:
                return
            other.unlink()


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


def as_bytes(tensor: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8[n] over a tensor's memory."""
    if str(tensor.dtype) == "bfloat16":
        view = tvm_runtime.global_function("runtime.TVMTensorCreateView")
        tensor = view(tensor, tensor.shape, tvm_runtime.load().dtype("uint16"), 0)
    return np.from_dlpack(tensor).reshape(-1).view(np.uint8)
