"""CodedFile: tensors that another tool quantized, under their Hugging Face names.

It stands beside SafetensorsFile in a Checkpoint. Whoever wants numbers reads them, dequantized;
whoever wants codes asks `origin` whether a WeightFormat represents them, and takes `quantized`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qcc.quant_schemes.format import WeightFormat
from qcc.quant_schemes.packing import Array, Quantized
from qcc.runtime.errors import QccError


@dataclass(frozen=True)
class Origin:
    """What a tensor was.

    `kind` is the tool's own name of its type. `format` represents its codes exactly; None: no
    format does, for the reason `why`, and `near` has about as many bits. A floating tensor has
    neither.
    """

    kind: str
    format: WeightFormat | None = None
    near: WeightFormat | None = None
    why: str = ""


class CodedFile(ABC):
    """Tensors by their Hugging Face names; `read` may be called from several threads."""

    path: Path
    label = ""  # of a scheme with the formats of these tensors: gguf-q4_k_m

    @property
    @abstractmethod
    def entries(self) -> Collection[str]:
        """Names of the tensors."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""

    @abstractmethod
    def dtype(self, name: str) -> str:
        """float32, float16 or bfloat16: what `rows` gives."""

    @abstractmethod
    def origin(self, name: str) -> Origin:
        """What the tensor was."""

    @abstractmethod
    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows start..stop of a tensor as [rows, k]; one row of all where it is a vector."""

    @abstractmethod
    def quantized(self, name: str) -> Quantized:
        """Codes and grid of a tensor whose origin has a format."""

    @abstractmethod
    def close(self) -> None:
        """Let go of files and memory."""

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self.entries

    def read(self, name: str, start: int, stop: int, buffer: Array) -> Array:
        """Elements start..stop of a tensor in C order; as SafetensorsFile.read."""
        k = self.shape(name)[-1]
        first = start // k
        flat = self.rows(name, first, -(-stop // k)).reshape(-1)
        flat = flat[start - first * k : stop - first * k]
        result = buffer[: flat.nbytes].view(flat.dtype)
        result[:] = flat
        return result


def check_finite(numbers: Array | None, where: str) -> None:
    """Refuse scales or biases that are NaN or infinite."""
    if numbers is not None and not np.isfinite(numbers).all():
        raise QccError(f"{where}: its scales hold NaN or infinite numbers; it is damaged")
