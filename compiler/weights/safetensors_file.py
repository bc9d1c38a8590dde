"""One .safetensors file: its header checked against its size, its tensors read piece by piece.

Layout: u64 little endian header length, that many bytes of JSON {name: {"dtype", "shape",
"data_offsets": [begin, end]}}, then the data; offsets count from its start. Reading is pread into
plain memory: a file that shrinks meanwhile is an error, not a signal, and nothing stays mapped.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qcc.runtime.errors import QccError
from qcc.runtime.files import os_errors

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32}
_BITS |= {"I64": 64, "U64": 64, "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64}
_BITS |= {"F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
_BITS |= {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
READABLE: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    # For qcc.compiler.imports: numbers that have scales beside them, words of packed codes.
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
}
_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_AGAIN = "download it again"


@dataclass(frozen=True)
class Entry:
    """A tensor of the header: `begin` counts bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class SafetensorsFile:
    """An open file; `read` may be called from several threads at once.

    Raises:
        QccError: the file cannot be read, is truncated, or its header is not as it must be.
    """

    def __init__(self, path: Path) -> None:
        """Open the file, read its header and check it before any data is read."""
        self.path = path
        with os_errors(path, "read"):
            self._file = path.open("rb", buffering=0)
        try:
            with os_errors(path, "read"):
                self.entries = self._header(os.fstat(self._file.fileno()).st_size)
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file; what was read stays."""
        self._file.close()

    def __contains__(self, name: str) -> bool:
        """Whether the file holds a tensor of this name."""
        return name in self.entries

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor that the file holds."""
        return self.entries[name].shape

    def dtype(self, name: str) -> str:
        """float32, float16, bfloat16, or the header's own name of a dtype that is not read."""
        dtype = self.entries[name].dtype
        return _NAMES.get(dtype, dtype)

    def read(self, name: str, start: int, stop: int, buffer: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Elements start..stop of a tensor in C order.

        Args:
            name: of a tensor of a readable dtype.
            start: first element.
            stop: one past the last element.
            buffer: uint8[at least the bytes asked for]; the result is a view of it.

        Returns:
            [stop - start] of float32, float16, bfloat16 or float8_e4m3fn (ml_dtypes), int32, uint8.
        """
        entry = self.entries[name]
        dtype = READABLE[entry.dtype]
        wanted = buffer.data[: (stop - start) * dtype.itemsize]
        done = 0
        with os_errors(self.path, "read"):
            while done < len(wanted):
                offset = entry.begin + start * dtype.itemsize + done
                size = os.preadv(self._file.fileno(), [wanted[done:]], offset)
                if size == 0:
                    self._bad(f"ends within tensor {name!r}")
                done += size
        return buffer[: len(wanted)].view(dtype)

    def _bad(self, what: str) -> NoReturn:
        raise QccError(f"{self.path}: {what}; {_AGAIN}")

    def _header(self, size: int) -> dict[str, Entry]:
        raw = self._file.read(8)
        if raw.startswith(b"version "):
            self._bad("is a Git LFS pointer, not the weights (git lfs pull fetches them)")
        if len(raw) < 8:
            self._bad(f"truncated: has {size} bytes, a safetensors file has at least 8")
        length = struct.unpack("<Q", raw)[0]
        if length > MAX_HEADER:
            self._bad(f"no safetensors file: its header would have {length} bytes")
        if 8 + length > size:
            self._bad(f"truncated: its header needs {8 + length} bytes, the file has {size}")
        text = b""
        while len(text) < length and (more := self._file.read(length - len(text))):
            text += more
        try:
            header = json.loads(text, object_pairs_hook=_unique)
            if not isinstance(header, dict):
                raise ValueError("it is no JSON object")
            header.pop("__metadata__", None)
            entries = {
                name: _entry(name, value, 8 + length, size) for name, value in header.items()
            }
            _check_disjoint(entries)
        except _TruncatedError as err:
            self._bad(f"truncated: {err}")
        except (ValueError, RecursionError) as err:
            self._bad(f"bad safetensors header: {err}")
        return entries


class _TruncatedError(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def _whole(values: object, count: int | None = None) -> list[int]:
    if not isinstance(values, list) or (count is not None and len(values) != count):
        raise ValueError(f"{str(values)[:60]!r} is not a list of whole numbers")
    for value in values:
        if type(value) is not int or value < 0:
            raise ValueError(f"{str(value)[:60]!r} is not a whole number >= 0")
    return values


def _entry(name: str, value: object, data: int, size: int) -> Entry:
    """One tensor of the header, checked; `data` is where the data begins, `size` the file's."""
    where = f"tensor {name[:200]!r}"
    if not isinstance(value, dict) or not value.keys() >= {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} lacks dtype, shape or data_offsets")
    dtype = value["dtype"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{where} has the unknown dtype {str(dtype)[:60]!r}")
    shape = _whole(value["shape"])
    begin, end = _whole(value["data_offsets"], 2)
    nbytes = math.prod(shape) * _BITS[dtype] // 8
    if end - begin != nbytes:
        raise ValueError(
            f"{where}: {dtype} {str(shape)[:60]} has {nbytes} bytes, its offsets span {end - begin}"
        )
    if data + end > size:
        raise _TruncatedError(f"{where} ends at byte {data + end}, the file has {size}")
    return Entry(dtype, tuple(shape), data + begin, nbytes)


def _check_disjoint(entries: dict[str, Entry]) -> None:
    end, last = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
        if entry.begin < end:
            raise ValueError(f"tensors {last[:200]!r} and {name[:200]!r} overlap")
        end, last = entry.begin + entry.nbytes, name
