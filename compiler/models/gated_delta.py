"""Gated delta networks (arXiv 2412.06464), and the attention with an output gate beside them.

Shapes: b sequences, s tokens of each, m = b * s, h hidden size; q, k, v, z sizes of all heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import op

from qcc.compiler.config import ModelConfig
from qcc.compiler.models.attention import Attention, Step
from qcc.compiler.models.blocks import GatedMLP, Linear, OffsetRMSNorm, RMSNorm
from qcc.compiler.models.decoder import DecoderLayer
from qcc.compiler.models.delta_rule import causal_conv_func, delta_rule_func
from qcc.compiler.models.recurrent import Hybrid
from qcc.compiler.recurrent_config import DeltaConfig
from qcc.quant_schemes.attributes import CAUSAL_CONV, DELTA_RULE

NORM_EPS = 1e-6  # under the root of the lengths of q and k, whatever rms_norm_eps is


class GatedAttention(Attention):
    """Attention with norms of q and k, whose output is multiplied by sigmoid of a gate.

    Rows of qkv_proj: each head's query and gate, then keys, then values.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        """Make the parts; `index` is the layer's."""
        super().__init__(config, index, qk_norm=OffsetRMSNorm)
        self.index = config.cache_layers.index(index)
        rows = 2 * (self.heads + self.kv_heads) * self.head_dim
        self.qkv_proj = Linear(config.hidden_size, rows, config.qkv_bias)

    def forward(self, x: nn.Tensor, step: Step) -> nn.Tensor:
        """x [b, s, h] -> [b, s, h]."""
        b, s, _ = x.shape
        heads, kv_heads, d = self.heads, self.kv_heads, self.head_dim
        qg, k, v = op.split(self.qkv_proj(x), [2 * heads * d, (2 * heads + kv_heads) * d], axis=2)
        q, gate = op.split(op.reshape(qg, (b, s, heads, 2 * d)), 2, axis=3)
        k, v = (op.reshape(each, (b, s, kv_heads, d)) for each in (k, v))
        qkv = op.concat([self._normed(self.q_norm, q), self._normed(self.k_norm, k), v], dim=2)
        out = step.kv.attention_with_fused_qkv(self.index, qkv, heads, self.scale)
        return self.o_proj(op.reshape(out * op.sigmoid(gate), (b, s, heads * d)))


class Conv1d(nn.Module):  # type: ignore[misc]
    """The weights of a convolution along the tokens, [taps * channels], oldest token first."""

    def __init__(self, config: DeltaConfig) -> None:
        """Make them, and a bias for each channel if there is one."""
        self.weight = nn.Parameter((config.conv_kernel * config.channels,))
        self.bias = nn.Parameter((config.channels,)) if config.conv_bias else None


class GatedDeltaNet(nn.Module):  # type: ignore[misc]
    """Linear attention of one layer, whose state is a matrix for each head."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        """Make the parts: in_proj_qkvz (rows q, k, v, z), in_proj_ba (b, a), and the rest."""
        assert config.delta is not None
        self.sizes, self.name = config.delta, f"layers.{index}"
        hidden, heads = config.hidden_size, self.sizes.value_heads
        self.width = self.sizes.channels + self.sizes.values
        self.in_proj_qkvz = Linear(hidden, self.width, bias=False)
        self.in_proj_ba = Linear(hidden, 2 * heads, bias=False)
        self.conv1d = Conv1d(self.sizes)
        self.A_log, self.dt_bias = nn.Parameter((heads,)), nn.Parameter((heads,))
        self.norm = RMSNorm(self.sizes.value_head_dim, config.norm_eps)
        self.out_proj = Linear(self.sizes.values, hidden, bias=False)

    def forward(self, x: nn.Tensor, step: Step) -> nn.Tensor:
        """x [b, s, h] -> [b, s, h]."""
        hybrid: Any = step.kv
        assert isinstance(hybrid, Hybrid)
        b, s, _ = x.shape
        sizes, m = self.sizes, b * s
        qkvz = op.reshape(self.in_proj_qkvz(x), (m, self.width))
        ba = op.reshape(self.in_proj_ba(x), (m, 2 * sizes.value_heads))
        conv = causal_conv_func(sizes, self.width, x.dtype)
        inputs = [qkvz, self.conv1d.weight]
        qkv = hybrid.scan(f"{self.name}.conv", conv, CAUSAL_CONV, inputs, sizes.channels)
        inputs = [qkv, self._norms(qkv), self._gates(ba)]
        rule = delta_rule_func(sizes)
        out = hybrid.scan(f"{self.name}.delta", rule, DELTA_RULE, inputs, sizes.values)
        return self.out_proj(op.reshape(self._gated(out, qkvz), (b, s, sizes.values)))

    def _norms(self, qkv: nn.Tensor) -> nn.Tensor:
        """qkv f32[m, c] -> f32[m, 2 * key heads]: what makes q of length dk ** -0.5, k of 1."""
        sizes = self.sizes

        def compute(qkv: te.Tensor) -> te.Tensor:
            i = te.reduce_axis((0, sizes.key_head_dim), name="i")
            shape = (qkv.shape[0], 2 * sizes.key_heads)

            def square(t: tirx.Var, head: tirx.Var) -> tirx.Expr:
                number = qkv[t, head * sizes.key_head_dim + i]
                return te.sum(number * number, axis=i)

            squares = te.compute(shape, square, name="squares")
            query = sizes.key_head_dim**-0.5

            def norm(t: tirx.Var, head: tirx.Var) -> tirx.Expr:
                scale = tirx.Select(
                    head < sizes.key_heads, tirx.const(query, "float32"), tirx.const(1, "float32")
                )
                return scale * te.rsqrt(squares[t, head] + tirx.const(NORM_EPS, "float32"))

            return te.compute(shape, norm, name="norms")

        return op.tensor_expr_op(compute, "delta_norms", [qkv])

    def _gates(self, ba: nn.Tensor) -> nn.Tensor:
        """b and a [m, 2 * heads] -> f32: exp(-exp(A_log) softplus(a + dt_bias)), and sigmoid(b)."""
        heads = self.sizes.value_heads

        def compute(ba: te.Tensor, a_log: te.Tensor, bias: te.Tensor) -> te.Tensor:
            def gate(t: tirx.Var, at: tirx.Var) -> tirx.Expr:
                head = at % heads
                a = (ba[t, heads + head] + bias[head]).astype("float32")
                rest = te.log(tirx.const(1, "float32") + te.exp(-te.abs(a)))
                softplus = te.max(a, tirx.const(0, "float32")) + rest
                decay = te.exp(-te.exp(a_log[head].astype("float32")) * softplus)
                return tirx.Select(at < heads, decay, te.sigmoid(ba[t, head].astype("float32")))

            return te.compute(ba.shape, gate, name="delta_gates")

        return op.tensor_expr_op(compute, "delta_gates", [ba, self.A_log, self.dt_bias])

    def _gated(self, out: nn.Tensor, qkvz: nn.Tensor) -> nn.Tensor:
        """out f32[m, v] -> [m, v]: each head over its rms, times weight, times silu(z)."""
        m, sizes = out.shape[0], self.sizes
        shape = (m, sizes.value_heads, sizes.value_head_dim)
        weight = self.norm.weight
        weight = weight.astype("float32") if weight.dtype != "float32" else weight
        normed = op.rms_norm(op.reshape(out, shape), weight, axes=[-1], epsilon=self.norm.eps)

        def compute(normed: te.Tensor, qkvz: te.Tensor) -> te.Tensor:
            def value(t: tirx.Var, at: tirx.Var) -> tirx.Expr:
                z = qkvz[t, sizes.channels + at].astype("float32")
                return (normed[t, at] * z * te.sigmoid(z)).astype(qkvz.dtype)

            return te.compute((m, sizes.values), value, name="delta_out")

        return op.tensor_expr_op(compute, "delta_out", [op.reshape(normed, out.shape), qkvz])


class HybridLayer(DecoderLayer):
    """A layer with attention, or with a gated delta network as `linear_attn`."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        mlp: Callable[[ModelConfig], nn.Module] = GatedMLP,
    ) -> None:
        """Make the parts under Hugging Face's names."""
        assert config.delta is not None
        self.is_linear = config.delta.layers[index]
        mixer = GatedDeltaNet if self.is_linear else GatedAttention
        super().__init__(config, index, mixer, mlp, OffsetRMSNorm)
        if self.is_linear:
            self.linear_attn = self.self_attn
            del self.self_attn

    def forward(self, x: nn.Tensor, step: Step) -> nn.Tensor:
        """x [b, s, h] -> [b, s, h]."""
        mixer = self.linear_attn if self.is_linear else self.self_attn
        x = x + mixer(self.input_layernorm(x), step)
        return x + self.mlp(self.post_attention_layernorm(x))
