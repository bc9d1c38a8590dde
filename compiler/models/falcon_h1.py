"""Falcon-H1: Mamba 2 and attention side by side in every layer, every part with a scale."""

from __future__ import annotations

from typing import Any

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import op

from qcc.compiler.config import ConfigReader, ModelConfig, attention_heads, shown
from qcc.compiler.models.architecture import Architecture, WeightSource, sources
from qcc.compiler.models.attention import Attention, Step
from qcc.compiler.models.blocks import GatedMLP, RMSNorm, activation, scaled
from qcc.compiler.models.decoder import CausalLM, Names
from qcc.compiler.models.mamba import Mamba, mamba_channels, mamba_rows
from qcc.compiler.models.reading import read_common
from qcc.compiler.models.recurrent import RecurrentLM
from qcc.compiler.recurrent_config import DeltaConfig, MambaConfig
from qcc.compiler.weights.spec import SourceTensor
from qcc.runtime.errors import QccError

USUAL = sources()
INFINITY = {"__float__": "Infinity"}  # as transformers 5 writes it
LEAST, LARGEST = 1e-6, 1e30  # of factors: nothing overflows


def read_config(raw: dict[str, Any], where: str) -> ModelConfig:
    """config.json of a FalconH1ForCausalLM."""
    reader = ConfigReader(raw, where)
    reader.choice("hidden_act", ("silu",), "silu")  # of the convolution, too
    # Of the training, of other programs, and sizes that follow from others.
    for key in ("mamba_chunk_size", "num_logits_to_keep", "mlp_expansion_factor"):
        reader.get(key)
    for key in ("time_step_rank", "time_step_min", "time_step_max", "time_step_floor"):
        reader.get(key)
    for key, only in (("mamba_use_mlp", True), ("mamba_proj_bias", False)):
        if reader.flag(key, only) != only:
            raise QccError(f"{where}: {key} {not only} is not supported, no such model is known")
    bias = reader.flag("attention_bias", False)
    *_, head_dim = attention_heads(reader, 8)
    return read_common(
        reader,
        "falcon_h1",
        default_positions=8192,
        default_kv_heads=8,
        norm_eps=("rms_norm_eps", 1e-5),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=reader.flag("mlp_bias", False),
        attention_scale=head_dim**-0.5 * reader.number("key_multiplier", 1.0),
        embedding_scale=reader.number("embedding_multiplier", 1.0),
        logit_scale=reader.number("lm_head_multiplier", 1.0),
        delta=_sizes(reader),
        mamba=_mamba(reader),
    )


