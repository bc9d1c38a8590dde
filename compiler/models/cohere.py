"""Command R: attention and MLP side by side, LayerNorm without bias, interleaved rotation."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from qcc.compiler.config import ConfigReader, ModelConfig
from qcc.compiler.models.architecture import Architecture, WeightSource, sources
from qcc.compiler.models.attention import Attention
from qcc.compiler.models.blocks import BiaslessLayerNorm, HeadLayerNorm
from qcc.compiler.models.decoder import CausalLM, ParallelLayer
from qcc.compiler.models.reading import read_common
from qcc.compiler.weights.spec import SourceTensor


def read_config(raw: dict[str, Any], where: str) -> ModelConfig:
    """config.json of a CohereForCausalLM."""
    reader = ConfigReader(raw, where)
    bias = reader.flag("attention_bias", False)
    return read_common(
        reader,
        "cohere",
        default_positions=8192,
        norm_eps=("layer_norm_eps", 1e-5),
        tied=True,
        rope_keys={"default_theta": 500000.0},
        qkv_bias=bias,
        o_bias=bias,
        logit_scale=reader.number("logit_scale", 0.0625),
        qk_norm=reader.flag("use_qk_norm", False),
    )


def build(config: ModelConfig) -> CausalLM:
    """The float model."""
    attention: Any = Attention
    if config.qk_norm:
        norm = partial(HeadLayerNorm, config.head_dim)
        attention = partial(Attention, qk_norm=norm, whole=True)
    layer = partial(ParallelLayer, norm=BiaslessLayerNorm, attention=attention)
    return CausalLM(config, layer, BiaslessLayerNorm)


_USUAL = sources(interleaved=True)


def source(config: ModelConfig, name: str, shape: tuple[int, ...]) -> WeightSource:
    """Norms of q and k lie [heads, head_dim], and are sorted as q and k are."""
    if not name.endswith(("q_norm.weight", "k_norm.weight")):
        return _USUAL(config, name, shape)
    heads = (shape[0] // config.head_dim, config.head_dim)
    return WeightSource((SourceTensor(name, heads),), _halves_of_heads)


def _halves_of_heads(heads: Any) -> Any:
    """[heads, d] of rotated pairs -> [heads * d], each head's pairs split in halves."""
    return np.concatenate([heads[:, 0::2], heads[:, 1::2]], axis=1).reshape(-1)


ARCHITECTURE = Architecture(
    model_type="cohere",
    hf_names=("CohereForCausalLM",),
    description="Command R, Command R+, Aya 23",
    config=read_config,
    module=build,
    source=source,
)
