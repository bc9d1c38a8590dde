"""Attention over the paged KV cache, and rotary embeddings that the graph makes itself.

Where all layers rotate alike the cache rotates q and k, from its table. Where they differ (another
base in some layers, or no rotation) the graph does it, from the positions that the cache tells.
Shapes: b sequences, s tokens of each, n = b * s, h hidden size, d head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from tvm import te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import op
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache

from qcc.compiler.config import ModelConfig, RopeConfig
from qcc.compiler.models.blocks import Linear
from qcc.compiler.models.rope import frequencies

Angles = tuple[nn.Tensor, nn.Tensor]  # cos, sin f32[n, rotary_dim / 2]


@dataclass(frozen=True)
class Step:
    """What the layers share in one forward pass: the cache, and angles by the rope's name.

    `heads` int32[n, heads] is 0, 1, 2... for each token, for latent attention.
    """

    kv: PagedKVCache
    angles: Mapping[str, Angles]
    heads: nn.Tensor | None = None

    @classmethod
    def of(cls, config: ModelConfig, kv: PagedKVCache, tokens: tirx.Expr) -> Step:
        """The step of a pass over `tokens` tokens of all sequences together."""
        if config.latent is not None:
            return cls(kv, {}, _heads(tokens, config.num_attention_heads))
        if not config.rotates_in_graph:
            return cls(kv, {})
        positions = kv.get_query_positions(tokens)
        ropes = {name: config.rope_of(name) for name in dict.fromkeys(config.layer_ropes) if name}
        return cls(
            kv, {name: angles_of(rope, config, positions, tokens) for name, rope in ropes.items()}
        )


def _heads(tokens: tirx.Expr, count: int) -> nn.Tensor:
    """The numbers of all heads, for each token."""

    def compute() -> te.Tensor:
        return te.compute((tokens, count), lambda _, head: head.astype("int32"), name="heads")

    return op.tensor_expr_op(compute, "heads", [])


def angles_of(
    rope: RopeConfig, config: ModelConfig, positions: nn.Tensor, tokens: tirx.Expr
) -> Angles:
    """cos and sin of every token's position."""
    inv_freq, factor = frequencies(rope, config.rope_length or config.max_position_embeddings)
    table = nn.Tensor.from_const(np.array(inv_freq, np.float32))

    def make(function: Callable[[te.Tensor], te.Tensor], name: str) -> nn.Tensor:
        def compute(where: te.Tensor, freq: te.Tensor) -> te.Tensor:
            return te.compute(
                (tokens, len(inv_freq)),
                lambda i, j: (
                    function(where[i].astype("float32") * freq[j]) * tirx.const(factor, "float32")
                ),
                name=name,
            )

        return op.tensor_expr_op(compute, name, [positions, table])

    return make(te.cos, "rope_cos"), make(te.sin, "rope_sin")


def rotated(x: nn.Tensor, angles: Angles, heads: int) -> nn.Tensor:
    """x [b, s, all heads, d] with its first `heads` rotated by pairs (i, i + rotary_dim / 2)."""

    def compute(x: te.Tensor, cos: te.Tensor, sin: te.Tensor) -> te.Tensor:
        half, s = int(cos.shape[1]), x.shape[1]

        def value(b: tirx.Var, i: tirx.Var, head: tirx.Var, d: tirx.Var) -> tirx.Expr:
            token, pair = b * s + i, d % half
            own = x[b, i, head, d].astype("float32")
            # Indices stay within the tensor in the branches that are not taken, too.
            other = x[b, i, head, tirx.Select(d < half, d + half, pair)].astype("float32")
            turned = (
                own * cos[token, pair] + tirx.Select(d < half, -other, other) * sin[token, pair]
            )
            is_turned = tirx.all(head < heads, d < 2 * half)
            return tirx.if_then_else(is_turned, turned, own).astype(x.dtype)

        return te.compute(x.shape, value, name="rotated")

    return op.tensor_expr_op(compute, "rotated", [x, *angles])


class Attention(nn.Module):  # type: ignore[misc]
    """Grouped-query attention of one layer over the paged KV cache.

    `qk_norm(size, eps)` makes the norms of q and k, before they are rotated: of each head, or of
    all heads as one vector where `whole`.
    """

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        out_name: str = "o_proj",
        qk_norm: Callable[[int, float], nn.Module] | None = None,
        whole: bool = False,
    ) -> None:
        """Make qkv_proj (rows q, k, v), the output projection under `out_name`, and the norms."""
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.index, self.whole = config.head_dim, index, whole
        # The cache's kernels take a negative scale for a layer with a window.
        self.scale = config.attention_scale or config.head_dim**-0.5
        self.scale *= -1 if config.is_windowed(index) else 1
        self.rope = config.layer_ropes[index] if config.rotates_in_graph else ""
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv_proj = Linear(config.hidden_size, rows, config.qkv_bias)
        self.out_name = out_name
        setattr(
            self, out_name, Linear(self.heads * self.head_dim, config.hidden_size, config.o_bias)
        )
        self.q_norm = self.k_norm = None
        if qk_norm is not None:
            heads = (self.heads, self.kv_heads) if whole else (1, 1)
            self.q_norm, self.k_norm = (qk_norm(n * self.head_dim, config.norm_eps) for n in heads)

    def forward(self, x: nn.Tensor, step: Step) -> nn.Tensor:
        """x [b, s, h] -> [b, s, h]."""
        b, s, _ = x.shape
        qkv = op.reshape(
            self.qkv_proj(x), (b, s, self.heads + 2 * self.kv_heads, self.head_dim)
        )  # [b, s, q + k + v heads, d]
        if self.q_norm is not None:
            q, k, v = op.split(qkv, [self.heads, self.heads + self.kv_heads], axis=2)
            qkv = op.concat([self._normed(self.q_norm, q), self._normed(self.k_norm, k), v], dim=2)
        if self.rope:
            qkv = rotated(qkv, step.angles[self.rope], self.heads + self.kv_heads)
        out = self.attend(qkv, step)
        return getattr(self, self.out_name)(op.reshape(out, (b, s, self.heads * self.head_dim)))

    def attend(self, qkv: nn.Tensor, step: Step) -> nn.Tensor:
        """[b, s, q + k + v heads, d] -> [b, s, q heads, d], with the keys before them."""
        return step.kv.attention_with_fused_qkv(self.index, qkv, self.heads, self.scale)

    def _normed(self, norm: nn.Module, x: nn.Tensor) -> nn.Tensor:
        if not self.whole:
            return norm(x)
        b, s, heads, d = x.shape
        return op.reshape(norm(op.reshape(x, (b, s, heads * d))), (b, s, heads, d))
