"""Llama 2 and 3.x, and the decoder that Mistral and Qwen2 share."""

from __future__ import annotations

from typing import Any

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache

from qcc.compiler.config import ConfigReader, ModelConfig, attention_heads
from qcc.compiler.models.architecture import Architecture, WeightSource, stacked
from qcc.compiler.models.blocks import (
    ACTIVATIONS,
    Attention,
    CausalLM,
    GatedMLP,
    Names,
    RMSNorm,
)
from qcc.compiler.models.rope import rope_from_hf

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def read_common(
    reader: ConfigReader,
    model_type: str,
    *,
    default_positions: int,
    default_kv_heads: int | None = None,
    **switches: Any,
) -> ModelConfig:
    """The fields that Llama and its relatives share; `switches` are those that differ.

    The defaults are those of transformers' config class of `model_type`.
    """
    hidden, heads, kv_heads, head_dim = attention_heads(reader, default_kv_heads)
    positions = reader.integer("max_position_embeddings", default_positions)
    config = ModelConfig(
        model_type=model_type,
        hidden_size=hidden,
        intermediate_size=reader.integer("intermediate_size"),
        num_hidden_layers=reader.integer("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=reader.integer("vocab_size"),
        max_position_embeddings=positions,
        norm_eps=reader.number("rms_norm_eps", 1e-6),
        hidden_act=reader.choice("hidden_act", ACTIVATIONS, "silu"),
        tie_word_embeddings=reader.flag("tie_word_embeddings", False),
        rope=rope_from_hf(reader, head_dim, positions),
        **switches,
    )
    reader.finish()
    return config


def read_config(raw: dict[str, Any], where: str) -> ModelConfig:
    """config.json of a LlamaForCausalLM."""
    reader = ConfigReader(raw, where)
    bias = reader.flag("attention_bias", False)
    return read_common(
        reader,
        "llama",
        default_positions=2048,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=reader.flag("mlp_bias", False),
    )


class DecoderLayer(nn.Module):  # type: ignore[misc]
    """Pre-norm attention and gated MLP, each with a residual."""

    def __init__(self, config: ModelConfig) -> None:
        """Make the parts under Hugging Face's names."""
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = GatedMLP(config)

    def forward(self, x: nn.Tensor, kv: PagedKVCache, layer: int) -> nn.Tensor:
        """x [b, s, h] -> [b, s, h]."""
        x = x + self.self_attn(self.input_layernorm(x), kv, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


def build(config: ModelConfig) -> CausalLM:
    """The float model."""
    return CausalLM(config, DecoderLayer, RMSNorm, Names())


def source(config: ModelConfig, name: str, shape: tuple[int, ...]) -> WeightSource:
    """Fused projections are stacked from Hugging Face's; all other names are the same."""
    return stacked(config, name, shape, FUSED)


ARCHITECTURE = Architecture(
    model_type="llama",
    hf_names=("LlamaForCausalLM",),
    description="Llama 2, Llama 3.x and everything saved as LlamaForCausalLM",
    config=read_config,
    module=build,
    source=source,
    ignored=("*.rotary_emb.inv_freq",),
)
