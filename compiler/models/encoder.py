"""Encoders as BERT is one: every token sees all of its text, norms follow attention and MLP.

Shapes: n tokens of all texts, h hidden size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import op

from qcc.compiler.config import ModelConfig
from qcc.compiler.models.attention import Attention, Step
from qcc.compiler.models.blocks import MLP, Embedding, LayerNorm
from qcc.compiler.models.texts import Texts, encoded, texts_spec


class EncoderLayer(nn.Module):  # type: ignore[misc]
    """Attention and MLP, each with a residual and a norm of the sum."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        """Make the parts."""
        self.self_attn = Attention(config, index)
        self.attention_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)
        self.output_norm = LayerNorm(config.hidden_size, config.norm_eps)

    def forward(self, x: nn.Tensor, step: Step) -> nn.Tensor:
        """x [1, n, h] -> [1, n, h]."""
        x = self.attention_norm(x + self.self_attn(x, step))
        return self.output_norm(x + self.mlp(x))


class EncoderStack(nn.Module):  # type: ignore[misc]
    """Tables of tokens, positions and kinds of tokens, and the layers."""

    def __init__(self, config: ModelConfig) -> None:
        """Make the parts."""
        hidden = config.hidden_size
        self.embed_tokens = Embedding(config.vocab_size, hidden)
        positions = config.unused_positions + config.max_position_embeddings
        self.embed_positions = Embedding(positions, hidden)
        self.embed_types = Embedding(config.token_types, hidden)
        self.embed_norm = LayerNorm(hidden, config.norm_eps)
        self.layers = nn.ModuleList(
            [EncoderLayer(config, index) for index in range(config.num_hidden_layers)]
        )


class Encoder(nn.Module):  # type: ignore[misc]
    """A stack of layers, and the function that clients call."""

    def __init__(self, config: ModelConfig) -> None:
        """Make the whole model."""
        self.config = config
        self.model = EncoderStack(config)

    def hidden(self, x: nn.Tensor, texts: Texts) -> nn.Tensor:
        """x [1, n, h] of the tokens' table -> [1, n, h] after the last layer."""
        model, n = self.model, x.shape[1]
        rows = texts.positions
        if self.config.unused_positions:
            rows = rows + nn.Tensor.from_const(np.array(self.config.unused_positions, np.int32))
        x = x + op.reshape(model.embed_positions(rows), x.shape)
        x = model.embed_norm(x + self._kind())
        step = Step.of(self.config, texts, n)
        for layer in model.layers:
            x = layer(x, step)
        return x

    def _kind(self) -> nn.Tensor:
        """[1, h]: all of a text is of the first kind; the second is for the second of a pair."""
        table = self.model.embed_types
        if self.config.token_types == 1:
            return table.weight
        return table(nn.Tensor.from_const(np.zeros(1, np.int32)))

    def encode(self, input_ids: nn.Tensor, ends: nn.Tensor) -> nn.Tensor:
        """Texts end to end, int32[n] and int32[b] -> f32[b, h]: the one function of `texts`."""
        return encoded(self.config, input_ids, ends, self.model.embed_tokens, self.hidden)

    def spec(self, _dtype: str) -> dict[str, Any]:
        """Shapes and dtypes of the exported function."""
        return texts_spec()