def _sizes(reader: ConfigReader) -> DeltaConfig:
    """Those of the states."""
    expanded = reader.integer("mamba_expand", 2) * reader.integer("hidden_size")
    null = "mamba_d_ssm" in reader.raw and reader.get("mamba_d_ssm") is None
    values = expanded if null else reader.integer("mamba_d_ssm", 1024)
    heads, groups = reader.integer("mamba_n_heads", 128), reader.integer("mamba_n_groups", 1)
    dim = reader.get("mamba_d_head", "auto")
    if values % heads or heads % groups or dim not in ("auto", values // heads):
        raise QccError(
            f"{reader.where}: mamba_d_ssm {values} cannot have {heads} heads (mamba_n_heads) of "
            f"{shown(dim)} numbers (mamba_d_head) in {groups} groups (mamba_n_groups)"
        )
    return DeltaConfig(
        key_heads=groups,
        value_heads=heads,
        key_head_dim=reader.integer("mamba_d_state", 256),
        value_head_dim=values // heads,
        conv_kernel=reader.integer("mamba_d_conv", 4, minimum=2),
        layers=(True,) * reader.integer("num_hidden_layers"),
        corrects=False,
        beside=True,
        conv_bias=reader.flag("mamba_conv_bias", True),
    )


def _mamba(reader: ConfigReader) -> MambaConfig:
    """Scales, norm and limits."""
    within = reader.number("ssm_in_multiplier", 1.0)
    least, largest = _step_limits(reader)
    before = reader.flag("mamba_norm_before_gate", True)
    normed = reader.flag("mamba_rms_norm", False)
    names = ("ssm_out_multiplier", "attention_in_multiplier", "attention_out_multiplier")
    scales = [reader.number(name, 1.0) for name in names]
    return MambaConfig(
        multipliers=tuple(
            within * each for each in _numbers(reader, "ssm_multipliers", (1.0,) * 5)
        ),
        least_step=least,
        largest_step=largest,
        norm=("before" if before else "after") if normed else "",
        out_bias=reader.flag("projectors_bias", False),
        scales=(*scales, *_numbers(reader, "mlp_multipliers", (1.0, 1.0))),
    )


def _step_limits(reader: ConfigReader) -> tuple[float, float | None]:
    """The smallest and the largest step; None: any."""
    key = "time_step_limit"
    found = reader.get(key, [0.0, INFINITY])
    good = isinstance(found, list) and len(found) == 2 and _is_number(found[0], 0.0)
    if good and found[1] in (INFINITY, float("inf")):
        return float(found[0]), None
    if not good or not _is_number(found[1], found[0]):
        raise QccError(f"{reader.where}: {key} is {shown(found)}, it must be a range of numbers")
    return float(found[0]), float(found[1])


def _numbers(reader: ConfigReader, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
    """As many numbers as the default has."""
    found = reader.get(key, list(default))
    if (
        not isinstance(found, list)
        or len(found) != len(default)
        or not all(_is_number(each, LEAST) for each in found)
    ):
        raise QccError(
            f"{reader.where}: {key} is {shown(found)}, it must be {len(default)} positive numbers"
        )
    return tuple(float(each) for each in found)


def _is_number(value: Any, least: float) -> bool:
    return type(value) in (int, float) and least <= value < LARGEST


class ScaledMLP(GatedMLP):
    """down(act(gate(x) * a) * up(x)) * b."""

    def __init__(self, config: ModelConfig) -> None:
        """Make the parts."""
        super().__init__(config)
        assert config.mamba is not None
        self.gate_scale, self.out_scale = config.mamba.scales[3:]

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """x [b, s, h] -> [b, s, h]."""
        gate, up = op.split(self.gate_up_proj(x), 2, axis=-1)
        inner = activation(self.act, scaled(gate, self.gate_scale)) * up
        return scaled(self.down_proj(inner), self.out_scale)


class SideBySideLayer(nn.Module):  # type: ignore[misc]
    """Mamba and attention of one norm of x, summed, then an MLP, each with a residual."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        """Make the parts under Hugging Face's names."""
        assert config.mamba is not None
        self.scales = config.mamba.scales[:3]
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mamba = Mamba(config, index)
        self.self_attn = Attention(config, index)
        self.pre_ff_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.feed_forward = ScaledMLP(config)

    def forward(self, x: nn.Tensor, step: Step) -> nn.Tensor:
        """x [b, s, h] -> [b, s, h]."""
        of_mamba, before, after = self.scales
        normed = self.input_layernorm(x)
        mixed = scaled(self.mamba(normed, step), of_mamba)
        x = x + mixed + scaled(self.self_attn(scaled(normed, before), step), after)
        return x + self.feed_forward(self.pre_ff_layernorm(x))


def build(config: ModelConfig) -> CausalLM:
    """The float model."""
    return RecurrentLM(config, SideBySideLayer, names=Names(norm="final_layernorm"))


def source(config: ModelConfig, name: str, shape: tuple[int, ...]) -> WeightSource:
    """Mamba's rows come in another order."""
    sizes = config.delta
    assert sizes is not None, name
    tensor = (SourceTensor(name, shape),)
    if name.endswith(".in_proj.weight"):
        return WeightSource(tensor, lambda rows: mamba_rows(sizes, rows))
    if name.endswith(".conv1d.bias"):
        return WeightSource(tensor, lambda rows: mamba_channels(sizes, rows))
    if name.endswith(".conv1d.weight"):
        taps = SourceTensor(name, (sizes.channels, 1, sizes.conv_kernel))
        return WeightSource((taps,), lambda w: mamba_channels(sizes, w)[:, 0].T.reshape(-1))
    return USUAL(config, name, shape)


ARCHITECTURE = Architecture(
    model_type="falcon_h1",
    hf_names=("FalconH1ForCausalLM",),
    description="Falcon-H1 0.5B to 34B (Mamba 2 beside attention)",
    config=read_config,
    module=build,
    source=source,
)
