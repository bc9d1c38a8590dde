"""GPTQ's and AutoAWQ's packed weights, read as X.weight.

Tensors of a layer X with k inputs, n outputs, G groups, w = (q - z) * s:
    GPTQ     X.qweight int32[k*bits/32, n]   each column a dense stream of codes, least bit first
             X.qzeros  int32[G, n*bits/32]   each row likewise; the first format holds z - 1
             X.scales  [G, n]                X.g_idx int32[k]: the group of each input, where given
    AutoAWQ  X.qweight int32[k, n/8]         code e of a word is at bit ((e%2)*4 + e//2)*4
             X.qzeros  int32[G, n/8]         likewise; X.scales [G, n]
Codes are kept where groups are runs of columns. GPTQ's activation order without static groups
deals columns to groups at will (g_idx): these are dequantized exactly, and quantized anew.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from qcc.compiler.config import read_json
from qcc.compiler.imports import mxfp4_file
from qcc.compiler.imports.coded_file import CodedFile, Origin, check_finite
from qcc.compiler.imports.fp8_file import METHOD, Fp8File, read_block_size
from qcc.compiler.imports.gptq_config import Packing, read_packing
from qcc.compiler.weights.checkpoint import ITEMSIZE, Checkpoint
from qcc.quant_schemes.errors import SchemeError
from qcc.quant_schemes.format import Group, WeightFormat
from qcc.quant_schemes.packing import Array, Grid, Quantized, unpack_stream
from qcc.runtime.errors import QccError

_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def unpacked(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, with weights where its config.json says GPTQ, AWQ, FP8 or MXFP4.

    Raises:
        QccError: a quantization_config that is not supported, tensors that do not fit it.
    """
    path = checkpoint.folder / "config.json"
    raw = read_json(path) if path.is_file() else {}
    config = raw.get("quantization_config") if isinstance(raw, dict) else None
    if not isinstance(config, Mapping) or not config:
        return checkpoint
    if config.get("quant_method") == METHOD:
        numbers = Fp8File(checkpoint, read_block_size(config, str(path)))
        return checkpoint.overlaid(numbers, gone=numbers.sources)
    if config.get("quant_method") == mxfp4_file.METHOD:
        experts = mxfp4_file.Mxfp4File(checkpoint, config, str(path))
        return checkpoint.overlaid(experts, gone=experts.sources)
    file = PackedFile(checkpoint, read_packing(config, str(path)))
    return checkpoint.overlaid(file, gone=file.sources, unlisted=file.idle_biases())


@dataclass(frozen=True)
class _Loaded:
    """A weight [n, k] unpacked: `zeros` int16[n, G], `scales` float[n, G], `groups` int[k]."""

    codes: Array
    zeros: Array
    scales: Array
    groups: Array


