"""Qwen3.5, text: three of four layers are gated delta networks, the fourth has gated attention."""

from __future__ import annotations

from typing import Any

from qcc.compiler.config import ConfigReader, ModelConfig
from qcc.compiler.models.architecture import Architecture, sources
from qcc.compiler.models.blocks import OffsetRMSNorm
from qcc.compiler.models.decoder import CausalLM
from qcc.compiler.models.delta_reading import (
    delta_sources,
    language_model,
    read_delta,
    without_sections,
)
from qcc.compiler.models.gated_delta import HybridLayer
from qcc.compiler.models.reading import read_common


def read_config(raw: dict[str, Any], where: str) -> ModelConfig:
    """config.json of a Qwen3_5ForCausalLM."""
    reader = ConfigReader(without_sections(raw), where)
    reader.get("mlp_only_layers")  # all have a usual MLP
    bias = reader.flag("attention_bias", False)
    return read_common(
        reader,
        "qwen3_5_text",
        default_positions=32768,
        default_kv_heads=4,
        default_head_dim=256,
        rope_keys={"partial_default": 0.25},
        qkv_bias=bias,
        o_bias=bias,
        delta=read_delta(reader),
    )


def build(config: ModelConfig) -> CausalLM:
    """The float model."""
    return language_model(config)(config, HybridLayer, OffsetRMSNorm)


ARCHITECTURE = Architecture(
    model_type="qwen3_5_text",
    hf_names=("Qwen3_5ForCausalLM",),
    description="Qwen3.5, text (gated delta networks and attention)",
    config=read_config,
    module=build,
    source=delta_sources(sources(), grouped=False),
    ignored=("mtp.*",),
)
