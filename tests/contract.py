"""An independent reading of the weight formats: by the text of CONTRACTS.md, in plain numpy.

Nothing here comes from qcc: the packer computes in f64 and rounds each step to the model dtype, the
reader follows tensor-cache.json and unpacks bit by bit. Formats that are not the contract's are
read by the text of quant_schemes/format.py and packing.py, with the fields that qcc.json names.
"""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


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
    "q5f16_1": Format(5, 32, "float16"),
    "q6f16_1": Format(6, 32, "float16"),
    "q8f16_1": Format(8, 32, "float16"),
    "q8f32_1": Format(8, 32, "float32"),
}


SPARSE = (3, 40)  # bits, group: 10 codes a word, its top bits 0


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
    if (fmt.bits, fmt.group) != SPARSE:
        return dense_words(codes.astype(np.uint8), fmt.bits), scale
    words = np.zeros((n, codes.shape[1] // 10), np.uint32)
    for e in range(10):
        words |= codes[:, e::10].astype(np.uint32) << np.uint32(e * 3)
    return words, scale


def dense_words(codes: Any, bits: int) -> Any:
    """Code i at bits [i*bits, (i+1)*bits) of a row, least significant first; uint32[n, ...]."""
    n, count = codes.shape
    stream = np.zeros((n, -(-count * bits // 32) * 32), np.uint8)
    for i in range(count):
        for bit in range(bits):
            stream[:, i * bits + bit] = codes[:, i] >> bit & 1
    return np.packbits(stream, axis=1, bitorder="little").view("<u4")


def codes_of(words: Any, count: int, bits: int, sparse: bool = False) -> Any:
    """The first `count` codes of each row of words, f64[n, count]."""
    rows = np.ascontiguousarray(words, "<u4").view(np.uint8)
    stream = np.unpackbits(rows, axis=1, bitorder="little").astype(np.float64)
    codes = np.zeros((len(words), count))
    for i in range(count):
        first = i // 10 * 32 + i % 10 * 3 if sparse else i * bits
        codes[:, i] = stream[:, first : first + bits] @ 2.0 ** np.arange(bits)
    return codes


def weights_of(parts: dict[str, Any], fields: dict[str, Any], k: int) -> Any:
    """f32[n, k] of the stored parts of a weight, in f64 until the end.

    Args:
        parts: arrays by suffix, as stored.
        fields: of the format, as qcc.json names them.
        k: columns.
    """
    if fields["layout"] == "KN":
        parts = {suffix: array.T for suffix, array in parts.items()}
    bits, group = fields["bits"], fields["group"]
    size = group if isinstance(group, int) else -(-k // 32) * 32
    groups = -(-k // size)
    q = codes_of(parts["q_weight"], k, bits, (bits, group) == SPARSE)
    column, grid, two = (
        np.arange(k) // size,
        fields.get("grid", "symmetric"),
        fields.get("scale_bits"),
    )

    def numbers(suffix: str, base: int) -> Any:
        """Scales or biases of groups; those of two levels are codes less `base` under a block's."""
        if two is None:
            return parts[suffix]
        codes = codes_of(parts[suffix], groups, two) - base
        return codes * parts[suffix.replace("q_", "q_block_")][:, np.arange(groups) * size // 256]

    if grid == "mxfp4":
        size = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[(q % 8).astype(int)]
        exponents = codes_of(parts["q_scale"], groups, two)[:, column] - 127
        return (np.where(q < 8, size, -size) * 2.0**exponents).astype(np.float32)
    scale = numbers("q_scale", 2 ** (two - 1) if two and grid == "symmetric" else 0)[:, column]
    if grid == "asymmetric":
        return (q * scale + numbers("q_bias", 0)[:, column]).astype(np.float32)
    if grid == "zero_point":
        zero = codes_of(parts["q_zero"], groups, bits)[:, column]
    else:
        zero = fields.get("zero", 2 ** (bits - 1) - 1)
    return ((q - zero) * scale).astype(np.float32)


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


def formats_in(folder: Path) -> dict[str, dict[str, Any]]:
    """Weight -> the fields of its format, as qcc.json names them; the quantized ones."""
    manifest = json.loads((folder / "qcc.json").read_text(encoding="utf-8"))
    return {
        name.removesuffix("q_weight") + "weight": fields
        for name, fields in manifest["tensors"].items()
        if name.endswith(".q_weight")
    }


def contract_fields(name: str, fmt: Format) -> dict[str, Any]:
    """The fields of a contract's format for a weight."""
    layout = "KN" if stored_transposed(name, fmt) else "NK"
    return {"bits": fmt.bits, "group": fmt.group, "layout": layout}


def dequantized(folder: Path, fmt: Format | None, widths: dict[str, int]) -> dict[str, Any]:
    """Our parameter names -> weights f32.

    `widths` names each quantized weight's in-dimension. `fmt` None: as qcc.json says.
    """
    stored = read_tensors(folder)
    written = formats_in(folder)
    weights = {}
    for name, array in stored.items():
        prefix, _, suffix = name.rpartition(".")
        weight = f"{prefix}.weight"
        if suffix == "q_weight":
            parts = {
                key.removeprefix(f"{prefix}."): value
                for key, value in stored.items()
                if key.startswith(f"{prefix}.q_")
            }
            fields = written[weight] if fmt is None else contract_fields(weight, fmt)
            weights[weight] = weights_of(parts, fields, widths[weight])
        elif not suffix.startswith("q_"):
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
