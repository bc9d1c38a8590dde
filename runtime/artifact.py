"""The artifact: the folder that a compile writes and a runtime reads; their only contract.

  qcc.json              written last: versions, source, scheme, formats, sizes, libraries
  mlc-chat-config.json  what clients need to chat (CONTRACTS section 3)
  tensor-cache.json     records of params_shard_N.bin (CONTRACTS section 2)
  lib/                  one library a target

Every file is written under a temporary name and renamed. A folder is untrusted input: whatever is
wrong with it is a QccError of one line. Symbolic links are followed (hub caches are made of them);
names that lead out of the folder are refused.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from qcc.runtime.errors import QccError
from qcc.runtime.files import cache_dir as cache_dir
from qcc.runtime.files import checksum, os_errors, read_json
from qcc.runtime.files import write_file as write_file
from qcc.runtime.machine import BROWSER, missing
from qcc.runtime.manifest import MALFORMED, RECOMPILE, Manifest, parse_manifest, what
from qcc.runtime.manifest import QCC_JSON as QCC_JSON
from qcc.runtime.manifest import check_versions as check_versions
from qcc.runtime.manifest import library_entry as library_entry
from qcc.runtime.manifest import read_manifest as read_manifest
from qcc.runtime.manifest import running_versions as running_versions
from qcc.runtime.manifest import write_manifest as write_manifest
from qcc.runtime.verified import VerifiedFiles

CHAT_CONFIG, TENSOR_CACHE = "mlc-chat-config.json", "tensor-cache.json"
DTYPE_BYTES = {"uint32": 4, "float32": 4, "float16": 2, "bfloat16": 2}
Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, name of the file


@dataclass(frozen=True)
class TensorRecord:
    """Where a stored tensor lies: `nbytes` at `offset` in `shard`, a name in the folder.

    `encoding` is "raw", or "f32-to-bf16": a float32 tensor whose upper halves are stored.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    shard: str
    offset: int
    nbytes: int
    encoding: str = "raw"


@dataclass(frozen=True)
class Shard:
    """One file of weights: its name in the folder, size in bytes, md5 in hex."""

    file: str
    nbytes: int
    md5: str


def tensor_bytes(shape: Sequence[int], dtype: str) -> int:
    """Size in bytes of a stored tensor."""
    return math.prod(shape) * DTYPE_BYTES[dtype]


