"""Qwen3-Next: Qwen3.5's layers with experts, one of which all tokens use."""

from __future__ import annotations

from typing import Any

from qcc.compiler.config import ConfigReader, ModelConfig
from qcc.compiler.models.architecture import Architecture
from qcc.compiler.models.blocks import GatedMLP, OffsetRMSNorm
from qcc.compiler.models.decoder import CausalLM
from qcc.compiler.models.delta_reading import delta_sources, language_model, read_delta
from qcc.compiler.models.experts import expert_sources
from qcc.compiler.models.gated_delta import HybridLayer
from qcc.compiler.models.qwen2_moe import SharedMoE, read_qwen_experts
from qcc.compiler.models.reading import read_common


def read_config(raw: dict[str, Any], where: str) -> ModelConfig:
    """config.json of a Qwen3NextForCausalLM."""
    reader = ConfigReader(raw, where)
    bias = reader.flag("attention_bias", False)
    shared = reader.integer("shared_expert_intermediate_size", 512)
    return read_common(
        reader,
        "qwen3_next",
        default_positions=32768,
        default_kv_heads=2,
        default_head_dim=256,
        rope_keys={"partial_default": 0.25},
        qkv_bias=bias,
        o_bias=bias,
        delta=read_delta(reader),
        experts=read_qwen_experts(reader, 512, 10, 512, shared, normalized=True),
    )


def build(config: ModelConfig) -> CausalLM:
    """The float model."""

    def layer(config: ModelConfig, index: int) -> HybridLayer:
        assert config.experts is not None
        dense = index in config.experts.dense_layers
        return HybridLayer(config, index, GatedMLP if dense else SharedMoE)

    return language_model(config)(config, layer, OffsetRMSNorm)


ARCHITECTURE = Architecture(
    model_type="qwen3_next",
    hf_names=("Qwen3NextForCausalLM",),
    description="Qwen3-Next-80B-A3B (gated delta networks, attention, experts)",
    config=read_config,
    module=build,
    source=delta_sources(expert_sources(), grouped=True),
    ignored=("mtp.*",),
    floating=("*.mlp.gate.weight", "*.mlp.shared_expert_gate.weight"),
)
