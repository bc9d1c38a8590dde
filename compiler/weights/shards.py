"""ShardWriter: params_shard_N.bin and tensor-cache.json, exactly as CONTRACTS section 2.

A shard is a plain concatenation of tensors, little endian, C order; about 32 MiB, a larger tensor
has one of its own. All shards are written under temporary names; `finish` renames them and writes
tensor-cache.json. Until then an older artifact in the folder stays as it was, and when it is
replaced its qcc.json goes first: at no time does a half-written folder open.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy.typing as npt

from qcc.compiler.weights.spec import StoredTensor
from qcc.runtime.artifact import QCC_JSON, TENSOR_CACHE, TensorRecord, tensor_bytes
from qcc.runtime.errors import QccError
from qcc.runtime.files import os_errors, remove_stale, temporary_name, write_file

SHARD_BYTES = 32 << 20


@dataclass
class _Shard:
    """The shard being written."""

    path: Path
    temporary: Path
    file: BinaryIO
    md5: Any = field(default_factory=lambda: hashlib.md5(usedforsecurity=False))
    nbytes: int = 0
    records: list[TensorRecord] = field(default_factory=list)

    def entry(self) -> dict[str, Any]:
        """The shard's part of tensor-cache.json, once it is complete."""
        return {
            "dataPath": self.path.name,
            "format": "raw-shard",
            "nbytes": self.nbytes,
            "md5sum": self.md5.hexdigest(),
            "records": [
                {
                    "name": record.name,
                    "shape": list(record.shape),
                    "dtype": record.dtype,
                    "format": record.encoding,
                    "nbytes": record.nbytes,
                    "byteOffset": record.offset,
                }
                for record in self.records
            ],
        }


class ShardWriter:
    """Writes tensors in the order of `add`; a context manager that removes what is unfinished."""

    def __init__(self, folder: Path, total_bytes: int, shard_bytes: int = SHARD_BYTES) -> None:
        """Make the folder and look whether `total_bytes` fit on its disk.

        Raises:
            QccError: they do not, or the folder cannot be made.
        """
        self.folder = folder
        self.shard_bytes = shard_bytes
        self._open: _Shard | None = None
        self._done: list[_Shard] = []
        with os_errors(folder, "make"):
            folder.mkdir(parents=True, exist_ok=True)
        remove_stale(folder)
        free = shutil.disk_usage(folder).free
        if free < total_bytes:
            raise QccError(
                f"{folder}: the weights need {total_bytes / 1e6:.0f} MB, the disk has "
                f"{free / 1e6:.0f} MB free; free some or choose another folder"
            )

    def __enter__(self) -> ShardWriter:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove every temporary file that `finish` has not renamed."""
        shards = [*self._done, self._open] if self._open else self._done
        for shard in shards:
            # Closing flushes, which fails again on a full disk.
            with suppress(OSError):
                shard.file.close()
            with suppress(OSError):
                shard.temporary.unlink(missing_ok=True)

    def add(self, tensor: StoredTensor, chunks: Iterable[npt.NDArray[Any]]) -> None:
        """Append a tensor whose bytes are those of `chunks` (C-contiguous), one after another.

        Raises:
            QccError: the disk is full or refuses.
        """
        nbytes = tensor_bytes(tensor.shape, tensor.dtype)
        shard = self._shard_for(nbytes)
        record = TensorRecord(
            tensor.name, tensor.shape, tensor.dtype, shard.path.name, shard.nbytes, nbytes
        )
        for chunk in chunks:
            data = chunk.reshape(-1).view("uint8").data
            with os_errors(shard.path, "write"):
                shard.file.write(data)
            shard.md5.update(data)
            shard.nbytes += len(data)
        written = shard.nbytes - record.offset
        assert written == nbytes, f"{tensor.name}: {written} bytes written, {nbytes} declared"
        shard.records.append(record)

    def finish(self, num_weights: int) -> list[TensorRecord]:
        """Give every shard its name and write tensor-cache.json.

        Args:
            num_weights: numbers in the model before quantization, for BitsPerParam.

        Returns:
            The records in parameter order.
        """
        self._close()
        entries = [shard.entry() for shard in self._done]
        records = [record for shard in self._done for record in shard.records]
        total = sum(shard.nbytes for shard in self._done)
        cache = {
            "metadata": {
                "ParamSize": len(records),
                "ParamBytes": float(total),
                "BitsPerParam": total * 8 / max(num_weights, 1),
            },
            "records": entries,
        }
        with os_errors(self.folder, "replace the weights"):
            for name in (QCC_JSON, TENSOR_CACHE):
                (self.folder / name).unlink(missing_ok=True)
            for old in self.folder.glob("params_shard_*.bin"):
                old.unlink()
            for shard in self._done:
                os.replace(shard.temporary, shard.path)
        write_file(self.folder / TENSOR_CACHE, json.dumps(cache, indent=1) + "\n")
        return records

    def _shard_for(self, nbytes: int) -> _Shard:
        """The open shard if a tensor of `nbytes` fits it, else a new one."""
        shard = self._open
        if shard and shard.nbytes and shard.nbytes + nbytes > self.shard_bytes:
            self._close()
            shard = None
        if shard is None:
            path = self.folder / f"params_shard_{len(self._done)}.bin"
            temporary = temporary_name(path)
            with os_errors(path, "write"):
                shard = self._open = _Shard(path, temporary, temporary.open("wb"))
        return shard

    def _close(self) -> None:
        if self._open:
            with os_errors(self._open.path, "write"):
                self._open.file.close()
            self._done.append(self._open)
            self._open = None
