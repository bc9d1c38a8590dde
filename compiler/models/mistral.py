"""Mistral: Llama with a sliding attention window."""

from __future__ import annotations

from typing import Any

from qcc.compiler.config import ConfigReader, ModelConfig
from qcc.compiler.models.architecture import Architecture
from qcc.compiler.models.llama import build, read_common, source


def read_config(raw: dict[str, Any], where: str) -> ModelConfig:
    """config.json of a MistralForCausalLM; a null sliding_window means full attention."""
    reader = ConfigReader(raw, where)
    window = reader.get("sliding_window")
    if window is not None:
        window = reader.integer("sliding_window")
    return read_common(reader, sliding_window=window)


ARCHITECTURE = Architecture(
    model_type="mistral",
    hf_names=("MistralForCausalLM",),
    description="Mistral 7B and relatives (sliding window)",
    config=read_config,
    module=build,
    source=source,
    ignored=("*.rotary_emb.inv_freq",),
)
