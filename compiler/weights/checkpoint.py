"""Checkpoint: the tensors of a Hugging Face folder by name, read on demand.

It reads model.safetensors, or model.safetensors.index.json and its shards, or (only with
allow_pickle) pytorch_model.bin and pytorch_model.bin.index.json. Opening reads and checks headers
only. The folder is untrusted input: whatever is wrong is a QccError of one line. Symbolic links
are followed, since hub caches are made of them; names with a path in them are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from qcc.compiler.weights.safetensors_file import SafetensorsFile
from qcc.compiler.weights.torch_file import TorchFile
from qcc.runtime.errors import QccError
from qcc.runtime.files import read_json

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
_AGAIN = "download the model again"


class Checkpoint:
    """An open checkpoint; a context manager. `read_flat` may be called from several threads."""

    def __init__(
        self,
        folder: Path,
        files: Mapping[str, SafetensorsFile | TorchFile],
        file_of: dict[str, str],
    ) -> None:
        """Use `open`; `file_of` maps each tensor's name to the name of its file."""
        self.folder = folder
        self._files = dict(files)
        self._file_of = file_of

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
        files: dict[str, SafetensorsFile | TorchFile] = {}
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
        return list(self._file_of)

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

    def _file(self, name: str) -> SafetensorsFile | TorchFile:
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
