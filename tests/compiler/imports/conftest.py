"""Fixtures that write what other tools write, from their formulas and the gguf package's writer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "gpt_neox": "gptneox"}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "gpt_neox.embed_in": "token_embd",
    "gpt_neox.final_layer_norm": "output_norm",
    "embed_out": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "attention.query_key_value": "attn_qkv",
    "attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor."""
    stem, kind = name.rsplit(".", 1)
    if ".layers." not in stem:
        return f"{NAMES[stem]}.{kind}"
    layer, rest = stem.split(".layers.")[1].split(".", 1)
    return f"blk.{layer}.{NAMES[rest]}.{kind}"


def permuted(name: str, tensor: Any, config: dict[str, Any]) -> Any:
    """Rows as llama.cpp's converter puts them: rotary pairs together, fused rows by kind."""
    heads = config["num_attention_heads"]
    if config["model_type"] in ("llama", "mistral") and "self_attn.q_proj" in name:
        split = tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:])
        return split.swapaxes(1, 2).reshape(tensor.shape)
    if config["model_type"] in ("llama", "mistral") and "self_attn.k_proj" in name:
        kv_heads = config["num_key_value_heads"]
        split = tensor.reshape(kv_heads, 2, len(tensor) // kv_heads // 2, *tensor.shape[1:])
        return split.swapaxes(1, 2).reshape(tensor.shape)
    if "query_key_value" in name:
        split = tensor.reshape(heads, 3, len(tensor) // heads // 3, *tensor.shape[1:])
        return np.concatenate([split[:, i].reshape(-1, *tensor.shape[1:]) for i in range(3)])
    return tensor


# Of a K-quant's block: where d and dmin lie, the mean code, by which random weights have the mean
# 0, and how large they are where d is 1.
K_NUMBERS = {
    "Q2_K": (80, 82, 1.5, 14),
    "Q3_K": (108, None, 0, 40),
    "Q4_K": (0, 2, 7.5, 240),
    "Q5_K": (0, 2, 15.5, 490),
    "Q6_K": (208, None, 0, 1400),
}


def k_blocks(rng: Any, kind: str, shape: tuple[int, int], spread: float = 0.02) -> Any:
    """Random blocks of a K-quant, uint8[n, bytes], whose weights are about `spread` large."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    data = rng.integers(0, 256, (shape[0] * (shape[1] // block), size), dtype=np.uint8)
    place, second, mean, typical = K_NUMBERS[kind]
    numbers = rng.uniform(0.5, 1, (len(data), 1)) * spread / typical
    data[:, place : place + 2] = numbers.astype(np.float16).view(np.uint8)
    if second is not None:
        data[:, second : second + 2] = (mean * numbers).astype(np.float16).view(np.uint8)
    return data.reshape(shape[0], -1)


def add_tokenizer(writer: Any, folder: Path, scores: dict[str, float] | None = None) -> None:
    """tokenizer.ggml.* of a folder's tokenizer.json, as llama.cpp's converter has them."""
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    model = raw["model"]
    special = {item["content"]: item["special"] for item in raw["added_tokens"]}
    ids = {**model["vocab"], **{item["content"]: item["id"] for item in raw["added_tokens"]}}
    tokens = sorted(ids, key=lambda text: ids[text])
    assert [ids[text] for text in tokens] == list(range(len(tokens)))
    kinds = []
    for text in tokens:
        if text == model["unk_token"]:
            kinds.append(2)
        elif text in special:
            kinds.append(3 if special[text] else 4)
        else:
            byte = model["byte_fallback"] and len(text) == 6 and text.startswith("<0x")
            kinds.append(6 if byte else 1)
    spm = model["byte_fallback"]
    writer.add_tokenizer_model("llama" if spm else "gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if spm:
        writer.add_token_scores([(scores or {}).get(text, 0.0) for text in tokens])
    else:
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        if merges:  # the package writes no empty list
            writer.add_token_merges(merges)
    for key, add in (
        ("bos_token", writer.add_bos_token_id),
        ("eos_token", writer.add_eos_token_id),
        ("unk_token", writer.add_unk_token_id),
    ):
        if settings.get(key) in ids:
            add(ids[settings[key]])
    if "add_bos_token" in settings:
        writer.add_add_bos_token(settings["add_bos_token"])
    if "chat_template" in settings:
        writer.add_chat_template(settings["chat_template"])


@pytest.fixture(scope="session")
def write_gguf() -> Callable[..., dict[str, Any]]:
    """write_gguf(folder, path, kind_of, ...): a checkpoint folder as a .gguf file.

    `kind_of(name, tensor)` says the ggml type of each matrix. Returns, by Hugging Face name, what
    the gguf package dequantizes the tensors to, before rows are permuted.
    """
    import gguf
    from safetensors.numpy import load_file

    def write(
        folder: Path,
        path: Path,
        kind_of: Callable[[str, Any], str],
        metadata: dict[str, float | str | int] | None = None,
        scores: dict[str, float] | None = None,
        extra: dict[str, Any] | None = None,
        file_type: int | None = None,
    ) -> dict[str, Any]:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        arch = ARCHITECTURES[config["model_type"]]
        writer = gguf.GGUFWriter(path, arch)
        writer.add_name("test")
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_vocab_size(config["vocab_size"])
        heads = config["num_attention_heads"]
        writer.add_head_count(heads)
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        rope = config.get("rope_parameters") or {}
        theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
        if arch == "gptneox":
            share = rope.get("partial_rotary_factor", config.get("rotary_pct", 0.25))
            writer.add_rope_dimension_count(int(share * head_dim))
            writer.add_parallel_residual(config["use_parallel_residual"])
            writer.add_layer_norm_eps(config["layer_norm_eps"])
        else:
            writer.add_head_count_kv(config["num_key_value_heads"])
            writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
            writer.add_rope_freq_base(theta)
        if config.get("head_dim"):
            writer.add_key_length(head_dim)
            writer.add_value_length(head_dim)
        if arch == "llama":
            writer.add_rope_dimension_count(head_dim)
        if config.get("sliding_window") and config["model_type"] == "mistral":
            writer.add_sliding_window(config["sliding_window"])
        if file_type is not None:
            writer.add_file_type(file_type)
        for key, value in (metadata or {}).items():
            add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
            add[type(value)](f"{arch}.{key}", value)
        add_tokenizer(writer, folder, scores)
        numbers = {}
        for name, tensor in load_file(folder / "model.safetensors").items():
            if name in ("lm_head.weight", "embed_out.weight") and config["tie_word_embeddings"]:
                continue
            if tensor.ndim == 1:
                ordered = permuted(name, tensor, config)
                writer.add_tensor(gguf_name(name), ordered.astype(np.float32))
                numbers[name] = tensor
                continue
            kind = gguf.GGMLQuantizationType[kind_of(name, tensor)]
            if kind.name in K_NUMBERS:  # which the package does not quantize to
                spread = float(tensor.std())
                data = k_blocks(
                    np.random.default_rng(len(numbers)), kind.name, tensor.shape, spread
                )
            else:
                data = gguf.quantize(tensor, kind)
            raw = None if kind.name in ("F32", "F16") else kind
            # A row is quantized apart from others: permuting rows may come after.
            writer.add_tensor(gguf_name(name), permuted(name, data, config), raw_dtype=raw)
            numbers[name] = gguf.dequantize(data, kind)
        for name, data in (extra or {}).items():
            writer.add_tensor(name, data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return numbers

    return write
