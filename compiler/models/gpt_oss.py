"""gpt-oss: attention sinks, windows in every other layer, experts of a clamped SwiGLU."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from tvm import te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import op

from qcc.compiler.config import ConfigReader, ModelConfig
from qcc.compiler.models.architecture import Architecture, WeightSource, sources
from qcc.compiler.models.attention import Attention, Step
from qcc.compiler.models.decoder import CausalLM, DecoderLayer
from qcc.compiler.models.experts import Act, Experts, MoE, Router, read_experts
from qcc.compiler.models.reading import read_common, read_windows
from qcc.compiler.weights.spec import SourceTensor
from qcc.runtime.errors import QccError

_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def read_config(raw: dict[str, Any], where: str) -> ModelConfig:
    """config.json of a GptOssForCausalLM."""
    if not raw.get("rope_parameters") and not raw.get("rope_scaling"):
        raw = {**raw, "rope_scaling": _YARN}
    reader = ConfigReader(raw, where)
    for key in ("initial_context_length", "experts_per_token"):
        reader.get(key)  # what the rope's own keys and num_experts_per_tok say
    bias = reader.flag("attention_bias", True)
    packed = isinstance(raw.get("quantization_config"), dict)
    experts = read_experts(
        reader,
        ("num_local_experts", 128),
        4,
        normalized=True,
        swiglu=(reader.number("swiglu_alpha", 1.702), reader.number("swiglu_limit", 7.0)),
        packed=packed and raw["quantization_config"].get("quant_method") == "mxfp4",
    )
    config = read_common(
        reader,
        "gpt_oss",
        default_positions=131072,
        default_kv_heads=8,
        default_head_dim=64,
        norm_eps=("rms_norm_eps", 1e-5),
        rope_keys={"default_theta": 150000.0},
        qkv_bias=bias,
        o_bias=bias,
        experts=experts,
        attention_sinks=True,
        **read_windows(reader, reader.optional("sliding_window", 128), lambda i: i % 2 == 0),
    )
    group = config.num_attention_heads // config.num_key_value_heads
    if group > config.head_dim:  # a head carries the log-sum-exps of its group
        raise QccError(
            f"{where}: num_attention_heads {config.num_attention_heads} are {group} for each of "
            f"num_key_value_heads {config.num_key_value_heads}; with sinks at most head_dim "
            f"{config.head_dim} are supported"
        )
    return config


class SinkAttention(Attention):
    """Attention whose softmax has one more term in its sum, e^sink of the head, without a value."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        """Make the parts under Hugging Face's names."""
        super().__init__(config, index)
        self.sinks = nn.Parameter((self.heads,))

    def attend(self, qkv: nn.Tensor, step: Step) -> nn.Tensor:
        """[b, s, q + k + v heads, d] -> [b, s, q heads, d]: times sigmoid(lse - sink)."""
        heads = self.heads + self.kv_heads
        out = step.kv.attention_with_fused_qkv(
            self.index, self._with_carriers(qkv), heads, self.scale
        )
        group = self.heads // self.kv_heads

        def weighed(out: te.Tensor, sinks: te.Tensor) -> te.Tensor:
            b, s, _, d = out.shape

            def value(i: tirx.Var, j: tirx.Var, head: tirx.Var, k: tirx.Var) -> tirx.Expr:
                first, at = tirx.floordiv(head, group) * (group + 1), tirx.floormod(head, group)
                lse = out[i, j, first + group, at].astype("float32")
                share = te.sigmoid(lse - sinks[head].astype("float32"))
                return (out[i, j, first + at, k].astype("float32") * share).astype(out.dtype)

            return te.compute((b, s, self.heads, d), value, name="weighed_by_sinks")

        return op.tensor_expr_op(weighed, "weighed_by_sinks", [out, self.sinks])

    def _with_carriers(self, qkv: nn.Tensor) -> nn.Tensor:
        """One more query head behind each kv head's, for the log-sum-exps; see KVCacheConfig."""
        group = self.heads // self.kv_heads
        queries = self.heads + self.kv_heads

        def carried(qkv: te.Tensor) -> te.Tensor:
            b, s, heads, d = qkv.shape

            def value(i: tirx.Var, j: tirx.Var, head: tirx.Var, k: tirx.Var) -> tirx.Expr:
                at = tirx.min(tirx.floormod(head, group + 1), group - 1)
                query = tirx.floordiv(head, group + 1) * group + at
                return qkv[i, j, tirx.Select(head < queries, query, head - self.kv_heads), k]

            return te.compute((b, s, heads + self.kv_heads, d), value, name="with_carriers")

        return op.tensor_expr_op(carried, "with_carriers", [qkv])


