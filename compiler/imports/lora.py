"""A PEFT LoRA adapter merged into a checkpoint while it is read: W + scale * B A.

The folder holds adapter_config.json and adapter_model.safetensors, whose tensors are
    base_model.model.X.lora_A.weight [r, k]    base_model.model.X.lora_B.weight [n, r]
of a linear layer X with weight [n, k]; of an embedding lora_embedding_A [r, n], lora_embedding_B
[k, r] and W + scale * (B A)^T; and base_model.model.X.weight for what modules_to_save replaces.
scale = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora (PEFT's LoraLayer). An option that
would change the numbers in another way is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from qcc.compiler.config import shown
from qcc.compiler.imports.coded_file import CodedFile, Origin
from qcc.compiler.weights.checkpoint import ITEMSIZE, Checkpoint
from qcc.compiler.weights.safetensors_file import SafetensorsFile
from qcc.quant_schemes.errors import did_you_mean
from qcc.quant_schemes.packing import Array, Quantized
from qcc.runtime.errors import QccError
from qcc.runtime.files import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_AGAIN = "save the adapter again with PeftModel.save_pretrained"
# How the adapter was trained or is loaded; what it holds is told by its tensors.
_HARMLESS = frozenset(
    """
    auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules
    inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config lora_dropout
    lora_ga_config megatron_config megatron_core modules_to_save peft_type peft_version
    qalora_group_size revision runtime_config target_modules task_type
    """.split()
)
# fan_in_fan_out tells of layers that store [k, n], which no supported architecture has.
_READ = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"}
# Off in these ways only.
# A key that is neither of these must be off: null, false or empty, `bias` "none".
# What training began from without touching the base: B A = 0 at first.
_STARTS = ("gaussian", "orthogonal", "eva")
_EMBEDDINGS = ("embed_tokens.weight", "embed_in.weight")
_KEY = re.compile(r"(?P<layer>.+)\.(?P<part>lora_(embedding_)?[AB])(\.default)?(\.weight)?")


@dataclass(frozen=True)
class _Delta:
    """What is added to a weight [n, k]: scale * b a, with b [n, r] and a [r, k], f32."""

    a: Array
    b: Array
    scale: float


def with_lora(checkpoint: Checkpoint, folder: Path | str) -> Checkpoint:
    """The checkpoint with an adapter merged into it, in f32; closing it closes the checkpoint.

    Raises:
        QccError: no adapter, one of another base, options or tensors that are not understood.
    """
    file = LoraFile(checkpoint, Path(folder))
    return checkpoint.overlaid(file)


class LoraFile(CodedFile):
    """The tensors that an adapter changes or replaces.

    The adapter's own numbers are kept in memory: r (n + k) for a weight of n k.
    """

    def __init__(self, base: Checkpoint, folder: Path) -> None:
        """Read the adapter and check it against the base."""
        self.path, self._base = folder / WEIGHTS, base
        if not self.path.is_file():
            raise QccError(f"--lora {folder}: it has no {WEIGHTS}; {_AGAIN}")
        config = read_json(folder / CONFIG, _AGAIN)
        _check_options(config, str(folder / CONFIG))
        self._tied = _is_tied(base.folder)
        found = _read_all(self.path)
        self._deltas: dict[str, _Delta] = {}
        self._replaced: dict[str, Array] = {}
        pairs: dict[str, dict[str, Array]] = {}
        for key, numbers in found.items():
            match = _KEY.fullmatch(key)
            if match:
                pairs.setdefault(match["layer"], {})[match["part"]] = numbers
            elif ".lora_" in key:
                raise QccError(f"{self.path}: tensor {key!r} is not supported (DoRA, biases, ...)")
            else:
                # A new embedding is saved as the layer under its adapter.
                self._replace(
                    re.sub(r"\.(modules_to_save\.default|base_layer)\.", ".", key), numbers
                )
        if not found:
            raise QccError(f"{self.path}: it holds no tensors; {_AGAIN}")
        for layer, parts in pairs.items():
            self._add(layer, parts, config)

    @property
    def entries(self) -> Collection[str]:
        """Names of the tensors that the adapter changes."""
        return self._deltas.keys() | self._replaced.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The base's."""
        return self._base.shape(name)

    def dtype(self, name: str) -> str:
        """float32."""
        return "float32"

    def origin(self, name: str) -> Origin:
        """The base's, whose codes no longer hold."""
        own = self._base.origin(name)
        if own is None or (own.format is None and own.near is None):
            return Origin("LoRA")
        near = own.format or own.near
        return Origin(f"{own.kind} + LoRA", None, near, "an adapter is merged into it")

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows of W + scale * B A, computed in f32."""
        k = self.shape(name)[-1]
        if name in self._replaced:
            rows = self._replaced[name].reshape(-1, k)[start:stop]
        else:
            rows = self._base.read_flat(name, start * k, stop * k).reshape(-1, k)
        rows = rows.astype(np.float32)
        delta = self._deltas.get(name)
        if delta is None:
            return rows
        return rows + np.float32(delta.scale) * (delta.b[start:stop] @ delta.a)

    def quantized(self, name: str) -> Quantized:
        """No tensor has a format."""
        raise AssertionError(f"{name} has no format")

    def close(self) -> None:
        """Nothing is open."""

    def _replace(self, key: str, numbers: Array) -> None:
        """Take a tensor for the base's own."""
        name = self._find(key)
        if self._base.shape(name) != numbers.shape:
            self._refuse(name, f"is {list(numbers.shape)}")
        self._replaced[name] = numbers

    def _add(self, layer: str, parts: Mapping[str, Array], config: Mapping[str, Any]) -> None:
        """Take the two factors of a layer."""
        name = self._find(f"{layer}.weight")
        kinds = ("lora_embedding_A", "lora_embedding_B")
        if "lora_embedding_A" not in parts:
            kinds = ("lora_A", "lora_B")
        if set(parts) != set(kinds) or any(part.ndim != 2 for part in parts.values()):
            raise QccError(
                f"{self.path}: layer {layer!r} has {', '.join(sorted(parts))}, needs the matrices "
                f"{' and '.join(kinds)}"
            )
        a, b = (np.ascontiguousarray(parts[kind].astype(np.float32)) for kind in kinds)
        rank, own = len(a), _of_pattern(config, "rank_pattern", layer, config.get("r"))
        if b.shape[1] != rank or own != rank:
            raise QccError(
                f"{self.path}: layer {layer!r} has matrices {list(a.shape)} and {list(b.shape)}, "
                f"{CONFIG} says rank {shown(own)}"
            )
        if kinds[0] == "lora_embedding_A":
            a, b = np.ascontiguousarray(b.T), np.ascontiguousarray(a.T)
        if self._base.shape(name) != (len(b), a.shape[1]):
            self._refuse(name, f"changes a weight {[len(b), a.shape[1]]}")
        alpha = _of_pattern(config, "alpha_pattern", layer, config.get("lora_alpha"))
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < 1e30:
            raise QccError(f"{self.path.with_name(CONFIG)}: lora_alpha is {shown(alpha)}")
        root = math.sqrt(rank) if config.get("use_rslora") else rank
        self._deltas[name] = _Delta(a, b, alpha / root)

    def _find(self, key: str) -> str:
        """The base's name of a tensor that the adapter names."""
        name = key.removeprefix(_PREFIX)
        if name not in self._base:
            hint = did_you_mean(name, self._base.names)
            raise QccError(
                f"{self.path}: it changes {name!r}, which {self._base.folder} does not have{hint}; "
                "the adapter was made for another base"
            )
        if self._tied and name.endswith(_EMBEDDINGS):
            raise QccError(
                f"{self.path}: it changes {name!r}, which is the lm_head as well "
                "(tie_word_embeddings): merge it with PEFT, and untie them, first"
            )
        return name

    def _refuse(self, name: str, what: str) -> NoReturn:
        raise QccError(
            f"{self.path}: for {name!r} it {what}, but {self._base.folder} has "
            f"{list(self._base.shape(name))}; the adapter was made for another base"
        )