class PackedFile(CodedFile):
    """The packed layers of an open checkpoint.

    Raises:
        QccError: a layer's tensors are missing, or their shapes or dtypes do not fit.
    """

    def __init__(self, base: Checkpoint, packing: Packing) -> None:
        """Check the shapes of all layers; reads no data."""
        self.packing, self._base, self.label = packing, base, packing.name
        self._layers = [
            name.removesuffix(".qweight") for name in base.names if name.endswith(".qweight")
        ]
        if not self._layers:
            raise QccError(
                f"{base.folder}: config.json says {packing.method}, but no tensor is named "
                "*.qweight; config.json and the weights belong to different models"
            )
        self.path = base.path(f"{self._layers[0]}.qweight")
        self._shapes = {f"{layer}.weight": self._check(layer) for layer in self._layers}
        self._origins: dict[str, Origin] = {}
        self._last: tuple[str, _Loaded] | None = None
        self._lock = threading.Lock()

    @property
    def entries(self) -> Collection[str]:
        """Names of the weights."""
        return self._shapes

    @property
    def sources(self) -> list[str]:
        """Names of the tensors that the weights are made of."""
        every = [f"{layer}.{part}" for layer in self._layers for part in _PARTS]
        return [name for name in every if name in self._base]

    def idle_biases(self) -> list[str]:
        """Biases that are all zero: GPTQ writes them for layers of models without biases."""
        names = [f"{layer}.bias" for layer in self._layers]
        return [name for name in names if name in self._base and not self._base.read(name).any()]

    def shape(self, name: str) -> tuple[int, ...]:
        """[n, k] of a weight."""
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        """float32, in which (q - z) * s is exact for 16-bit scales."""
        return "float32"

    def close(self) -> None:
        """Forget the last weight; the files are the checkpoint's."""
        self._last = None

    def origin(self, name: str) -> Origin:
        """The format of a layer's codes; reads its zero points and groups once."""
        if name not in self._origins:
            self._origins[name] = self._origin(name)
        return self._origins[name]

    def rows(self, name: str, start: int, stop: int) -> Array:
        """(q - z) * s of some rows, f32[rows, k]."""
        loaded = self._load(name)
        zeros = loaded.zeros[start:stop].astype(np.float32)[:, loaded.groups]
        scales = loaded.scales[start:stop].astype(np.float32)[:, loaded.groups]
        return (loaded.codes[start:stop] - zeros) * scales

    def quantized(self, name: str) -> Quantized:
        """Codes and grid of a layer whose origin has a format."""
        fmt, loaded = self.origin(name).format, self._load(name)
        assert fmt is not None, f"{name} has no format"
        check_finite(loaded.scales, f"{self._base.folder}: {name}")
        zero = loaded.zeros.astype(np.uint8) if fmt.grid == "zero_point" else None
        return Quantized(loaded.codes, Grid(loaded.scales, zero=zero))

    def _origin(self, name: str) -> Origin:
        packing, layer = self.packing, name.removesuffix(".weight")
        kind = f"{packing.method.upper()} {packing.bits} bits"
        dtype, (_, k) = self._base.dtype(f"{layer}.scales"), self.shape(name)
        zeros = self._zeros(layer)
        least, most = int(zeros.min()), int(zeros.max())
        group: Group = packing.group if packing.group != "row" and packing.group < k else "row"
        try:
            if least == most < 2**packing.bits:
                exact = WeightFormat(packing.bits, dtype, group, zero=least)
            else:
                exact = WeightFormat(packing.bits, dtype, group, grid="zero_point")
        except SchemeError as err:
            near = WeightFormat(packing.bits, dtype, 32, grid="asymmetric")
            return Origin(kind, None, near, str(err))
        if most >= 2**packing.bits:
            return Origin(kind, None, exact, f"a zero point of {most} is no code")
        if not self._in_runs(layer):
            return Origin(kind, None, exact, "g_idx: its groups are not runs of columns")
        return Origin(kind, exact)

    def _in_runs(self, layer: str) -> bool:
        _, k = self._shapes[f"{layer}.weight"]
        size = k if self.packing.group == "row" else self.packing.group
        return bool((self._groups(layer) == np.arange(k) // size).all())

    def _load(self, name: str) -> _Loaded:
        """A weight unpacked; the last one is kept, since rows are read block by block."""
        with self._lock:
            if self._last is None or self._last[0] != name:
                layer = name.removesuffix(".weight")
                scales = np.ascontiguousarray(self._base.read(f"{layer}.scales").T)
                loaded = _Loaded(
                    self._codes(layer), self._zeros(layer), scales, self._groups(layer)
                )
                self._last = name, loaded
            return self._last[1]

    def _codes(self, layer: str) -> Array:
        """uint8[n, k]."""
        words = self._words(f"{layer}.qweight")
        if self.packing.method == "awq":
            return np.ascontiguousarray(_awq_codes(words).T)
        _, k = self._shapes[f"{layer}.weight"]
        return unpack_stream(np.ascontiguousarray(words.T), self.packing.bits, k)

    def _zeros(self, layer: str) -> Array:
        """int16[n, G], as the formula has them."""
        words = self._words(f"{layer}.qzeros")
        if self.packing.method == "awq":
            codes = _awq_codes(words)
        else:
            codes = unpack_stream(words, self.packing.bits, self._shapes[f"{layer}.weight"][0])
        return np.ascontiguousarray(codes.T.astype(np.int16) + self.packing.zero_offset)

    def _groups(self, layer: str) -> Array:
        """int[k]: the group of each column."""
        _, k = self._shapes[f"{layer}.weight"]
        if f"{layer}.g_idx" not in self._base:
            size = k if self.packing.group == "row" else self.packing.group
            return np.arange(k) // size
        groups = self._words(f"{layer}.g_idx").view(np.int32)
        count = self._base.shape(f"{layer}.scales")[0]
        if groups.min() < 0 or groups.max() >= count:
            self._bad(f"{layer}.g_idx", f"names groups {groups.min()} to {groups.max()} of {count}")
        return groups

    def _words(self, name: str) -> Array:
        """An int32 tensor as uint32[*shape]."""
        shape = self._base.shape(name)
        return self._base.read_words(name).view(np.uint32).reshape(shape)

    def _check(self, layer: str) -> tuple[int, int]:
        """Check shapes and dtypes of a layer's tensors; returns (n, k)."""
        base, bits = self._base, self.packing.bits
        for part in ("qweight", "qzeros", "scales"):
            if f"{layer}.{part}" not in base:
                self._bad(f"{layer}.{part}", "is missing")
        for part in ("qweight", "qzeros", "g_idx"):
            name = f"{layer}.{part}"
            if name in base and base.dtype(name) != "I32":
                self._bad(name, f"has dtype {base.dtype(name)}, it must be I32")
        if base.dtype(f"{layer}.scales") not in ITEMSIZE:
            self._bad(f"{layer}.scales", f"has dtype {base.dtype(f'{layer}.scales')}")
        shape = base.shape(f"{layer}.qweight")
        if len(shape) != 2 or 0 in shape:
            self._bad(f"{layer}.qweight", f"has shape {list(shape)}")
        awq = self.packing.method == "awq"
        n, k = (shape[1] * 8, shape[0]) if awq else (shape[1], shape[0] * 32 // bits)
        groups = 1 if self.packing.group == "row" else math.ceil(k / self.packing.group)
        wanted: dict[str, tuple[int, ...]] = {
            "qzeros": (groups, math.ceil(n * bits / 32)),
            "scales": (groups, n),
            "g_idx": (k,),
        }
        for part, expected in wanted.items():
            name = f"{layer}.{part}"
            if name in base and base.shape(name) != expected:
                self._bad(
                    name,
                    f"has shape {list(base.shape(name))}, {self.packing.name} of a weight "
                    f"[{n}, {k}] has {list(expected)}",
                )
        return n, k

    def _bad(self, name: str, what: str) -> NoReturn:
        raise QccError(
            f"{self._base.folder}: tensor {name!r} {what}; quantization_config and the weights "
            "belong to different models, or the download is incomplete"
        )


def _awq_codes(words: Array) -> Array:
    """uint32[m, n/8] -> uint8[m, n] in AutoAWQ's order of a word's codes."""
    codes = np.empty((words.shape[0], words.shape[1] * 8), np.uint8)
    for e in range(8):
        codes[:, e::8] = (words >> np.uint32(((e % 2) * 4 + e // 2) * 4)) & np.uint32(15)
    return codes
