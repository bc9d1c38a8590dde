"""GgufFile: the tensors of model.gguf, and of its further parts, under Hugging Face's names.

Floating tensors are read as they are; all others as numbers by the gguf package's dequantizer, and,
where a format represents them, as codes.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from qcc.compiler.config import shown
from qcc.compiler.imports.coded_file import CodedFile, Origin, check_finite
from qcc.compiler.imports.gguf_header import Header, TensorInfo, read_header
from qcc.compiler.imports.gguf_names import AUXILIARY, NAMINGS, Naming, Order, heads_of
from qcc.compiler.imports.gguf_types import BLOCK_TYPES, quantized
from qcc.quant_schemes.format import WeightFormat
from qcc.quant_schemes.packing import Array, Quantized
from qcc.runtime.errors import QccError
from qcc.runtime.files import os_errors

FLOATS = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
# What weights of other types are quantized to: the first that has at least as many bits.
_NEAR = (
    (2.7, WeightFormat(2, "float16", 16, grid="asymmetric", scale_bits=4)),
    (3.6, WeightFormat(3, "float16", 16, grid="asymmetric", scale_bits=6)),
    (4.7, WeightFormat(4, "float16", 32, grid="asymmetric", scale_bits=6)),
    (math.inf, WeightFormat(8, "float16", 32, zero=128)),
)


@dataclass(frozen=True)
class _Tensor:
    """A tensor where it lies, and the order of its rows (None: as they lie)."""

    info: TensorInfo
    file: BinaryIO
    order: Order | None


class GgufFile(CodedFile):
    """An open model.gguf with what lies beside it as model-*.gguf.

    Raises:
        QccError: not readable, corrupt, of an architecture or a type that is not supported.
    """

    def __init__(self, path: Path) -> None:
        """Read and check the heads of all parts."""
        self.path = path
        self._tensors: dict[str, _Tensor] = {}
        with ExitStack() as files:
            parts = [path, *sorted(path.parent.glob("model-*.gguf"))]
            headers = [read_header(part) for part in parts]
            self.metadata = headers[0].metadata
            wanted = self.metadata.get("split.count", 1)
            if wanted != len(parts) and (wanted or len(parts) > 1):
                raise QccError(
                    f"{path}: it is one of {shown(wanted)} parts, {len(parts)} are there; put all "
                    "of them (...-00001-of-...gguf) into one folder"
                )
            self.architecture, naming = find_naming(headers[0], path)
            for part, header in zip(parts, headers, strict=True):
                with os_errors(part, "read"):
                    file: BinaryIO = files.enter_context(part.open("rb", buffering=0))
                for info in header.tensors.values():
                    self._add(info, file, naming)
            self.label = f"gguf-{self._file_type()}"
            self._files = files.pop_all()

    @property
    def entries(self) -> Collection[str]:
        """Hugging Face's names; a tensor that has none there keeps its own."""
        return self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._tensors[name].info.shape

    def dtype(self, name: str) -> str:
        """That of a floating tensor; float32, in which others are dequantized."""
        return str(FLOATS.get(self._tensors[name].info.kind, FLOATS["F32"]).name)

    def origin(self, name: str) -> Origin:
        """ggml's type, and the format that represents it."""
        info = self._tensors[name].info
        if info.kind in FLOATS:
            return Origin(info.kind)
        if len(info.shape) == 2 and info.kind in BLOCK_TYPES:
            return Origin(info.kind, BLOCK_TYPES[info.kind].format)
        bits = 8 * info.nbytes / math.prod(info.shape)
        near = next(fmt for most, fmt in _NEAR if bits <= most)
        return Origin(info.kind, None, near, "no format has its grid")

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows start..stop as numbers of `dtype`, [rows, k]."""
        tensor = self._tensors[name]
        if len(tensor.info.shape) == 1:
            numbers = self._numbers(tensor, self._bytes(tensor, 0, 1))
            return numbers if tensor.order is None else numbers[:, tensor.order]
        return self._numbers(tensor, self._bytes(tensor, start, stop))

    def quantized(self, name: str) -> Quantized:
        """The codes and grid of a tensor whose origin has a format."""
        tensor = self._tensors[name]
        n, k = tensor.info.shape
        found = quantized(BLOCK_TYPES[tensor.info.kind], self._bytes(tensor, 0, n), n, k)
        grid = found.grid
        for numbers in (grid.scale, grid.bias, grid.block_scale, grid.block_bias):
            check_finite(numbers, f"{self.path}: tensor {tensor.info.name!r}")
        return found

    def close(self) -> None:
        """Close all parts."""
        self._files.close()

    def _file_type(self) -> str:
        """What llama.cpp calls the mix of types, such as q4_k_m; else the type of most weights."""
        from gguf.constants import LlamaFileType

        number = self.metadata.get("general.file_type")
        for kind in LlamaFileType:
            if kind.value == number and kind is not LlamaFileType.GUESSED:
                return str(kind.name.split("_", 1)[1].lower())
        weights: Counter[str] = Counter()
        for tensor in self._tensors.values():
            weights[tensor.info.kind] += math.prod(tensor.info.shape)
        return weights.most_common(1)[0][0].lower() if weights else "empty"

    def _add(self, info: TensorInfo, file: BinaryIO, naming: Naming) -> None:
        if info.name in AUXILIARY:
            return
        name = naming.hugging_face(info.name) or info.name
        if name in self._tensors:
            raise QccError(f"{self.path}: tensor {info.name!r} appears in two parts")
        self._check_type(info)
        heads = heads_of(self.metadata, self.architecture)
        try:
            order = naming.row_order(info.name, info.shape[0], heads)
        except (TypeError, ValueError, ZeroDivisionError) as err:
            raise QccError(
                f"{self.path}: tensor {info.name!r} has {info.shape[0]} rows, which the heads "
                f"{shown(heads)} of the metadata do not divide"
            ) from err
        self._tensors[name] = _Tensor(info, file, order)

    def _check_type(self, info: TensorInfo) -> None:
        """Refuse a type that nothing here turns into numbers."""
        if info.kind in FLOATS:
            return
        tensor = f"{self.path}: tensor {info.name!r} has the type {info.kind}"
        if len(info.shape) != 2:
            raise QccError(f"{tensor} and {len(info.shape)} dimensions; only matrices may have it")
        try:
            _dequantize(info.kind, np.zeros((1, info.nbytes // info.shape[0]), np.uint8))
        except NotImplementedError as err:
            raise QccError(f"{tensor}, which the gguf package does not dequantize") from err

    def _numbers(self, tensor: _Tensor, data: Array) -> Array:
        """uint8[rows, bytes of a row] -> numbers [rows, k]."""
        kind = tensor.info.kind
        return data.view(FLOATS[kind]) if kind in FLOATS else _dequantize(kind, data)

    def _bytes(self, tensor: _Tensor, start: int, stop: int) -> Array:
        """Rows of the checkpoint as they are stored, uint8[rows, bytes of a row].

        Rows that lie one after another are read at once, whatever their order.
        """
        info = tensor.info
        size = info.nbytes // (info.shape[0] if len(info.shape) > 1 else 1)
        ordered = tensor.order is not None and len(info.shape) > 1
        wanted = tensor.order[start:stop] if ordered else np.arange(start, stop)  # type: ignore[index]
        places = np.argsort(wanted, kind="stable")
        ends = np.flatnonzero(np.diff(wanted[places]) != 1) + 1
        found = np.empty((len(wanted), size), np.uint8)
        for run in np.split(places, ends):
            first = info.begin + int(wanted[run[0]]) * size
            found[run] = self._read(tensor, first, len(run) * size).reshape(len(run), size)
        return found

    def _read(self, tensor: _Tensor, begin: int, count: int) -> Array:
        data = bytearray()
        with os_errors(self.path, "read"):
            while len(data) < count:
                more = os.pread(tensor.file.fileno(), count - len(data), begin + len(data))
                if not more:
                    raise QccError(
                        f"{self.path}: ends within tensor {tensor.info.name!r}; download it again"
                    )
                data += more
        return np.frombuffer(data, np.uint8)


def find_naming(header: Header, path: Path) -> tuple[str, Naming]:
    """The architecture that the metadata names, and its names.

    Raises:
        QccError: not supported.
    """
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in NAMINGS:
        raise QccError(
            f"{path}: general.architecture {shown(architecture)} is not supported; "
            f"supported: {', '.join(NAMINGS)}"
        )
    return architecture, NAMINGS[architecture]


def _dequantize(kind: str, data: Array) -> Array:
    """uint8[rows, bytes of a row] -> f32[rows, k], by the gguf package."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):  # NaN and infinity are found by whoever writes the numbers
        result: Array = dequantize(data, GGMLQuantizationType[kind])
    return result
