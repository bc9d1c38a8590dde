"""An independent reading of the weight formats: by the text of CONTRACTS.md, in plain numpy.

Nothing here comes from qcc: the packer computes in f64 and rounds each step to the model dtype, the
reader follows tensor-cache.json and unpacks code by code.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest


@dataclass(frozen=True)
class Format:
    """A row of the table of CONTRACTS section 1; bits None: floating."""

    bits: int | None
    group: int
    dtype: str
    transposed: bool = False  # KN
    tables: bool = True  # embedding and lm_head quantized


CONTRACT = {
    "q0f32": Format(None, 0, "float32"),
    "q0f16": Format(None, 0, "float16"),
    "q0bf16": Format(None, 0, "bfloat16"),
    "q3f16_0": Format(3, 40, "float16", transposed=True),
    "q3f16_1": Format(3, 40, "float16"),
    "q4f16_0": Format(4, 32, "float16", transposed=True),
    "q4f16_1": Format(4, 32, "float16"),
    "q4f16_2": Format(4, 32, "float16", tables=False),
    "q4f32_1": Format(4, 32, "float32"),
    "q4bf16_0": Format(4, 32, "bfloat16", transposed=True),
    "q4bf16_1": Format(4, 32, "bfloat16"),
    "q8f16_1": Format(8, 32, "float16"),
    "q8f32_1": Format(8, 32, "float32"),
}


def round_to(x: Any, dtype: str) -> Any:
    """Round f64 to the nearest number of `dtype`, ties to even; the result is f64 again."""
    if dtype != "bfloat16":
        return x.astype(dtype).astype(np.float64)
    bits = x.astype(np.float32).view(np.uint32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(np.float64)


def pack(w: Any, fmt: Format) -> tuple[Any, Any]:
    """Weights [n, k] -> (words uint32[n, ...], scales f64[n, groups]), not transposed."""
    assert fmt.bits is not None
    n, k = w.shape
    groups = -(-k // fmt.group)
    padded = np.zeros((n, groups * fmt.group))
    padded[:, :k] = round_to(w.astype(np.float64), fmt.dtype)
    grouped = padded.reshape(n, groups, fmt.group)
    top = 2 ** (fmt.bits - 1) - 1
    scale = round_to(np.abs(grouped).max(axis=2) / top, fmt.dtype)  # [n, groups]
    divisor = np.where(scale == 0, 1, scale)[:, :, None]
    t = round_to(grouped / divisor, fmt.dtype)
    codes = np.clip(np.rint(round_to(t + top, fmt.dtype)), 0, 2 * top)
    codes = np.where(scale[:, :, None] == 0, 0, codes).reshape(n, -1)
    codes[:, k:] = 0
    each = 32 // fmt.bits
    words = np.zeros((n, codes.shape[1] // each), np.uint32)
    for j in range(words.shape[1]):
        for e in range(each):
            words[:, j] |= codes[:, j * each + e].astype(np.uint32) << np.uint32(e * fmt.bits)
    return words, scale


def unpack(words: Any, scale: Any, fmt: Format, k: int) -> Any:
    """w' = (q - M) * s as f32[n, k], from arrays that are not transposed."""
    assert fmt.bits is not None
    each, top = 32 // fmt.bits, 2 ** (fmt.bits - 1) - 1
    w = np.empty((words.shape[0], k))
    for i in range(k):
        q = (words[:, i // each] >> np.uint32(i % each * fmt.bits)) & np.uint32(2**fmt.bits - 1)
        w[:, i] = (q.astype(np.float64) - top) * scale[:, i // fmt.group]
    return w.astype(np.float32)


def read_tensors(folder: Path) -> dict[str, Any]:
    """Every stored tensor of an artifact; floats as f64, checksums and sizes compared."""
    cache = json.loads((folder / "tensor-cache.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = {}
    for shard in cache["records"]:
        assert shard["format"] == "raw-shard"
        data = (folder / shard["dataPath"]).read_bytes()
        assert len(data) == shard["nbytes"]
        assert hashlib.md5(data).hexdigest() == shard["md5sum"]
        for record in shard["records"]:
            assert record["format"] == "raw"
            part = data[record["byteOffset"] : record["byteOffset"] + record["nbytes"]]
            kind = {"bfloat16": "<u2", "uint32": "<u4", "float16": "<f2", "float32": "<f4"}
            array = np.frombuffer(part, kind[record["dtype"]]).reshape(record["shape"])
            if record["dtype"] == "bfloat16":
                array = (array.astype(np.uint32) << 16).view(np.float32)
            found[record["name"]] = array if record["dtype"] == "uint32" else array.astype("f8")
    return found


def is_table(name: str) -> bool:
    """The embedding or lm_head."""
    return any(part in name for part in ("embed_tokens", "lm_head", "embed_in", "embed_out"))


def stored_transposed(name: str, fmt: Format) -> bool:
    """A KN scheme stores all but the embedding transposed: its rows are looked up."""
    return fmt.transposed and not any(part in name for part in ("embed_tokens", "embed_in"))


def dequantized(folder: Path, fmt: Format, widths: dict[str, int]) -> dict[str, Any]:
    """Our parameter names -> weights f32; `widths` names each quantized weight's in-dimension."""
    stored = read_tensors(folder)
    weights = {}
    for name, array in stored.items():
        if name.endswith(".q_weight"):
            weight = name.removesuffix("q_weight") + "weight"
            scale = stored[name.removesuffix("q_weight") + "q_scale"]
            words = array
            if stored_transposed(name, fmt):
                words, scale = words.T, scale.T
            weights[weight] = unpack(words, scale, fmt, widths[weight])
        elif not name.endswith(".q_scale"):
            weights[name] = array.astype(np.float32)
    return weights


def parts_of(name: str, config: Any) -> list[tuple[str, Any]]:
    """(Hugging Face's name, its rows in ours) of one of our parameters."""
    heads = config.num_attention_heads
    if name == "embed_out.weight":
        return [("lm_head.weight", slice(None))]  # what newer transformers call it in memory
    if "qkv_proj" in name and config.model_type == "gpt_neox":
        size = config.hidden_size // heads
        rows = np.arange(3 * heads * size).reshape(3, heads, size).swapaxes(0, 1)
        return [(name.replace("qkv_proj", "query_key_value"), rows.reshape(-1))]
    if "qkv_proj" in name:
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        q, kv = heads * size, config.num_key_value_heads * size
        bounds = {"q_proj": (0, q), "k_proj": (q, q + kv), "v_proj": (q + kv, q + 2 * kv)}
        return [(name.replace("qkv_proj", part), slice(*b)) for part, b in bounds.items()]
    if "gate_up_proj" in name:
        half = config.intermediate_size
        bounds = {"gate_proj": (0, half), "up_proj": (half, 2 * half)}
        return [(name.replace("gate_up_proj", part), slice(*b)) for part, b in bounds.items()]
    return [(name, slice(None))]


def float_weights(model: Any, names: list[str]) -> dict[str, Any]:
    """transformers' weights under our names, f32: the source of a conversion."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    weights = {}
    for name in names:
        parts = parts_of(name, model.config)
        if isinstance(parts[0][1], np.ndarray):
            whole = np.empty_like(state[parts[0][0]])
            source = state[parts[0][0]]
            whole[parts[0][1]] = source
        else:
            whole = np.concatenate([state[part] for part, _ in parts])
        weights[name] = whole
    return weights


def with_weights(model: Any, weights: dict[str, Any]) -> Any:
    """A copy of transformers' model that computes with our weights; every parameter is replaced."""
    import torch

    changed = copy.deepcopy(model)
    left = {name for name, _ in changed.named_parameters()}
    state = changed.state_dict()
    with torch.no_grad():
        for name, weight in weights.items():
            for part, rows in parts_of(name, model.config):
                state[part].copy_(torch.from_numpy(np.ascontiguousarray(weight[rows])))
                left.discard(part)
    assert not left, f"not in the artifact: {left}"
    return changed


@pytest.fixture(scope="session")
def contract() -> SimpleNamespace:
    """The functions above."""
    return SimpleNamespace(
        formats=CONTRACT,
        pack=pack,
        round_to=round_to,
        read_tensors=read_tensors,
        is_table=is_table,
        stored_transposed=stored_transposed,
        dequantized=dequantized,
        float_weights=float_weights,
        with_weights=with_weights,
    )


@pytest.fixture(scope="session")
def on_our_weights(contract: Any, hugging_face: Any) -> Callable[[Any, Path, str], Any]:
    """on_our_weights(artifact folder, checkpoint, scheme): transformers' model, our weights."""

    def make(artifact: Path, checkpoint: Path, scheme: str) -> Any:
        model = hugging_face(checkpoint)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        widths = {}
        for name in contract.read_tensors(artifact):
            if name.endswith(".q_weight"):
                weight = name.removesuffix("q_weight") + "weight"
                widths[weight] = int(shapes[parts_of(weight, model.config)[0][0]][1])
        weights = contract.dequantized(artifact, contract.formats[scheme], widths)
        return contract.with_weights(model, weights)

    return make
