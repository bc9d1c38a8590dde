"""Layers of decoder-only models, as TVM nn modules with float parameters.

Nothing here knows of quantization, devices or checkpoints. Shapes: b sequences, s tokens of each,
h hidden size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax as rx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import op

from qcc.compiler.config import ModelConfig

ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu", "relu2")


def activation(name: str, x: nn.Tensor) -> nn.Tensor:
    """Hugging Face's activation functions by name."""
    if name == "silu":
        return op.silu(x)
    if name == "gelu":
        return op.gelu(x)
    if name in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"):
        return op.gelu(x, approximate="tanh")
    if name == "relu":
        return op.relu(x)
    if name == "relu2":
        return op.square(op.relu(x))
    raise AssertionError(f"the config reader let activation {name!r} through")


def soft_cap(x: nn.Tensor, cap: float) -> nn.Tensor:
    """cap * tanh(x / cap); 0: x as it is."""
    return op.tanh(x * (1 / cap)) * cap if cap else x


def scaled(x: nn.Tensor, factor: float) -> nn.Tensor:
    """x * factor, without an operation where the factor is 1."""
    return x if factor == 1 else x * factor


def take(x: nn.Tensor, indices: nn.Tensor, axis: int) -> nn.Tensor:
    """Slices of x along `axis`, indices clipped: a bad one never reads past the tensor."""
    expr = rx.op.take(x._expr, indices._expr, axis=axis, mode="clip")
    return nn.Tensor(_expr=rx.BlockBuilder.current().emit(expr))


class Linear(nn.Module):  # type: ignore[misc]
    """x [..., k] @ weight [n, k].T (+ bias [n])."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        """Make the parameters; their dtype is set when the model is exported."""
        self.weight = nn.Parameter((out_features, in_features))
        self.bias = nn.Parameter((out_features,)) if bias else None

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """Multiply; QuantizeWeights finds this very pattern."""
        y = op.matmul(x, op.permute_dims(self.weight))
        return y + self.bias if self.bias is not None else y


class Embedding(nn.Module):  # type: ignore[misc]
    """Rows of weight [vocab, h]; may serve as lm_head as well."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        """Make the table."""
        self.weight = nn.Parameter((vocab_size, hidden_size))

    def forward(self, ids: nn.Tensor) -> nn.Tensor:
        """ids int32[n] -> [n, h]; a bad id is clipped, never read past the table."""
        return take(self.weight, ids, axis=0)

    def logits(self, x: nn.Tensor) -> nn.Tensor:
        """x [..., h] -> [..., vocab] with the table as a linear layer."""
        return op.matmul(x, op.permute_dims(self.weight))


class RMSNorm(nn.Module):  # type: ignore[misc]
    """x / rms(x) * weight, in f32."""

    offset = 0.0  # added to the weight

    def __init__(self, size: int, eps: float) -> None:
        """Make the weight [size]."""
        self.weight = nn.Parameter((size,))
        self.eps = eps

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """Normalize the last axis."""
        weight = self.weight + self.offset if self.offset else self.weight
        return op.rms_norm(x, weight, axes=[-1], epsilon=self.eps)


class OffsetRMSNorm(RMSNorm):
    """x / rms(x) * (1 + weight), as in Gemma."""

    offset = 1.0


class LayerNorm(nn.Module):  # type: ignore[misc]
    """(x - mean) / std * (weight + offset) + bias; `has_bias` False: without bias."""

    has_bias = True
    offset = 0.0

    def __init__(self, size: int, eps: float) -> None:
        """Make weight and bias [size]."""
        self.weight = nn.Parameter((size,))
        self.bias = nn.Parameter((size,)) if self.has_bias else None
        self.eps = eps

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """Normalize the last axis."""
        weight = self.weight + self.offset if self.offset else self.weight
        return op.layer_norm(x, [x.shape[-1]], weight, self.bias, eps=self.eps)


class OffsetLayerNorm(LayerNorm):
    """(x - mean) / std * (1 + weight) + bias, as in Nemotron."""

    offset = 1.0


class BiaslessLayerNorm(LayerNorm):
    """(x - mean) / std * weight."""

    has_bias = False


class HeadLayerNorm(nn.Module):  # type: ignore[misc]
    """(x - mean) / std * weight of each head by itself; each has weights of its own."""

    def __init__(self, head_dim: int, size: int, eps: float) -> None:
        """Make the weight [size], head behind head."""
        self.weight = nn.Parameter((size,))
        self.head_dim, self.eps = head_dim, eps

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """x [..., size] -> the same."""
        ones = nn.Tensor.from_const(np.ones(self.head_dim, x.dtype))
        heads = op.reshape(x, (*x.shape[:-1], -1, self.head_dim))
        normal = op.layer_norm(heads, [self.head_dim], ones, None, eps=self.eps)
        return op.reshape(normal, x.shape) * self.weight


class GatedMLP(nn.Module):  # type: ignore[misc]
    """down(act(gate(x)) * up(x)), gate and up fused by rows."""

    def __init__(self, config: ModelConfig) -> None:
        """Make gate_up_proj and down_proj."""
        self.act = config.hidden_act
        self.gate_up_proj = Linear(
            config.hidden_size, 2 * config.intermediate_size, config.mlp_bias
        )
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, config.mlp_bias)

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """x [b, s, h] -> [b, s, h]."""
        gate, up = op.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj(activation(self.act, gate) * up)


class MLP(nn.Module):  # type: ignore[misc]
    """down(act(up(x))), the two layers under the architecture's names."""

    def __init__(self, config: ModelConfig, up: str = "up_proj", down: str = "down_proj") -> None:
        """Make the two layers."""
        self.act, self.names = config.hidden_act, (up, down)
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        setattr(self, up, Linear(hidden, inner, bias))
        setattr(self, down, Linear(inner, hidden, bias))

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """x [b, s, h] -> [b, s, h]."""
        up, down = (getattr(self, name) for name in self.names)
        found: Any = down(activation(self.act, up(x)))
        return found