class Artifact:
    """An opened artifact: everything about the folder that can be checked without its weights."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        chat_config: dict[str, Any],
        shards: tuple[Shard, ...],
        records: dict[str, TensorRecord],
    ) -> None:
        """Use `open`; `records` are in the order of the parameters."""
        self.folder = folder
        self.manifest = manifest
        self.chat_config = chat_config
        self.shards = shards
        self.records = records

    @classmethod
    def open(cls, folder: Path | str, versions: Mapping[str, str] | None = None) -> Artifact:
        """Read and check the folder's JSON files and the sizes of its shards and libraries.

        Raises:
            QccError: anything missing, unreadable, of other versions or of another size.
        """
        folder = Path(folder)
        path = folder / QCC_JSON
        data = read_manifest(folder)
        check_versions(data, folder, versions)
        try:
            manifest = parse_manifest(data)
        except MALFORMED as err:
            raise QccError(f"{path}: {what(err)}; {RECOMPILE}") from err
        chat_config = read_json(_existing(folder / CHAT_CONFIG), RECOMPILE)
        shards, records = _read_tensor_cache(folder)
        for name, library in manifest.libraries.items():
            file = _inside(folder, library.file, f"{path}: libraries[{name}]")
            _check_size(file, library.bytes)
        return cls(folder, manifest, chat_config, shards, records)

    def libraries(self, target: str) -> dict[str, Path]:
        """Libraries for a target: name -> path, `cpu` finding cpu and cpu-*, a full name itself."""
        found = {
            name: self.folder / library.file
            for name, library in self.manifest.libraries.items()
            if name == target or name.startswith(f"{target}-")
        }
        return {target: found[target]} if target in found else found

    def library(self, target: str) -> Path:
        """The library for a target that runs here; of several the one of the widest instructions.

        Raises:
            QccError: there is none for the target, or none that this machine can run.
        """
        found = self.libraries(target)
        if not found:
            names = ", ".join(self.manifest.libraries) or "none"
            others = {
                name.split("-")[0]
                for name, library in self.manifest.libraries.items()
                if library.requires.get("machine") != BROWSER
            }
            run = "".join(f"run it with --device {other}, or " for other in sorted(others))
            kind, _, processor = target.partition("-")
            flags = f"--target {kind}" + (f" --mcpu {processor}" if processor else "")
            raise QccError(
                f"{self.folder}: no library for {target!r}; it has: {names}; {run}add one with "
                f"qcc compile {flags} -o {self.folder}"
            )
        lacks = {name: missing(self.manifest.libraries[name].requires) for name in found}
        fit = [name for name in found if not lacks[name]]
        if not fit:
            needs = "; ".join(f"{name} needs {', '.join(lack)}" for name, lack in lacks.items())
            raise QccError(
                f"{self.folder}: no library that this machine can run: {needs}; add one with "
                f"qcc compile --mcpu native -o {self.folder}"
            )

        def preference(name: str) -> tuple[int, int]:
            library = self.manifest.libraries[name]
            return library.rank, len(library.requires.get("flags", ()))

        return found[max(fit, key=preference)]

    def read(self, name: str) -> npt.NDArray[Any]:
        """A stored tensor in its dtype; bfloat16 by ml_dtypes where installed, else as uint16.

        Raises:
            QccError: no such tensor, or its shard cannot be read.
        """
        if name not in self.records:
            raise QccError(f"{self.folder / TENSOR_CACHE}: no tensor {name!r}")
        record = self.records[name]
        path = self.folder / record.shard
        dtype = _stored_dtype(record)
        with os_errors(path, "read"):
            flat = np.fromfile(path, dtype, math.prod(record.shape), offset=record.offset)
        if flat.nbytes != record.nbytes:
            raise QccError(f"{path}: truncated within {name!r}; {RECOMPILE}")
        if record.encoding == "f32-to-bf16":
            flat = (flat.astype(np.uint32) << 16).view(np.float32)
        return flat.reshape(record.shape)

    def verify(self, progress: Progress | None = None) -> None:
        """Compare the checksums of shards and libraries, once for each state of the files.

        What was found right is remembered in the cache folder by size and modification time.

        Raises:
            QccError: a file whose bytes are not those that were written.
        """
        sums = {shard.file: ("md5", shard.md5) for shard in self.shards}
        for library in self.manifest.libraries.values():
            sums[library.file] = ("sha256", library.sha256)
        memory = VerifiedFiles(self.folder)
        todo = [file for file in sums if not memory.knows(file, sums[file][1])]
        total = sum((self.folder / file).stat().st_size for file in todo)
        done = 0
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
            found = pool.map(lambda file: checksum(self.folder / file, sums[file][0]), todo)
            for file, digest in zip(todo, found, strict=True):
                kind, wanted = sums[file]
                if digest != wanted:
                    raise QccError(
                        f"{self.folder / file}: damaged: its {kind} is {digest}, recorded is "
                        f"{wanted}; copy it again or {RECOMPILE}"
                    )
                memory.add(file, wanted)
                done += (self.folder / file).stat().st_size
                if progress:
                    progress(done, total, file)
        if todo:
            memory.save()


def _read_tensor_cache(folder: Path) -> tuple[tuple[Shard, ...], dict[str, TensorRecord]]:
    path = _existing(folder / TENSOR_CACHE)
    shards: list[Shard] = []
    records: dict[str, TensorRecord] = {}
    try:
        for entry in read_json(path, RECOMPILE)["records"]:
            shard = Shard(str(entry["dataPath"]), int(entry["nbytes"]), str(entry["md5sum"]))
            if entry["format"] != "raw-shard":
                raise ValueError(f"{shard.file}: format {entry['format']!r} is not raw-shard")
            _check_size(_inside(folder, shard.file, str(path)), shard.nbytes)
            shards.append(shard)
            for item in entry["records"]:
                record = _record(item, shard)
                if record.name in records:
                    raise ValueError(f"tensor {record.name!r} appears twice")
                records[record.name] = record
    except MALFORMED as err:
        raise QccError(f"{path}: {what(err)}; {RECOMPILE}") from err
    return tuple(shards), records


def _record(item: Mapping[str, Any], shard: Shard) -> TensorRecord:
    record = TensorRecord(
        name=str(item["name"]),
        shape=tuple(int(extent) for extent in item["shape"]),
        dtype=str(item["dtype"]),
        shard=shard.file,
        offset=int(item["byteOffset"]),
        nbytes=int(item["nbytes"]),
        encoding=str(item["format"]),
    )
    where = f"tensor {record.name!r}"
    if record.dtype not in DTYPE_BYTES:
        raise ValueError(f"{where}: dtype {record.dtype!r}, allowed: {', '.join(DTYPE_BYTES)}")
    if record.encoding not in ("raw", "f32-to-bf16"):
        raise ValueError(f"{where}: format {record.encoding!r}, allowed: raw, f32-to-bf16")
    if record.encoding == "f32-to-bf16" and record.dtype != "float32":
        raise ValueError(f"{where}: format f32-to-bf16 with dtype {record.dtype}")
    size = math.prod(record.shape) * (2 if record.encoding != "raw" else DTYPE_BYTES[record.dtype])
    if min(record.shape, default=0) < 0 or size != record.nbytes:
        raise ValueError(f"{where}: shape {list(record.shape)} is not {record.nbytes} bytes")
    if record.offset < 0 or record.offset + record.nbytes > shard.nbytes:
        raise ValueError(f"{where}: lies outside of {shard.file}")
    return record


def _stored_dtype(record: TensorRecord) -> np.dtype[Any]:
    if record.encoding == "f32-to-bf16":
        return np.dtype(np.uint16)
    if record.dtype != "bfloat16":
        return np.dtype(record.dtype)
    try:
        import ml_dtypes
    except ImportError:
        return np.dtype(np.uint16)
    bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return bfloat16


def _existing(path: Path) -> Path:
    if not path.exists():
        raise QccError(f"{path.parent}: {path.name} is missing; {RECOMPILE}")
    return path


def _inside(folder: Path, name: str, where: str) -> Path:
    """The path of a file that a JSON names; a name that leads out of the folder is refused."""
    parts = PurePosixPath(name).parts
    odd = not name.isprintable() or "\\" in name or ":" in name
    if not parts or name.startswith("/") or ".." in parts or odd:
        raise QccError(
            f"{where}: {name!r} is not the name of a file within the folder; {RECOMPILE}"
        )
    path = folder / name
    if not path.is_file():
        raise QccError(f"{path}: is missing; copy it again or {RECOMPILE}")
    return path


def _check_size(path: Path, nbytes: int) -> None:
    size = path.stat().st_size
    if size != nbytes:
        raise QccError(
            f"{path}: has {size} bytes, recorded are {nbytes}; copy it again or {RECOMPILE}"
        )


def stored_metadata(library: Path) -> str:
    """The JSON text that `_metadata()` of a library returns, read from the file without running it.

    It lies among the executable's constants, whatever machine the library is for.

    Raises:
        QccError: there is none.
    """
    with os_errors(library, "read"):
        data = library.read_bytes()
    text = data[max(data.find(b'{"model_type": '), 0) :].decode("utf-8", errors="replace")
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except ValueError as err:
        raise QccError(f"{library}: has no metadata; {RECOMPILE}") from err
    return text[:end]
