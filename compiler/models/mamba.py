"""Mamba 2 (arXiv 2405.21060): a state for each head to which every token adds, and which decays.

It is the recurrence of delta_rule.py without its correction: keys are Mamba's B, queries its C, and
beta is the step dt. Shapes: b sequences, s tokens of each, m = b * s, c, v and z as in gated_delta.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import op

from qcc.compiler.config import ModelConfig
from qcc.compiler.models.attention import Step
from qcc.compiler.models.blocks import Linear, RMSNorm
from qcc.compiler.models.delta_rule import causal_conv_func, delta_rule_func
from qcc.compiler.models.gated_delta import Conv1d
from qcc.compiler.models.recurrent import Hybrid
from qcc.compiler.recurrent_config import DeltaConfig
from qcc.quant_schemes.attributes import CAUSAL_CONV, SUM_RULE


class Mamba(nn.Module):  # type: ignore[misc]
    """One layer's mixer. Rows of in_proj: C, B, x, z, dt."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        """Make the parts under Hugging Face's names."""
        assert config.delta is not None and config.mamba is not None
        self.sizes, self.mamba, self.name = config.delta, config.mamba, f"layers.{index}"
        sizes, hidden = self.sizes, config.hidden_size
        self.width = sizes.channels + sizes.values + sizes.value_heads
        self.in_proj = Linear(hidden, self.width, bias=False)
        self.conv1d = Conv1d(sizes)
        self.A_log, self.dt_bias, self.D = (nn.Parameter((sizes.value_heads,)) for _ in range(3))
        self.norm = RMSNorm(sizes.values, config.norm_eps) if self.mamba.norm else None
        self.out_proj = Linear(sizes.values, hidden, bias=self.mamba.out_bias)

    def forward(self, x: nn.Tensor, step: Step) -> nn.Tensor:
        """x [b, s, h] -> [b, s, h]."""
        hybrid: Any = step.kv
        assert isinstance(hybrid, Hybrid)
        b, s, _ = x.shape
        sizes, m = self.sizes, b * s
        made = self._multiplied(op.reshape(self.in_proj(x), (m, self.width)))
        conv = causal_conv_func(sizes, self.width, x.dtype)
        inputs = [made, self.conv1d.weight]
        inputs += [self.conv1d.bias] if sizes.conv_bias else []
        qkv = hybrid.scan(f"{self.name}.conv", conv, CAUSAL_CONV, inputs, sizes.channels)
        ones = op.full((m, 2 * sizes.key_heads), 1.0, "float32")
        inputs, rule = [qkv, ones, self._gates(made)], delta_rule_func(sizes)
        out = hybrid.scan(f"{self.name}.delta", rule, SUM_RULE, inputs, sizes.values)
        y = self._gated(self._with_input(out, qkv), made)
        return self.out_proj(op.reshape(y, (b, s, sizes.values)))

    def _multiplied(self, made: nn.Tensor) -> nn.Tensor:
        """[m, width], each part times its multiplier."""
        sizes = self.sizes
        z, x, b, c, dt = self.mamba.multipliers
        if set(self.mamba.multipliers) == {1.0}:
            return made
        rows = (sizes.keys, sizes.keys, sizes.values, sizes.values, sizes.value_heads)
        factors = np.repeat(np.array([c, b, x, z, dt], np.float32), rows)
        return made * nn.Tensor.from_const(factors.astype(made.dtype))

    def _gates(self, made: nn.Tensor) -> nn.Tensor:
        """f32[m, 2 * heads] of [m, width]: exp(-exp(A_log) dt), and dt."""
        sizes, mamba = self.sizes, self.mamba
        heads, start = sizes.value_heads, sizes.channels + sizes.values

        def compute(made: te.Tensor, a_log: te.Tensor, bias: te.Tensor) -> te.Tensor:
            def gate(t: tirx.Var, at: tirx.Var) -> tirx.Expr:
                head = at % heads
                raw = (made[t, start + head] + bias[head]).astype("float32")
                rest = te.log(tirx.const(1, "float32") + te.exp(-te.abs(raw)))
                dt = te.max(raw, tirx.const(0, "float32")) + rest
                dt = te.max(dt, tirx.const(mamba.least_step, "float32"))
                if mamba.largest_step is not None:
                    dt = te.min(dt, tirx.const(mamba.largest_step, "float32"))
                decay = te.exp(-te.exp(a_log[head].astype("float32")) * dt)
                return tirx.Select(at < heads, decay, dt)

            return te.compute((made.shape[0], 2 * heads), gate, name="mamba_gates")

        return op.tensor_expr_op(compute, "mamba_gates", [made, self.A_log, self.dt_bias])

    def _with_input(self, out: nn.Tensor, qkv: nn.Tensor) -> nn.Tensor:
        """f32[m, v]: each head's output and D times its input."""
        sizes = self.sizes

        def compute(out: te.Tensor, qkv: te.Tensor, d: te.Tensor) -> te.Tensor:
            def value(t: tirx.Var, at: tirx.Var) -> tirx.Expr:
                own = qkv[t, 2 * sizes.keys + at]
                return out[t, at] + d[at // sizes.value_head_dim].astype("float32") * own

            return te.compute(out.shape, value, name="mamba_skip")

        return op.tensor_expr_op(compute, "mamba_skip", [out, qkv, self.D])

    def _gated(self, out: nn.Tensor, made: nn.Tensor) -> nn.Tensor:
        """out f32[m, v] -> [m, v]: times silu(z), normed before or after that or not at all."""
        start = self.sizes.channels

        def compute(out: te.Tensor, made: te.Tensor) -> te.Tensor:
            def value(t: tirx.Var, at: tirx.Var) -> tirx.Expr:
                z = made[t, start + at].astype("float32")
                return out[t, at] * z * te.sigmoid(z)

            return te.compute(out.shape, value, name="mamba_out")

        out = self._normed(out) if self.mamba.norm == "before" else out
        out = op.tensor_expr_op(compute, "mamba_out", [out, made])
        out = self._normed(out) if self.mamba.norm == "after" else out
        return out.astype(made.dtype) if made.dtype != "float32" else out

    def _normed(self, out: nn.Tensor) -> nn.Tensor:
        """f32[m, v], each group over its rms, times the weight."""
        assert self.norm is not None
        groups, weight = self.sizes.key_heads, self.norm.weight
        each = self.sizes.values // groups
        ones = nn.Tensor.from_const(np.ones(each, np.float32))
        parts = op.reshape(out, (out.shape[0], groups, each))
        normed = op.rms_norm(parts, ones, axes=[-1], epsilon=self.norm.eps)
        weight = weight.astype("float32") if weight.dtype != "float32" else weight
        return op.reshape(normed, out.shape) * weight


def mamba_rows(sizes: DeltaConfig, rows: Any) -> Any:
    """Rows z, x, B, C, dt [width, ...] of a checkpoint -> C, B, x, z, dt."""
    counts = (sizes.values, sizes.values, sizes.keys, sizes.keys)
    z, x, b, c, dt = np.split(rows, np.cumsum(counts))
    return np.concatenate([c, b, x, z, dt])


def mamba_channels(sizes: DeltaConfig, rows: Any) -> Any:
    """Rows x, B, C [channels, ...] of a checkpoint -> C, B, x."""
    x, b, c = np.split(rows, np.cumsum((sizes.values, sizes.keys)))
    return np.concatenate([c, b, x])
