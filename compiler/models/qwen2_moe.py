"""Qwen2-MoE (Qwen1.5-MoE, Qwen2-57B-A14B): Qwen2 with experts, one of which all tokens use."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import op

from qcc.compiler.config import ConfigReader, ExpertsConfig, ModelConfig, shown
from qcc.compiler.models.architecture import Architecture
from qcc.compiler.models.blocks import GatedMLP, Linear
from qcc.compiler.models.decoder import CausalLM, DecoderLayer
from qcc.compiler.models.experts import MoE, expert_sources, read_experts
from qcc.compiler.models.reading import read_common, read_windows
from qcc.runtime.errors import QccError


def read_config(raw: dict[str, Any], where: str) -> ModelConfig:
    """config.json of a Qwen2MoeForCausalLM."""
    reader = ConfigReader(raw, where)
    reader.get("sliding_window")
    used = reader.flag("use_sliding_window", False)  # transformers writes a window of 0 where not
    window = reader.optional("sliding_window", 4096) if used else None
    last = reader.integer("max_window_layers", 28, minimum=0)
    shared = reader.integer("shared_expert_intermediate_size", 5632)
    return read_common(
        reader,
        "qwen2_moe",
        default_positions=32768,
        default_kv_heads=16,
        qkv_bias=reader.flag("qkv_bias", True),
        experts=read_qwen_experts(reader, 60, 4, 1408, shared),
        **read_windows(reader, window, lambda i: i % 2 == 0 and i < last),
    )


def read_qwen_experts(
    reader: ConfigReader,
    count: int,
    per_token: int,
    size: int,
    shared: int = 0,
    normalized: bool = False,
) -> ExpertsConfig:
    """Experts as Qwen's configurations have them; numbers are those where a key is absent.

    Raises:
        QccError: mlp_only_layers is no list of layers.
    """
    layers = reader.integer("num_hidden_layers")
    step = reader.integer("decoder_sparse_step", 1)
    dense = reader.get("mlp_only_layers", [])
    if not isinstance(dense, list) or any(type(i) is not int or i < 0 for i in dense):
        raise QccError(f"{reader.where}: mlp_only_layers is {shown(dense)}, no list of layers")
    # transformers 5 writes Qwen3's under another name than the hub's files have.
    key = "num_local_experts" if "num_local_experts" in reader.raw else "num_experts"
    return read_experts(
        reader,
        (key, count),
        per_token,
        ("moe_intermediate_size", size),
        normalized=reader.flag("norm_topk_prob", normalized),
        shared_size=shared,
        dense_layers=tuple(i for i in range(layers) if i in dense or (i + 1) % step),
    )


class SharedMoE(MoE):
    """The experts' sum + sigmoid(shared_expert_gate(x)) * shared_expert(x)."""

    def __init__(self, config: ModelConfig) -> None:
        """Make the parts under Hugging Face's names."""
        super().__init__(config)
        assert config.experts is not None
        self.shared_expert = GatedMLP(replace(config, intermediate_size=config.experts.shared_size))
        self.shared_expert_gate = Linear(config.hidden_size, 1, bias=False)

    def of_tokens(self, x: nn.Tensor) -> nn.Tensor:
        """x [m, h] -> [m, h]."""
        share = op.sigmoid(self.shared_expert_gate(x))
        return super().of_tokens(x) + share * self.shared_expert(x)


def build(config: ModelConfig) -> CausalLM:
    """The float model."""

    def layer(config: ModelConfig, index: int) -> DecoderLayer:
        assert config.experts is not None
        dense = index in config.experts.dense_layers
        return DecoderLayer(config, index, mlp=GatedMLP if dense else SharedMoE)

    return CausalLM(config, layer)


ARCHITECTURE = Architecture(
    model_type="qwen2_moe",
    hf_names=("Qwen2MoeForCausalLM",),
    description="Qwen1.5-MoE, Qwen2-57B-A14B",
    config=read_config,
    module=build,
    source=expert_sources(),
    floating=("*.mlp.gate.weight", "*.mlp.shared_expert_gate.weight"),
)
