"""Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

from __future__ import annotations

from typing import Any

from qcc.compiler.config import ConfigReader, ModelConfig, shown
from qcc.compiler.models.architecture import Architecture
from qcc.compiler.models.llama import build, source
from qcc.compiler.models.reading import read_common
from qcc.runtime.errors import QccError


def read_config(raw: dict[str, Any], where: str) -> ModelConfig:
    """config.json of a Qwen2ForCausalLM."""
    reader = ConfigReader(raw, where)
    used = reader.flag("use_sliding_window", False)
    reader.get("sliding_window")
    reader.get("max_window_layers")
    layer_types = reader.get("layer_types", [])
    if not isinstance(layer_types, list):
        raise QccError(f"{where}: layer_types is {shown(layer_types)}, it must be a list")
    if used or any(kind != "full_attention" for kind in layer_types):
        raise QccError(
            f"{where}: use_sliding_window with windows on some layers only is not supported; "
            "every released Qwen2 checkpoint has it off"
        )
    # transformers does not read it for Qwen2: q, k and v have a bias or the weights are refused.
    reader.get("attention_bias")
    return read_common(reader, "qwen2", default_positions=32768, default_kv_heads=32, qkv_bias=True)


ARCHITECTURE = Architecture(
    model_type="qwen2",
    hf_names=("Qwen2ForCausalLM",),
    description="Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen",
    config=read_config,
    module=build,
    source=source,
)
