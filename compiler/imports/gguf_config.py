"""A .gguf file's metadata -> config.json and generation_config.json.

A key of the architecture's own that is neither read nor known to be harmless is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from qcc.compiler.config import shown
from qcc.compiler.imports.gguf_header import Header
from qcc.compiler.maxima import INT32_MAX
from qcc.quant_schemes.packing import Array
from qcc.runtime.errors import QccError

# The sizes of every architecture: llama.cpp's key -> Hugging Face's.
_SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
_HF = {
    "llama": ("LlamaForCausalLM", "llama", "silu"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2", "silu"),
    "gptneox": ("GPTNeoXForCausalLM", "gpt_neox", "gelu"),
}
# Of how the model was trained, or of what is computed from other keys.
_HARMLESS = frozenset(
    ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "pooling_type")
)
# May be written down as off.
_OFF: dict[str, tuple[object, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "logit_scale": (1.0, 0.0),
}
# Llama 3.1's: rope_freqs.weight holds what they make, not them.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_LENGTHS = (8192, 4096, 16384, 32768, 2048)


class _Metadata:
    """Reads the keys of one architecture, and remembers which."""

    def __init__(self, path: Path, architecture: str, raw: Mapping[str, Any]) -> None:
        self.path, self.prefix, self.raw = path, f"{architecture}.", raw
        self.read: set[str] = set()

    def bad(self, key: str, what: str) -> NoReturn:
        value = shown(self.raw.get(self.prefix + key))
        raise QccError(f"{self.path}: {self.prefix}{key} is {value}, {what}")

    def get(self, key: str) -> Any:
        self.read.add(key)
        value = self.raw.get(self.prefix + key)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            return value[0]  # one for each layer, all the same
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value <= INT32_MAX:
            self.bad(key, "it must be a whole number > 0 (the same for every layer)")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, (int, float)) or not 0 < value < 1e30:
            self.bad(key, "it must be a positive number")
        # f32 as it was written: 9.999999747378752e-06 was 1e-05.
        return float(str(np.float32(value)))

    def finish(self) -> None:
        """Refuse what was not read."""
        for full, value in self.raw.items():
            key = full.removeprefix(self.prefix)
            if key == full or key in self.read or key in _HARMLESS or value in _OFF.get(key, ()):
                continue
            self.bad(key, "a key that is not known; it may change the numbers, so it is refused")


def config_of(header: Header, path: Path, rope_factors: Array | None) -> dict[str, Any]:
    """config.json of a file.

    Args:
        header: of its first part.
        path: for errors.
        rope_factors: rope_freqs.weight, f32[rotary_dim / 2], where there is one.

    Raises:
        QccError: a key is missing, absurd or unknown.
    """
    raw = header.metadata
    architecture = raw["general.architecture"]
    meta = _Metadata(path, architecture, raw)
    class_name, model_type, act = _HF[architecture]
    config: dict[str, Any] = {"architectures": [class_name], "model_type": model_type}
    config |= {"hidden_act": act, **{ours: meta.integer(key) for key, ours in _SIZES.items()}}
    heads = config["num_attention_heads"]
    head_dim = meta.integer("attention.key_length", max(config["hidden_size"] // heads, 1))
    if meta.integer("attention.value_length", head_dim) != head_dim:
        meta.bad("attention.value_length", f"keys have {head_dim}; both must be the same")
    rotary = meta.integer("rope.dimension_count", head_dim)
    theta = meta.number("rope.freq_base", 10000.0)
    kv_heads = meta.integer("attention.head_count_kv", heads)
    names = {name.rpartition(".")[0].rpartition(".")[2] for name in _biases(header)}
    if architecture == "gptneox":
        if kv_heads != heads or head_dim * heads != config["hidden_size"]:
            meta.bad("attention.head_count_kv", "GPT-NeoX has as many key as query heads")
        config["layer_norm_eps"] = meta.number("attention.layer_norm_epsilon", 1e-5)
        parallel = meta.get("use_parallel_residual")
        config["use_parallel_residual"] = True if parallel is None else bool(parallel)
        config |= {"rotary_emb_base": theta, "rotary_pct": rotary / head_dim}
        config["attention_bias"] = "attn_qkv" in names
    else:
        if rotary != head_dim:
            meta.bad("rope.dimension_count", f"heads have {head_dim} dimensions; all must rotate")
        config |= {"num_key_value_heads": kv_heads, "head_dim": head_dim, "rope_theta": theta}
        config["rms_norm_eps"] = meta.number("attention.layer_norm_rms_epsilon")
    if architecture == "llama":
        config |= _llama_switches(meta, names, config["max_position_embeddings"])
    scaling = _rope_scaling(meta, config["max_position_embeddings"], theta, rotary, rope_factors)
    if scaling:
        config["rope_scaling"] = scaling
    # An untied lm_head is a tensor of its own.
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise QccError(f"{path}: it has no matrix token_embd.weight; is it the first part?")
    config["vocab_size"] = embedding.shape[0]
    meta.finish()
    return config


def _biases(header: Header) -> list[str]:
    return [name for name in header.tensors if name.endswith(".bias")]


def _llama_switches(meta: _Metadata, biased: set[str], length: int) -> dict[str, Any]:
    """What a llama file says by its tensors, and a window, by which it was a Mistral."""
    window = meta.get("attention.sliding_window")
    if window is not None and window != 0:
        width = meta.integer("attention.sliding_window")
        if width < length:
            mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
            return {**mistral, "sliding_window": width}
    return {"attention_bias": "attn_q" in biased, "mlp_bias": "ffn_down" in biased}


def _rope_scaling(
    meta: _Metadata, length: int, theta: float, rotary: int, factors: Array | None
) -> dict[str, Any] | None:
    """rope_scaling of config.json; None: none."""
    kind = meta.get("rope.scaling.type")
    original = meta.get("rope.scaling.original_context_length")
    if original is not None:
        original = meta.integer("rope.scaling.original_context_length")
    old = meta.get("rope.scale_linear")
    if kind is None and old is not None:
        kind, factor = "linear", meta.number("rope.scale_linear")
    else:
        factor = meta.number("rope.scaling.factor", 1.0)
    if factors is not None and not np.all(factors == 1):
        if kind not in (None, "none"):
            meta.bad("rope.scaling.type", "beside rope_freqs.weight, which scales as well")
        return _llama3(meta, theta, rotary, factors, original)
    if kind in (None, "none") or (kind == "linear" and factor == 1):
        return None
    if kind not in ("linear", "yarn"):
        meta.bad("rope.scaling.type", "supported: none, linear, yarn")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        for key, ours in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            if meta.get(f"rope.scaling.{key}") is not None:
                scaling[ours] = meta.number(f"rope.scaling.{key}")
        scaling["original_max_position_embeddings"] = original or length
    return scaling


def _llama3(
    meta: _Metadata, theta: float, rotary: int, factors: Array, original: int | None
) -> dict[str, Any]:
    """Llama 3.1's scaling whose factors are those of rope_freqs.weight."""
    wanted = factors.astype(np.float64).reshape(-1)
    if len(wanted) == rotary // 2 and np.isfinite(wanted).all():
        frequency = theta ** -(np.arange(0, rotary, 2) / rotary)
        factor = float(f"{wanted.max():.6g}")
        for length in (original,) if original else _LLAMA3_LENGTHS:
            turns = length * frequency / (2 * math.pi)
            low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
            smooth = np.clip((turns - low) / (high - low), 0, 1)
            if np.allclose(1 / ((1 - smooth) / factor + smooth), wanted, rtol=1e-4, atol=0):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    **_LLAMA3,
                    "original_max_position_embeddings": length,
                }
    raise QccError(
        f"{meta.path}: the factors of rope_freqs.weight are not those of Llama 3's rope scaling; "
        "compile the Hugging Face checkpoint that the file was made from"
    )


def generation_config(header: Header) -> dict[str, Any]:
    """Token ids that begin and end texts: end of text, of a turn and of a message alike."""
    ids = {
        name: header.metadata.get(f"tokenizer.ggml.{name}_token_id")
        for name in ("bos", "eos", "eot", "eom", "padding")
    }
    ids = {name: value for name, value in ids.items() if type(value) is int and value >= 0}
    ends = list(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if name in ids))
    found: dict[str, Any] = {"bos_token_id": ids.get("bos"), "pad_token_id": ids.get("padding")}
    found["eos_token_id"] = ends[0] if len(ends) == 1 else ends or None
    return {key: value for key, value in found.items() if value is not None}
