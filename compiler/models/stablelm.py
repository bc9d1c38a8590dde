"""StableLM 2 and StableLM 3B: LayerNorm, partial rotary."""

from __future__ import annotations

from functools import partial
from typing import Any

from qcc.compiler.config import ConfigReader, ModelConfig
from qcc.compiler.models.architecture import Architecture, WeightSource, sources
from qcc.compiler.models.attention import Attention
from qcc.compiler.models.blocks import HeadLayerNorm, LayerNorm
from qcc.compiler.models.decoder import CausalLM, DecoderLayer, ParallelLayer
from qcc.compiler.models.reading import read_common
from qcc.compiler.weights.spec import SourceTensor


def read_config(raw: dict[str, Any], where: str) -> ModelConfig:
    """config.json of a StableLmForCausalLM."""
    reader = ConfigReader(raw, where)
    return read_common(
        reader,
        "stablelm",
        default_positions=4096,
        default_kv_heads=32,
        norm_eps=("layer_norm_eps", 1e-5),
        rope_keys={"partial_default": 0.25},
        qkv_bias=reader.flag("use_qkv_bias", False),
        parallel_residual=reader.flag("use_parallel_residual", False),
        qk_norm=reader.flag("qk_layernorm", False),
    )


def build(config: ModelConfig) -> CausalLM:
    """The float model."""
    layer: Any = ParallelLayer if config.parallel_residual else DecoderLayer
    attention: Any = Attention
    if config.qk_norm:
        norm = partial(HeadLayerNorm, config.head_dim)
        attention = partial(Attention, qk_norm=norm, whole=True)
    return CausalLM(config, partial(layer, norm=LayerNorm, attention=attention), LayerNorm)


_USUAL = sources()


def source(config: ModelConfig, name: str, shape: tuple[int, ...]) -> WeightSource:
    """Each head has a norm of its own for q and k."""
    before, found, _ = name.partition("_norm.weight")
    if not found or not before.endswith((".q", ".k")):
        return _USUAL(config, name, shape)
    dim = config.head_dim
    return WeightSource(
        tuple(
            SourceTensor(f"{before}_layernorm.norms.{head}.weight", (dim,))
            for head in range(shape[0] // dim)
        )
    )


ARCHITECTURE = Architecture(
    model_type="stablelm",
    hf_names=("StableLmForCausalLM",),
    description="StableLM 2 1.6B and 12B, StableLM 3B, Zephyr 3B",
    config=read_config,
    module=build,
    source=source,
)
