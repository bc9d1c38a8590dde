"""Texts packed end to end, each seen whole in one pass: what layers ask of a KV cache, without one.

Attention is a call of ATTENTION, for which AttachTextAttention puts the target's kernel. Shapes:
n tokens of b texts, d head_dim, h hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import op

from qcc.compiler.config import ModelConfig
from qcc.compiler.models.attention import angles_of, rotated

ATTENTION = "qcc.text_attention"
MIN_LENGTH = 1e-12  # a vector of zeros stays one


class Texts:
    """The texts of one pass, in place of the KV cache that layers take."""

    def __init__(self, config: ModelConfig, ends: nn.Tensor, tokens: tirx.Expr) -> None:
        """`ends` int32[b]: one past the last token of each text, ascending, the last one n."""
        self.config = config
        self.starts = _starts(ends)
        self.first_positions = op.zeros(ends.shape, "int32")
        self.positions = _positions(self.starts, tokens)
        # Else the layers rotate, as they do before a cache.
        self.angles = (
            angles_of(config.rope, config, self.positions, tokens)
            if config.rope.rotary_dim and not config.rotates_in_graph
            else None
        )

    def get_query_positions(self, _tokens: tirx.Expr) -> nn.Tensor:
        """int32[n]: the position of each token in its text."""
        return self.positions

    def attention_with_fused_qkv(
        self, _layer: int, qkv: nn.Tensor, heads: int, scale: float
    ) -> nn.Tensor:
        """qkv [1, n, q + k + v heads, d] -> [1, n, heads, d], each text by itself.

        A negative scale is that of a layer with a window.
        """
        kv_heads = self.config.num_key_value_heads
        if self.angles is not None:
            qkv = rotated(qkv, self.angles, heads + kv_heads)
        _, n, _, d = qkv.shape
        parts = op.split(qkv, [heads, heads + kv_heads], axis=2)
        q, k, v = (
            op.reshape(part, (n, count, d))
            for part, count in zip(parts, (heads, kv_heads, kv_heads), strict=True)
        )
        out = op.extern(
            ATTENTION,
            [q, k, v, self.starts, self.positions, self.first_positions, scale],
            nn.Tensor.placeholder((n, heads, d), qkv.dtype),
        )
        return op.reshape(out, (1, n, heads, d))

    def pooled(self, x: nn.Tensor) -> nn.Tensor:
        """x [1, n, h] after the last layer -> a vector of each text, f32[b, h]."""
        pooling = self.config.pooling
        assert pooling is not None, "not an embedding model"
        x = x.astype("float32") if x.dtype != "float32" else x
        vectors = op.tensor_expr_op(_POOLS[pooling.kind], f"pool_{pooling.kind}", [x, self.starts])
        return _normalized(vectors) if pooling.normalized else vectors


def encoded(
    config: ModelConfig,
    input_ids: nn.Tensor,
    ends: nn.Tensor,
    embed: Callable[[nn.Tensor], nn.Tensor],
    hidden: Callable[[nn.Tensor, Any], nn.Tensor],
) -> nn.Tensor:
    """A vector of each text, f32[b, h].

    Args:
        config: of an embedding model.
        input_ids: int32[n], the texts' tokens end to end.
        ends: int32[b], as Texts takes them.
        embed: int32[n] -> [n, h].
        hidden: ([1, n, h], Texts) -> [1, n, h] after the last layer and norm.
    """
    (n,) = input_ids.shape
    texts = Texts(config, ends, n)
    x = op.reshape(embed(input_ids), (1, n, config.hidden_size))
    return texts.pooled(hidden(x, texts))


def texts_spec() -> dict[str, Any]:
    """Shapes and dtypes of `encode`, parameters packed, as a model's `spec`."""
    return {
        "encode": {
            "input_ids": nn.spec.Tensor(["n"], "int32"),
            "ends": nn.spec.Tensor(["b"], "int32"),
            "$": {"param_mode": "packed", "effect_mode": "none"},
        }
    }


def _starts(ends: nn.Tensor) -> nn.Tensor:
    """int32[b + 1]: the first token of each text, and n."""

    def compute(ends: te.Tensor) -> te.Tensor:
        zero = tirx.const(0, "int32")
        return te.compute(
            (ends.shape[0] + 1,),
            lambda i: tirx.if_then_else(i > 0, ends[tirx.max(i - 1, 0)], zero),
            name="text_starts",
        )

    return op.tensor_expr_op(compute, "text_starts", [ends])


def _positions(starts: nn.Tensor, tokens: tirx.Expr) -> nn.Tensor:
    """int32[n]: a token's number, less the lengths of the texts before its own."""

    def compute(starts: te.Tensor) -> te.Tensor:
        text = te.reduce_axis((0, starts.shape[0] - 1), name="text")

        def length(i: tirx.Var) -> tirx.Expr:
            passed = starts[text + 1] <= i.astype("int32")
            return tirx.Select(passed, starts[text + 1] - starts[text], tirx.const(0, "int32"))

        before = te.compute((tokens,), lambda i: te.sum(length(i), axis=text), name="before")
        return te.compute((tokens,), lambda i: i.astype("int32") - before[i], name="positions")

    return op.tensor_expr_op(compute, "text_positions", [starts])


def _first(x: te.Tensor, starts: te.Tensor) -> te.Tensor:
    """The vector of each text's first token."""
    shape = (starts.shape[0] - 1, x.shape[2])
    return te.compute(shape, lambda b, h: x[0, starts[b].astype("int64"), h], name="first")


def _last(x: te.Tensor, starts: te.Tensor) -> te.Tensor:
    """The vector of each text's last token."""
    shape = (starts.shape[0] - 1, x.shape[2])
    return te.compute(shape, lambda b, h: x[0, starts[b + 1].astype("int64") - 1, h], name="last")


def _mean(x: te.Tensor, starts: te.Tensor) -> te.Tensor:
    """The mean over each text's tokens."""
    shape = (starts.shape[0] - 1, x.shape[2])
    token = te.reduce_axis((0, x.shape[1]), name="token")

    def term(b: tirx.Var, h: tirx.Var) -> tirx.Expr:
        number = token.var.astype("int32")
        inside = tirx.all(number >= starts[b], number < starts[b + 1])
        return tirx.if_then_else(inside, x[0, token, h], tirx.const(0, "float32"))

    total = te.compute(shape, lambda b, h: te.sum(term(b, h), axis=token), name="total")

    def mean(b: tirx.Var, h: tirx.Var) -> tirx.Expr:
        return total[b, h] / (starts[b + 1] - starts[b]).astype("float32")

    return te.compute(shape, mean, name="mean")


_POOLS = {"cls": _first, "mean": _mean, "last": _last}


def _normalized(vectors: nn.Tensor) -> nn.Tensor:
    """f32[b, h], each divided by its length."""

    def compute(x: te.Tensor) -> te.Tensor:
        b, h = x.shape
        k = te.reduce_axis((0, h), name="k")
        square = te.compute((b,), lambda i: te.sum(x[i, k] * x[i, k], axis=k), name="square")
        least = tirx.const(MIN_LENGTH, "float32")
        return te.compute(
            (b, h), lambda i, j: x[i, j] / tirx.max(tirx.sqrt(square[i]), least), name="unit"
        )

    return op.tensor_expr_op(compute, "unit_vectors", [vectors])