def _is_tied(folder: Path) -> bool:
    """Whether config.json says that the lm_head is the embedding."""
    path = folder / "config.json"
    return path.is_file() and read_json(path, _AGAIN).get("tie_word_embeddings") is True


def _of_pattern(config: Mapping[str, Any], key: str, layer: str, default: Any) -> Any:
    """The value of the first pattern that ends the layer's name, as PEFT matches them."""
    patterns = config.get(key) or {}
    name = layer.removeprefix(_PREFIX)
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        except re.error as err:
            raise QccError(f"{CONFIG}: {key}: {shown(pattern)} is no regular expression") from err
    return default


def _check_options(config: Mapping[str, Any], where: str) -> None:
    """Refuse what would change the numbers in a way that is not W + scale * B A."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise QccError(f"{where}: peft_type is {shown(kind)}; only LORA is supported")
    for key, value in config.items():
        off = value in (None, False, {}, []) or (key, value) == ("bias", "none")
        if key not in _HARMLESS and key not in _READ and not off:
            raise QccError(
                f"{where}: {key} = {shown(value)} is not supported; it may change the numbers"
            )
    start = config.get("init_lora_weights", True)
    if not isinstance(start, bool) and start not in _STARTS:
        raise QccError(
            f"{where}: init_lora_weights {shown(start)} changed the base's own weights; convert "
            "the adapter with PEFT (path_initial_model_for_weight_conversion)"
        )


def _read_all(path: Path) -> dict[str, Array]:
    """Every tensor of the adapter."""
    file = SafetensorsFile(path)
    try:
        for name in file.entries:
            if file.dtype(name) not in ITEMSIZE:
                raise QccError(f"{path}: tensor {name!r} has dtype {file.dtype(name)}")
        return {
            name: file.read(
                name, 0, math.prod(entry.shape), np.empty(entry.nbytes, np.uint8)
            ).reshape(entry.shape)
            for name, entry in file.entries.items()
        }
    finally:
        file.close()