def clamped_swiglu(alpha: float, limit: float) -> Act:
    """(up + 1) * gate * sigmoid(alpha * gate) of gate at most `limit`, up within +-limit."""

    def act(x: nn.Tensor) -> nn.Tensor:
        def compute(x: te.Tensor) -> te.Tensor:
            m, s, rows = x.shape
            inner, top = int(rows) // 2, tirx.const(limit, "float32")

            def value(i: tirx.Var, j: tirx.Var, k: tirx.Var) -> tirx.Expr:
                gate = tirx.min(x[i, j, k].astype("float32"), top)
                up = tirx.max(tirx.min(x[i, j, k + inner].astype("float32"), top), -top)
                share = te.sigmoid(gate * tirx.const(alpha, "float32"))
                return ((up + tirx.const(1.0, "float32")) * gate * share).astype(x.dtype)

            return te.compute((m, s, inner), value, name="clamped_swiglu")

        return op.tensor_expr_op(compute, "clamped_swiglu", [x])

    return act


def build(config: ModelConfig) -> CausalLM:
    """The float model."""
    assert config.experts is not None and config.experts.swiglu is not None
    act = clamped_swiglu(*config.experts.swiglu)
    mlp = partial(
        MoE, router=partial(Router, bias=True), experts=partial(Experts, act=act, bias=True)
    )
    return CausalLM(config, partial(DecoderLayer, attention=SinkAttention, mlp=mlp))


_USUAL = sources(renamed={"mlp.gate": "mlp.router"})


def source(config: ModelConfig, name: str, shape: tuple[int, ...]) -> WeightSource:
    """Gate and up rows are interleaved; floating matrices lie [experts, in, out]."""
    before, found, rest = name.partition(".experts.")
    if not found:
        return _USUAL(config, name, shape)
    assert config.experts is not None
    count = config.experts.count
    projection, _, kind = rest.partition(".")
    pairs = projection == "gate_up_proj"
    theirs = f"{before}.experts.{projection}"
    if kind == "bias":
        return WeightSource(
            (SourceTensor(f"{theirs}_bias", shape),), halves_of_columns if pairs else None
        )
    if config.experts.packed:
        halves = partial(halves_of_experts, count) if pairs else None
        return WeightSource((SourceTensor(theirs, shape),), halves, whole=True)
    transposed = (count, shape[1], shape[0] // count)
    return WeightSource(
        (SourceTensor(theirs, transposed),), partial(_rows_of_experts, pairs), whole=True
    )


def halves_of_columns(pairs: Any) -> Any:
    """[m, 2 n] of pairs (gate, up) -> all gates, then all ups."""
    return np.concatenate([pairs[:, 0::2], pairs[:, 1::2]], axis=1)


def halves_of_experts(experts: int, rows: Any) -> Any:
    """[experts * 2 n, k], each expert's rows as `halves_of_columns`."""
    each = rows.reshape(experts, -1, rows.shape[1])
    return np.concatenate([each[:, 0::2], each[:, 1::2]], axis=1).reshape(rows.shape)


def _rows_of_experts(pairs: bool, matrices: Any) -> Any:
    """[experts, k, n] -> [experts * n, k]."""
    experts, k, n = matrices.shape
    rows = matrices.swapaxes(1, 2).reshape(experts * n, k)
    return halves_of_experts(experts, rows) if pairs else rows


ARCHITECTURE = Architecture(
    model_type="gpt_oss",
    hf_names=("GptOssForCausalLM",),
    description="gpt-oss-20b, gpt-oss-120b",
    config=read_config,
    module=build,
    source=source,
    floating=("*.mlp.gate.weight", "*.experts.*.bias"),
)
