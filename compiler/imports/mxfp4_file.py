"""gpt-oss's experts, stored as the OCP's MXFP4; their codes are kept.

Of a projection X of all experts of a layer, with n outputs and k inputs:
    X_blocks   uint8[experts, n, k / 32, 16]   two codes a byte, the first in the low bits
    X_scales   uint8[experts, n, k / 32]       w = fp4(code) * 2^(scale - 127)
They appear as X, [experts * n, k]: expert below expert.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import numpy as np

from qcc.compiler.config import shown
from qcc.compiler.imports.coded_file import CodedFile, Origin
from qcc.compiler.weights.checkpoint import Checkpoint
from qcc.quant_schemes import mxfp4
from qcc.quant_schemes.errors import did_you_mean
from qcc.quant_schemes.format import mxfp4 as mxfp4_format
from qcc.quant_schemes.packing import Array, Grid, Quantized
from qcc.runtime.errors import QccError

METHOD = "mxfp4"
_BLOCKS, _SCALES = "_blocks", "_scales"
_KEYS = ("quant_method", "modules_to_not_convert", "dequantize")
_FORMAT = mxfp4_format("float32")
_BYTES = 16  # of a block


class Mxfp4File(CodedFile):
    """The packed experts of an open checkpoint.

    Raises:
        QccError: there are none, their shapes or dtypes do not fit, or a key is not known.
    """

    label = METHOD

    def __init__(self, base: Checkpoint, config: Mapping[str, Any], where: str) -> None:
        """Check the shapes of all weights; reads no data. `config` is a quantization_config."""
        for key, value in config.items():
            if key not in _KEYS and value is not None:
                raise QccError(
                    f"{where}: quantization_config: unknown key {shown(key)} = {shown(value)}"
                    f"{did_you_mean(key, _KEYS)}"
                )
        self._base = base
        names = [
            name.removesuffix(_BLOCKS) for name in base.names if name.endswith(f"proj{_BLOCKS}")
        ]
        if not names:
            raise QccError(
                f"{base.folder}: config.json says {METHOD}, but no tensor is named "
                f"*_proj{_BLOCKS}; config.json and the weights belong to different models"
            )
        self._shapes = {name: self._check(name) for name in names}
        self.path = base.path(f"{names[0]}{_BLOCKS}")

    @property
    def entries(self) -> Collection[str]:
        """Names of the weights."""
        return self._shapes

    @property
    def sources(self) -> list[str]:
        """Names of the tensors that the weights are made of."""
        return [f"{name}{part}" for name in self._shapes for part in (_BLOCKS, _SCALES)]

    def shape(self, name: str) -> tuple[int, ...]:
        """[experts * n, k]."""
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        """float32, in which the numbers are exact."""
        return "float32"

    def origin(self, name: str) -> Origin:
        """Codes, all of one format."""
        return Origin("MXFP4", _FORMAT)

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Some rows, f32[rows, k]."""
        codes, exponents = self._codes(name, start, stop), self._exponents(name, start, stop)
        return mxfp4.numbers(codes) * np.repeat(mxfp4.powers(exponents), _FORMAT.group_size(1), 1)

    def quantized(self, name: str) -> Quantized:
        """Codes and exponents of a weight."""
        n, _ = self._shapes[name]
        return Quantized(self._codes(name, 0, n), Grid(self._exponents(name, 0, n)))

    def close(self) -> None:
        """The files are the checkpoint's."""

    def _codes(self, name: str, start: int, stop: int) -> Array:
        _, k = self._shapes[name]
        packed = self._bytes(f"{name}{_BLOCKS}", start, stop, k // 2)
        codes = np.empty((stop - start, k), np.uint8)
        codes[:, 0::2], codes[:, 1::2] = packed & 15, packed >> 4
        return codes

    def _exponents(self, name: str, start: int, stop: int) -> Array:
        _, k = self._shapes[name]
        found = self._bytes(f"{name}{_SCALES}", start, stop, _FORMAT.num_groups(k))
        if (found > mxfp4.LARGEST_EXPONENT).any():
            raise QccError(
                f"{self._base.folder}: {name}{_SCALES} holds 255, which is NaN; it is damaged: "
                "download the model again"
            )
        return found

    def _bytes(self, name: str, start: int, stop: int, width: int) -> Array:
        """uint8[rows, width] of a tensor that is read as rows of so many bytes."""
        buffer = np.empty((stop - start) * width, np.uint8)
        return self._base.read_flat(name, start * width, stop * width, buffer).reshape(-1, width)

    def _check(self, name: str) -> tuple[int, int]:
        base, blocks, scales = self._base, f"{name}{_BLOCKS}", f"{name}{_SCALES}"
        if scales not in base:
            self._bad(scales, "is missing")
        shape = base.shape(blocks)
        if len(shape) != 4 or shape[3] != _BYTES or 0 in shape:
            self._bad(blocks, f"has shape {list(shape)}, not [experts, n, k / 32, {_BYTES}]")
        if base.shape(scales) != shape[:3]:
            self._bad(scales, f"has shape {list(base.shape(scales))}, not {list(shape[:3])}")
        for part in (blocks, scales):
            if base.dtype(part) != "U8":
                self._bad(part, f"has dtype {base.dtype(part)}, not U8")
        return math.prod(shape[:2]), 2 * _BYTES * shape[2]

    def _bad(self, name: str, what: str) -> NoReturn:
        raise QccError(
            f"{self._base.folder}: tensor {name!r} {what}; quantization_config and the weights "
            "belong to different models, or the download is incomplete"
        )
