"""Gated delta networks beside attention as checkpoints have them: sizes, names of tensors."""

from __future__ import annotations

from typing import Any

import numpy as np

from qcc.compiler.config import ConfigReader, ModelConfig, shown
from qcc.compiler.models.architecture import Source, WeightSource
from qcc.compiler.models.decoder import CausalLM
from qcc.compiler.models.recurrent import RecurrentLM
from qcc.compiler.recurrent_config import DeltaConfig
from qcc.compiler.weights.spec import SourceTensor
from qcc.runtime.errors import QccError

KINDS = ("linear_attention", "full_attention")


def read_delta(reader: ConfigReader) -> DeltaConfig:
    """Sizes as Qwen's configurations have them.

    Raises:
        QccError: heads that cannot share keys, layer_types that name no such layers, no layer with
            attention.
    """
    layers, where = reader.integer("num_hidden_layers"), reader.where
    reader.choice("hidden_act", ("silu",), "silu")  # of the convolution, too
    reader.choice("output_gate_type", ("swish", "silu"), "swish")
    if not reader.flag("attn_output_gate", True):
        raise QccError(f"{where}: attn_output_gate false is not supported, no such model is known")
    # Of what a checkpoint holds besides, and of other programs that run it.
    for key in ("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mamba_ssm_dtype"):
        reader.get(key)
    every = reader.integer("full_attention_interval", 4)
    types = reader.get("layer_types", [KINDS[(i + 1) % every == 0] for i in range(layers)])
    if not isinstance(types, list) or len(types) != layers or any(t not in KINDS for t in types):
        raise QccError(
            f"{where}: layer_types is {shown(types)}; it must name each of {layers} layers "
            f"{' or '.join(KINDS)}"
        )
    if "full_attention" not in types:
        raise QccError(f"{where}: no layer has full_attention; such models are not supported")
    found = DeltaConfig(
        key_heads=reader.integer("linear_num_key_heads", 16),
        value_heads=reader.integer("linear_num_value_heads", 32),
        key_head_dim=reader.integer("linear_key_head_dim", 128),
        value_head_dim=reader.integer("linear_value_head_dim", 128),
        conv_kernel=reader.integer("linear_conv_kernel_dim", 4, minimum=2),
        layers=tuple(kind == "linear_attention" for kind in types),
    )
    if found.value_heads % found.key_heads:
        raise QccError(
            f"{where}: linear_num_value_heads {found.value_heads} is not a multiple of "
            f"linear_num_key_heads {found.key_heads}"
        )
    return found


def without_sections(raw: dict[str, Any]) -> dict[str, Any]:
    """A config.json without what tells rotations by time, height and width apart.

    A text's tokens have the same number in all three, so that they rotate as one.
    """
    sections = ("mrope_section", "mrope_interleaved")
    return {
        key: {k: v for k, v in value.items() if k not in sections}
        if key in ("rope_parameters", "rope_scaling") and isinstance(value, dict)
        else value
        for key, value in raw.items()
    }


def language_model(config: ModelConfig) -> type[CausalLM]:
    """The class whose functions take what the layers keep."""
    return RecurrentLM if config.states else CausalLM


def delta_sources(usual: Source, grouped: bool) -> Source:
    """`usual` for all parameters but those of GatedDeltaNet and GatedAttention.

    Args:
        usual: of the rest.
        grouped: the checkpoint has each key head's q, k, v, z, and its b, a together; else there
            are in_proj_qkv, in_proj_z, in_proj_b, in_proj_a.
    """

    def source(config: ModelConfig, name: str, shape: tuple[int, ...]) -> WeightSource:
        sizes = config.delta
        assert sizes is not None, name
        before, _, leaf = name.rpartition(".linear_attn.")

        def parts(**rows: int) -> WeightSource:
            tensors = ((f"{before}.linear_attn.{part}.weight", n) for part, n in rows.items())
            return WeightSource(tuple(SourceTensor(at, (n, *shape[1:])) for at, n in tensors))

        if leaf == "conv1d.weight":
            taps = SourceTensor(name, (sizes.channels, 1, sizes.conv_kernel))
            return WeightSource((taps,), lambda weight: weight[:, 0].T.reshape(-1))
        if leaf == "in_proj_qkvz.weight" and not grouped:
            return parts(in_proj_qkv=sizes.channels, in_proj_z=sizes.values)
        if leaf == "in_proj_ba.weight" and not grouped:
            return parts(in_proj_b=sizes.value_heads, in_proj_a=sizes.value_heads)
        if leaf in ("in_proj_qkvz.weight", "in_proj_ba.weight"):
            dims: tuple[int, ...] = (sizes.key_head_dim,) * 2 if "qkvz" in leaf else ()
            each = sizes.value_heads // sizes.key_heads
            dims += ((each * sizes.value_head_dim) if dims else each,) * 2
            whole = SourceTensor(name, shape)
            return WeightSource((whole,), lambda rows: _ungrouped(rows, sizes.key_heads, dims))
        if ".self_attn.qkv_proj." in name:
            kv, kind = config.num_key_value_heads * config.head_dim, name.rpartition(".")[2]
            rows = {"q_proj": shape[0] - 2 * kv, "k_proj": kv, "v_proj": kv}
            at = name.rpartition("qkv_proj.")[0]
            return WeightSource(
                tuple(SourceTensor(f"{at}{p}.{kind}", (n, *shape[1:])) for p, n in rows.items())
            )
        return usual(config, name, shape)

    return source


def _ungrouped(rows: Any, groups: int, dims: tuple[int, ...]) -> Any:
    """Rows [groups * sum(dims), ...] of each group's parts -> each part of all groups together."""
    each = rows.reshape(groups, sum(dims), *rows.shape[1:])
    parts = np.split(each, np.cumsum(dims)[:-1], axis=1)
    return np.concatenate([part.reshape(-1, *rows.shape[1:]) for part in parts])
