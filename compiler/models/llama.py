"""Llama 2 and 3.x, and the decoder that Mistral and Qwen2 share."""

from __future__ import annotations

from typing import Any

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache

from qcc.compiler.config import ConfigReader, ModelConfig
from qcc.compiler.models.architecture import Architecture, WeightSource, stacked
from qcc.compiler.models.blocks import (
    Attention,
    CausalLM,
    GatedMLP,
    Names,
    RMSNorm,
)
from qcc.compiler.models.reading import read_common

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


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
