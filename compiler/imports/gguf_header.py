"""The head of a .gguf file: metadata and the table of tensors, checked before use.

Layout, little endian: "GGUF", u32 version, u64 tensors, u64 entries; then entries (string key, u32
type, value) and tensors (string name, u32 dimensions, u64 each with the fastest first, u32 ggml
type, u64 offset from the data's begin, which is aligned). A string is u64 bytes and UTF-8; an
array u32 type, u64 count, items. Every size is held against what is left of the file before
anything is read or allocated, so a corrupt file is an error of one line in bounded time.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from qcc.runtime.errors import QccError
from qcc.runtime.files import os_errors

MAX_HEADER = 1 << 27  # bytes; the largest tokenizers take 20 MB
MAX_ITEMS = 1 << 24  # of an array; the largest vocabularies have 300 000
MAX_DIMENSIONS = 4
VERSIONS = (2, 3)
_MAGIC = b"GGUF"
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", _BOOL: "<u1"}
_SCALARS |= {10: "<u8", 11: "<i8", 12: "<f8"}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of ggml type `kind` (such as Q4_K): rows first; `begin` counts from the file's."""

    name: str
    kind: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """Metadata by key (numbers, booleans, texts, lists of them) and tensors by name."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


@cache
def ggml_types() -> dict[int, tuple[str, int, int]]:
    """Number of a ggml type -> name, weights in a block, bytes of a block, by the gguf package.

    Raises:
        QccError: the package is not installed.
    """
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError as err:
        raise QccError(
            "reading a .gguf file needs the gguf package: pip install 'qcc[gguf]'"
        ) from err
    return {int(kind): (str(kind.name), *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}


def read_header(path: Path) -> Header:
    """Read and check the head of a file.

    Raises:
        QccError: not readable, not GGUF, truncated, or not as it must be.
    """
    types = ggml_types()
    with os_errors(path, "read"), path.open("rb") as file:
        return _Reader(path, file).header(types)


class _Reader:
    """Reads a head in order; `left` bytes of it may still be read."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size = file.seek(0, 2)
        file.seek(0)
        self.left = min(self.size, MAX_HEADER)

    def bad(self, what: str) -> NoReturn:
        raise QccError(f"{self.path}: {what}; download the file again")

    def take(self, count: int, what: str) -> bytes:
        """The next bytes, `what` in an error."""
        if count > self.left:
            limit = "the file" if self.size <= MAX_HEADER else f"a head of {MAX_HEADER} bytes"
            self.bad(f"truncated or corrupt: {what} goes beyond the end of {limit}")
        self.left -= count
        data = self.file.read(count)
        if len(data) != count:
            self.bad(f"truncated: ends within {what}")
        return data

    def integer(self, form: str, what: str) -> int:
        """A number of struct's `form`."""
        value: int = struct.unpack(f"<{form}", self.take(struct.calcsize(form), what))[0]
        return value

    def text(self, what: str) -> str:
        """A string."""
        data = self.take(self.integer("Q", what), what)
        try:
            return data.decode()
        except UnicodeDecodeError:
            self.bad(f"corrupt: {what} is not UTF-8")

    def value(self, kind: int, what: str) -> Any:
        """A metadata value of type `kind`."""
        if kind == _STRING:
            return self.text(what)
        if kind != _ARRAY:
            return self.numbers(kind, 1, what)[0]
        kind, count = self.integer("I", what), self.integer("Q", what)
        if count > MAX_ITEMS:
            self.bad(f"corrupt: {what} would have {count} items")
        if kind == _STRING:
            return [self.text(what) for _ in range(count)]
        return self.numbers(kind, count, what)

    def numbers(self, kind: int, count: int, what: str) -> list[Any]:
        """`count` numbers or booleans of type `kind`."""
        if kind not in _SCALARS:
            self.bad(f"corrupt: {what} has the unknown type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        found = np.frombuffer(self.take(dtype.itemsize * count, what), dtype)
        return list((found != 0 if kind == _BOOL else found).tolist())

    def header(self, types: dict[int, tuple[str, int, int]]) -> Header:
        """The whole head."""
        if self.take(min(4, self.left), "the mark") != _MAGIC:
            self.bad("no GGUF file: it does not begin with GGUF")
        version = self.integer("I", "the version")
        if version not in VERSIONS:
            what = "is big endian" if version & 0xFFFF == 0 and version else "is not supported"
            self.bad(f"GGUF version {version} {what}; supported: {', '.join(map(str, VERSIONS))}")
        tensors, entries = self.integer("Q", "the counts"), self.integer("Q", "the counts")
        if 24 * tensors + 13 * entries > self.left:
            self.bad(f"truncated or corrupt: {tensors} tensors and {entries} entries do not fit")
        metadata: dict[str, Any] = {}
        for index in range(entries):
            key = self.text(f"key {index} of the metadata")
            if key in metadata:
                self.bad(f"corrupt: key {key[:60]!r} appears twice")
            what = f"{key[:60]!r} of the metadata"
            metadata[key] = self.value(self.integer("I", what), what)
        table = [self.tensor(index, types) for index in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
            self.bad(f"corrupt: general.alignment is {str(alignment)[:60]}, not a power of 2")
        data = -(-self.file.tell() // alignment) * alignment
        return Header(metadata, self.placed(table, data, alignment))

    def tensor(self, index: int, types: dict[int, tuple[str, int, int]]) -> TensorInfo:
        """One line of the table; `begin` counts from the data's begin as yet."""
        name = self.text(f"the name of tensor {index}")
        what = f"tensor {name[:60]!r}"
        count = self.integer("I", what)
        if not 0 < count <= MAX_DIMENSIONS:
            self.bad(f"corrupt: {what} has {count} dimensions")
        shape = tuple(self.integer("Q", what) for _ in range(count))[::-1]
        kind, begin = self.integer("I", what), self.integer("Q", what)
        if kind not in types:
            self.bad(f"{what} has the unknown ggml type {kind} (or the file is corrupt)")
        kind_name, block, block_bytes = types[kind]
        if 0 in shape or math.prod(shape) > 2**48 or shape[-1] % block:
            self.bad(f"corrupt: {what} of {kind_name} has the shape {list(shape)}")
        return TensorInfo(name, kind_name, shape, begin, math.prod(shape) // block * block_bytes)

    def placed(self, table: list[TensorInfo], data: int, alignment: int) -> dict[str, TensorInfo]:
        """The tensors by name where the file has them, none upon another."""
        found: dict[str, TensorInfo] = {}
        end, last = 0, ""
        for info in sorted(table, key=lambda each: each.begin):
            what = f"tensor {info.name[:60]!r}"
            if info.name in found:
                self.bad(f"corrupt: {what} appears twice")
            if info.begin < end or info.begin % alignment:
                self.bad(f"corrupt: {what} at {info.begin} is not aligned or overlaps {last!r}")
            end, last = info.begin + info.nbytes, info.name[:60]
            if data + end > self.size:
                self.bad(f"truncated: {what} ends at byte {data + end}, the file has {self.size}")
            found[info.name] = TensorInfo(
                info.name, info.kind, info.shape, data + info.begin, info.nbytes
            )
        return {info.name: found[info.name] for info in table}
