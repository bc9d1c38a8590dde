"""llama.cpp's architectures, tensor names and row order -> Hugging Face's.

llama.cpp's converter writes q and k of a Llama with the two halves of each head's rotary pairs
interleaved (row 2i and 2i+1 rotate together), and sorts GPT-NeoX's fused rows (head, qkv) into
(qkv, head). `row_order` says from which row of the file a row of the checkpoint comes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Order = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Naming:
    """How an architecture's tensors are called: outer names, and those of a layer.

    `order` maps a layer's name to the key of the number of heads by which its rows are permuted,
    and to the permutation.
    """

    outer: dict[str, str]
    layer: str  # Hugging Face's prefix of a layer, with {} for its index
    inner: dict[str, str]
    order: dict[str, tuple[str, Callable[[int, int], Order]]]

    def hugging_face(self, name: str) -> str | None:
        """The name of a tensor `blk.3.attn_q.weight`; None: not one of this architecture's."""
        stem, _, kind = name.rpartition(".")
        if kind not in ("weight", "bias"):
            return None
        if stem in self.outer:
            return f"{self.outer[stem]}.{kind}"
        block, _, rest = stem.removeprefix("blk.").partition(".")
        if not stem.startswith("blk.") or not block.isdecimal() or rest not in self.inner:
            return None
        return f"{self.layer.format(int(block))}.{self.inner[rest]}.{kind}"

    def row_order(self, name: str, rows: int, heads: dict[str, int]) -> Order | None:
        """Rows of the file in the order of the checkpoint; None: as they are."""
        part = name.rpartition(".")[0].rpartition(".")[2]
        if part not in self.order:
            return None
        key, permutation = self.order[part]
        return permutation(rows, heads[key])


def _pairs(rows: int, heads: int) -> Order:
    """(head, pair, half) -> (head, half, pair)."""
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _fused(rows: int, heads: int) -> Order:
    """(qkv, head, dimension) -> (head, qkv, dimension)."""
    return np.arange(rows).reshape(3, heads, -1).swapaxes(0, 1).reshape(-1)


_LLAMA_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_LLAMA_OUTER |= {"output": "lm_head"}
_LLAMA_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NEOX_INNER = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "attention.query_key_value",
    "attn_output": "attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_NEOX_OUTER = {
    "token_embd": "gpt_neox.embed_in",
    "output_norm": "gpt_neox.final_layer_norm",
    "output": "embed_out",
}

NAMINGS: dict[str, Naming] = {
    "llama": Naming(
        _LLAMA_OUTER,
        "model.layers.{}",
        _LLAMA_INNER,
        {"attn_q": ("head_count", _pairs), "attn_k": ("head_count_kv", _pairs)},
    ),
    "qwen2": Naming(_LLAMA_OUTER, "model.layers.{}", _LLAMA_INNER, {}),
    "gptneox": Naming(
        _NEOX_OUTER, "gpt_neox.layers.{}", _NEOX_INNER, {"attn_qkv": ("head_count", _fused)}
    ),
}
# What llama.cpp computes at load, or holds for itself: not weights.
AUXILIARY = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def heads_of(metadata: dict[str, Any], architecture: str) -> dict[str, Any]:
    """The numbers of heads of a file, unchecked; a list has one for each layer."""
    found: dict[str, Any] = {}
    for key in ("head_count", "head_count_kv"):
        value = metadata.get(f"{architecture}.attention.{key}")
        value = found.get("head_count") if value is None else value
        found[key] = value[0] if isinstance(value, list) and len(set(value)) == 1 else value
    return found
