"""One pytorch_model.bin: a pickle of tensors, read by torch in its weights-only mode."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qcc.runtime.errors import QccError
from qcc.runtime.files import os_errors

_READABLE = ("float32", "float16", "bfloat16")


class TorchFile:
    """An open file, mapped into memory where its format allows it (all since torch 1.6).

    Raises:
        QccError: torch is not installed, or it refuses the file.
    """

    def __init__(self, path: Path) -> None:
        """Load the names, shapes and, mapped, the data."""
        self.path = path
        with os_errors(path, "read"), path.open("rb"):
            pass
        self._tensors: dict[str, Any] = _load(path)

    def close(self) -> None:
        """Let go of the data."""
        self._tensors = {}

    def __contains__(self, name: str) -> bool:
        """Whether the file holds a tensor of this name."""
        return name in self._tensors

    @property
    def entries(self) -> list[str]:
        """Names of the tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor that the file holds."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> str:
        """Torch's name of the dtype, as float32."""
        return str(self._tensors[name].dtype).removeprefix("torch.")

    def read(self, name: str, start: int, stop: int, buffer: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Elements start..stop of a tensor in C order; as SafetensorsFile.read."""
        import torch

        # A transposed tensor is made contiguous once; its map is let go.
        tensor = self._tensors[name] = self._tensors[name].detach().contiguous()
        flat = tensor.flatten()[start:stop]
        if flat.dtype == torch.bfloat16:
            source = flat.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        else:
            source = flat.numpy()
        result: npt.NDArray[Any] = buffer[: source.nbytes].view(source.dtype)
        np.copyto(result, source)
        return result


def _load(path: Path) -> dict[str, Any]:
    try:
        import torch
    except ImportError as err:
        raise QccError(
            f"{path}: reading a pickled checkpoint needs torch; pip install torch, "
            "or convert it to safetensors"
        ) from err
    try:
        try:
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as err:
            if "mmap" not in str(err):
                raise
            data = torch.load(path, map_location="cpu", weights_only=True)
    # torch raises whatever the unpickler meets: nearly every built-in exception is possible.
    except Exception as err:
        raise QccError(
            f"{path}: {_reason(err)}; download it again or convert it to safetensors"
        ) from err
    if not isinstance(data, dict):
        raise QccError(f"{path}: holds a {type(data).__name__}, not a dict of tensors")
    if isinstance(data.get("state_dict"), dict):
        data = data["state_dict"]
    return {str(k): v for k, v in data.items() if isinstance(v, torch.Tensor) and not v.is_sparse}


def _reason(err: Exception) -> str:
    """Why, in our words: torch's advise the user to allow code to run."""
    if isinstance(err, pickle.UnpicklingError):
        return "it is no pickle of tensors alone, which is all that is read"
    if isinstance(err, EOFError) or "zip archive" in str(err):
        return "it is truncated or damaged"
    line = next(iter(str(err).strip().splitlines()), "")[:120]
    return f"torch cannot read it ({type(err).__name__}: {line})"
