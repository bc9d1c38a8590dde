"""Checkpoint: the tensors of a Hugging Face folder by name, read on demand.

It reads model.safetensors, or model.safetensors.index.json and its shards, or (only with
allow_pickle) pytorch_model.bin and pytorch_model.bin.index.json. What another tool quantized
(model.gguf, GPTQ, AWQ) is read by qcc.compiler.imports and appears under the same names, as
numbers and as codes. Opening reads and checks headers only. The folder is untrusted input: whatever
is wrong is a QccError of one line. Symbolic links are followed, since hub caches are made of them;
names with a path in them are refused.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from qcc.compiler.imports.coded_file import CodedFile, Origin
from qcc.compiler.weights.safetensors_file import SafetensorsFile
from qcc.compiler.weights.torch_file import TorchFile
from qcc.quant_schemes.format import WeightFormat
from qcc.quant_schemes.packing import Quantized
from qcc.runtime.errors import QccError
from qcc.runtime.files import read_json

SAFETENSORS, PICKLE, GGUF = "model.safetensors", "pytorch_model.bin", "model.gguf"
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
_AGAIN = "download the model again"
_File = SafetensorsFile | TorchFile | CodedFile


class Checkpoint:
    """An open checkpoint; a context manager. `read_flat` may be called from several threads."""

    def __init__(
        self,
        folder: Path,
        files: Mapping[str, _File],
        file_of: Mapping[str, str],
        unlisted: Collection[str] = (),
    ) -> None:
        """Use `open`.

        `file_of` maps each tensor's name to the name of its file; `unlisted` are in no list of
        names, but may be read.
        """
        self.folder = folder
        self._files = dict(files)
        self._file_of = dict(file_of)
        self._unlisted = frozenset(unlisted)

    @classmethod
    def open(cls, folder: Path | str, allow_pickle: bool = False) -> Checkpoint:
        """Open the weights in a folder.

        Raises:
            QccError: no folder, no weights, pickled weights without `allow_pickle`, or files that
                are missing, truncated or not what their names say.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise QccError(f"{folder}: no such folder; give a folder with a Hugging Face model")
        if (folder / GGUF).is_file():
            from qcc.compiler.imports.gguf_file import GgufFile

            gguf = GgufFile(folder / GGUF)
            return cls(folder, {GGUF: gguf}, dict.fromkeys(gguf.entries, GGUF))
        from qcc.compiler.imports.packed_file import unpacked

        opened = cls._open_folder(folder, allow_pickle)
        try:
            return unpacked(opened)
        except BaseException:
            opened.close()
            raise

    @classmethod
    def _open_folder(cls, folder: Path, allow_pickle: bool) -> Checkpoint:
        """The tensors as they are stored."""
        names = [SAFETENSORS, f"{SAFETENSORS}.index.json", PICKLE, f"{PICKLE}.index.json"]
        # A dangling link counts: it must be reported as broken, not passed over.
        found = next((n for n in names if (folder / n).exists() or (folder / n).is_symlink()), None)
        if found is None:
            raise QccError(f"{folder}: no weights: it has neither of {', '.join(names)}; {_AGAIN}")
        if found.startswith(PICKLE) and not allow_pickle:
            raise QccError(
                f"{folder / found}: pickled weights; pass --allow-pickle to read them (torch "
                "loads weights only, it runs no code), or convert them to safetensors"
            )
        weight_map = _read_index(folder / found) if found.endswith(".json") else None
        files: dict[str, _File] = {}
        try:
            for name in dict.fromkeys(weight_map.values()) if weight_map else [found]:
                path = folder / name
                if weight_map and not path.exists():
                    raise QccError(f"{folder / found}: its shard {name} is missing; {_AGAIN}")
                files[name] = (TorchFile if found.startswith(PICKLE) else SafetensorsFile)(path)
            if weight_map is None:
                return cls(folder, files, dict.fromkeys(files[found].entries, found))
            for tensor, name in weight_map.items():
                if tensor not in files[name]:
                    raise QccError(
                        f"{folder / name}: has no tensor {tensor!r}, though {found} says so; "
                        f"{_AGAIN}"
                    )
        except BaseException:
            for file in files.values():
                file.close()
            raise
        return cls(folder, files, weight_map)

    def overlaid(
        self, file: CodedFile, gone: Collection[str] = (), unlisted: Collection[str] = ()
    ) -> Checkpoint:
        """This checkpoint with the tensors of `file` instead of its own; closes with it.

        Args:
            file: its tensors come first, under names that may be new.
            gone: names that are no more.
            unlisted: names that are read but not listed.
        """
        key = f"overlay {len(self._files)}"
        kept = {name: own for name, own in self._file_of.items() if name not in set(gone)}
        file_of = {**kept, **dict.fromkeys(file.entries, key)}
        return Checkpoint(
            self.folder, {**self._files, key: file}, file_of, self._unlisted | set(unlisted)
        )

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Checkpoint:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close all files."""
        self.close()

    @property
    def names(self) -> list[str]:
        """Names of all tensors, in the order of the file or the index."""
        return [name for name in self._file_of if name not in self._unlisted]

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._file_of

    def path(self, name: str) -> Path:
        """The file that holds a tensor, for errors."""
        return self._file(name).path

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._file(name).shape(name)

    def dtype(self, name: str) -> str:
        """float32, float16, bfloat16, or the file's own name of a dtype that `read` refuses."""
        return self._file(name).dtype(name)

    @property
    def label(self) -> str:
        """Of a scheme with the checkpoint's own formats; "" where no tool quantized it."""
        coded = (file.label for file in self._files.values() if isinstance(file, CodedFile))
        return next((label for label in coded if label), "")

    def origin(self, name: str) -> Origin | None:
        """What another tool quantized the tensor to; None: it is stored as numbers."""
        file = self._file(name)
        return file.origin(name) if isinstance(file, CodedFile) else None

    def format(self, name: str) -> WeightFormat | None:
        """The format that represents the stored codes exactly; None: there is none."""
        origin = self.origin(name)
        return origin.format if origin is not None else None

    def quantized(self, name: str) -> Quantized:
        """The stored codes and their grid, where `format` is not None."""
        file = self._file(name)
        assert isinstance(file, CodedFile), f"{name} is stored as numbers"
        return file.quantized(name)

    def check(self, name: str, shape: tuple[int, ...] | None = None) -> None:
        """Refuse a tensor that is absent, of another shape, or of a dtype that is not read.

        Raises:
            QccError: says which.
        """
        where = f"{self.path(name)}: tensor {name!r}"
        if shape is not None and self.shape(name) != tuple(shape):
            raise QccError(
                f"{where} has shape {list(self.shape(name))}, config.json asks for {list(shape)}; "
                "they belong to different models"
            )
        if self.dtype(name) not in ITEMSIZE:
            raise QccError(
                f"{where} has dtype {self.dtype(name)}, allowed: {', '.join(ITEMSIZE)}; "
                "convert the checkpoint to one of these"
            )

    def read(self, name: str) -> npt.NDArray[Any]:
        """A whole tensor: float32, float16 or ml_dtypes.bfloat16 [*shape], the caller's own.

        Raises:
            QccError: absent, of another dtype, or the file cannot be read.
        """
        self.check(name)
        return self.read_flat(name, 0, math.prod(self.shape(name))).reshape(self.shape(name))

    def read_flat(
        self, name: str, start: int, stop: int, buffer: npt.NDArray[Any] | None = None
    ) -> npt.NDArray[Any]:
        """Elements start..stop of a tensor in C order, after `check`.

        Args:
            name: of the tensor.
            start: first element.
            stop: one past the last element.
            buffer: uint8 memory to read into, at least as many bytes; None: new memory.

        Returns:
            [stop - start] in the tensor's dtype, a view of `buffer` where given.
        """
        if buffer is None:
            buffer = np.empty((stop - start) * ITEMSIZE[self.dtype(name)], np.uint8)
        return self._file(name).read(name, start, stop, buffer)

    def read_words(self, name: str) -> npt.NDArray[np.int32]:
        """A whole tensor of packed codes, dtype I32, flat."""
        count = math.prod(self.shape(name))
        return self._file(name).read(name, 0, count, np.empty(count * 4, np.uint8))

    def _file(self, name: str) -> _File:
        if name not in self._file_of:
            raise QccError(
                f"{self.folder}: the checkpoint has no tensor {name!r}; its config.json and its "
                "weights belong to different models, or the download is incomplete"
            )
        return self._files[self._file_of[name]]


def _read_index(path: Path) -> dict[str, str]:
    """The weight_map of an index, its file names checked."""
    weight_map = read_json(path, _AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise QccError(f"{path}: has no weight_map of tensor names to files; {_AGAIN}")
    suffix = Path(path.name.removesuffix(".index.json")).suffix
    for tensor, name in weight_map.items():
        good = isinstance(name, str) and name.isprintable() and name.endswith(suffix)
        if not good or any(c in name for c in "/\\:") or name.startswith("."):
            raise QccError(
                f"{path}: weight_map[{tensor!r}] is {name!r}, which is not the name of a "
                f"{suffix} file in the same folder; {_AGAIN}"
            )
    return dict(weight_map)
