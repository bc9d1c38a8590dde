"""The parts of decoder-only models, as TVM nn modules with float parameters.

Attention goes through the paged KV cache, which also applies the rotary embedding. Nothing here
knows of quantization, devices or checkpoints. Shapes: b sequences, s tokens of each, h hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import relax as rx
from tvm import te
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import op
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache

from qcc.compiler.config import ModelConfig

ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu")


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
    raise AssertionError(f"the config reader let activation {name!r} through")


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

    def __init__(self, size: int, eps: float) -> None:
        """Make the weight [size]."""
        self.weight = nn.Parameter((size,))
        self.eps = eps

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """Normalize the last axis."""
        return op.rms_norm(x, self.weight, axes=[-1], epsilon=self.eps)


class LayerNorm(nn.Module):  # type: ignore[misc]
    """(x - mean) / std * weight + bias."""

    def __init__(self, size: int, eps: float) -> None:
        """Make weight and bias [size]."""
        self.weight = nn.Parameter((size,))
        self.bias = nn.Parameter((size,))
        self.eps = eps

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """Normalize the last axis."""
        return op.layer_norm(x, [x.shape[-1]], self.weight, self.bias, eps=self.eps)


class Attention(nn.Module):  # type: ignore[misc]
    """Grouped-query attention over the paged KV cache."""

    def __init__(self, config: ModelConfig, out_name: str = "o_proj") -> None:
        """Make qkv_proj (rows q, k, v) and the output projection under `out_name`."""
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv_proj = Linear(config.hidden_size, rows, config.qkv_bias)
        self.out_name = out_name
        setattr(
            self, out_name, Linear(self.heads * self.head_dim, config.hidden_size, config.o_bias)
        )

    def forward(self, x: nn.Tensor, kv: PagedKVCache, layer: int) -> nn.Tensor:
        """x [b, s, h] -> [b, s, h]."""
        b, s, _ = x.shape
        qkv = op.reshape(
            self.qkv_proj(x), (b, s, self.heads + 2 * self.kv_heads, self.head_dim)
        )  # [b, s, q + k + v heads, d]
        out = kv.attention_with_fused_qkv(layer, qkv, self.heads, self.head_dim**-0.5)
        return getattr(self, self.out_name)(op.reshape(out, (b, s, self.heads * self.head_dim)))


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


@dataclass(frozen=True)
class Names:
    """What Hugging Face calls the parts of an architecture's model."""

    model: str = "model"
    embedding: str = "embed_tokens"
    norm: str = "norm"
    lm_head: str = "lm_head"


class Decoder(nn.Module):  # type: ignore[misc]
    """Embedding, layers, last norm, under the architecture's names."""

    def __init__(
        self, embedding: Embedding, layers: list[nn.Module], norm: nn.Module, names: Names
    ):
        """Name the parts."""
        self.names = names
        setattr(self, names.embedding, embedding)
        self.layers = nn.ModuleList(layers)
        setattr(self, names.norm, norm)

    @property
    def embedding(self) -> Embedding:
        """The embedding table."""
        found: Embedding = getattr(self, self.names.embedding)
        return found

    def forward(self, x: nn.Tensor, kv: PagedKVCache) -> nn.Tensor:
        """x [b, s, h] embeddings -> [b, s, h]."""
        return self.outputs(x, kv)[-1]

    def outputs(self, x: nn.Tensor, kv: PagedKVCache) -> list[nn.Tensor]:
        """x [b, s, h] embeddings -> [b, s, h] after each layer; the last norm after the last."""
        found = []
        for index, layer in enumerate(self.layers):
            x = layer(x, kv, index)
            found.append(x)
        return [*found[:-1], getattr(self, self.names.norm)(x)]


class CausalLM(nn.Module):  # type: ignore[misc]
    """A decoder of layers and norm of one kind, and the functions that clients call.

    `layer(config)` and `norm(size, eps)` make the architecture's parts; a tied lm_head is the
    embedding's table.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: Callable[[ModelConfig], nn.Module],
        norm: Callable[[int, float], nn.Module],
        names: Names,
    ) -> None:
        """Make the whole model."""
        self.config, self.names = config, names
        self.exports_layers = False  # set it before `export`: `layer_outputs` is for debugging
        decoder = Decoder(
            Embedding(config.vocab_size, config.hidden_size),
            [layer(config) for _ in range(config.num_hidden_layers)],
            norm(config.hidden_size, config.norm_eps),
            names,
        )
        setattr(self, names.model, decoder)
        if not config.tie_word_embeddings:
            setattr(self, names.lm_head, Linear(config.hidden_size, config.vocab_size, bias=False))

    @property
    def decoder(self) -> Decoder:
        """Everything but lm_head."""
        found: Decoder = getattr(self, self.names.model)
        return found

    def hidden(self, x: nn.Tensor, kv: PagedKVCache) -> nn.Tensor:
        """x [b, s, h] embeddings -> [b, s, h] after the last norm."""
        return self.decoder(x, kv)

    def head(self, x: nn.Tensor) -> nn.Tensor:
        """x [b, s, h] -> logits [b, s, vocab]."""
        if self.config.tie_word_embeddings:
            return self.decoder.embedding.logits(x)
        return getattr(self, self.names.lm_head)(x)

    def embed(self, input_ids: nn.Tensor) -> nn.Tensor:
        """int32[n] -> [n, h]."""
        return self.decoder.embedding(input_ids)

    def _logits(self, x: nn.Tensor) -> nn.Tensor:
        logits = self.head(x)
        return logits.astype("float32") if logits.dtype != "float32" else logits

    def prefill(self, input_embed: nn.Tensor, kv: PagedKVCache) -> tuple[nn.Tensor, PagedKVCache]:
        """[1, n, h] of one sequence -> logits f32[1, 1, vocab] of its last position."""

        def last(x: te.Tensor) -> te.Tensor:
            n, h = x.shape[1], x.shape[2]
            return te.compute((1, 1, h), lambda _, i, k: x[0, n - 1 + i, k], name="last_position")

        x = self.hidden(input_embed, kv)
        return self._logits(op.tensor_expr_op(last, "last_position", [x])), kv

    def decode(self, input_embed: nn.Tensor, kv: PagedKVCache) -> tuple[nn.Tensor, PagedKVCache]:
        """[1, 1, h] -> logits f32[1, 1, vocab]."""
        return self._logits(self.hidden(input_embed, kv)), kv

    def batch_prefill(
        self, input_embeds: nn.Tensor, logit_positions: nn.Tensor, kv: PagedKVCache
    ) -> tuple[nn.Tensor, PagedKVCache]:
        """[1, n, h] of several sequences end to end, int32[b] -> logits f32[1, b, vocab]."""
        return self._logits(take(self.hidden(input_embeds, kv), logit_positions, axis=1)), kv

    def batch_decode(
        self, input_embeds: nn.Tensor, kv: PagedKVCache
    ) -> tuple[nn.Tensor, PagedKVCache]:
        """[b, 1, h] -> logits f32[b, 1, vocab]."""
        return self._logits(self.hidden(input_embeds, kv)), kv

    def batch_verify(
        self, input_embeds: nn.Tensor, kv: PagedKVCache
    ) -> tuple[nn.Tensor, PagedKVCache]:
        """[1, n, h] -> logits f32[1, n, vocab] of every position."""
        return self._logits(self.hidden(input_embeds, kv)), kv

    def layer_outputs(
        self, input_embeds: nn.Tensor, kv: PagedKVCache
    ) -> tuple[nn.Tensor, PagedKVCache]:
        """[1, n, h] of one sequence -> f32[layers, n, h] after each layer; to find a wrong one."""
        stacked = op.concat(self.decoder.outputs(input_embeds, kv), dim=0)
        return stacked.astype("float32") if stacked.dtype != "float32" else stacked, kv

    def spec(self, dtype: str) -> dict[str, Any]:
        """Shapes and dtypes of every exported function, parameters packed."""
        h = self.config.hidden_size
        cache = nn.spec.Object(object_type=PagedKVCache)
        mode = {"param_mode": "packed", "effect_mode": "none"}

        def embeds(*shape: int | str) -> nn.spec.Tensor:
            return nn.spec.Tensor([*shape, h], dtype)

        functions = {
            "embed": {"input_ids": nn.spec.Tensor(["n"], "int32"), "$": mode},
            "prefill": {"input_embed": embeds(1, "n"), "kv": cache, "$": mode},
            "decode": {"input_embed": embeds(1, 1), "kv": cache, "$": mode},
            "batch_prefill": {
                "input_embeds": embeds(1, "n"),
                "logit_positions": nn.spec.Tensor(["b"], "int32"),
                "kv": cache,
                "$": mode,
            },
            "batch_decode": {"input_embeds": embeds("b", 1), "kv": cache, "$": mode},
            "batch_verify": {"input_embeds": embeds(1, "n"), "kv": cache, "$": mode},
        }
        if self.exports_layers:
            functions["layer_outputs"] = dict(functions["batch_verify"])
        return functions


def parameters(model: CausalLM) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every parameter, in the order of the packed tuple."""
    return [(name, tuple(int(d) for d in param.shape)) for name, param in model.named_parameters()]


def export(model: CausalLM, dtype: str) -> Any:
    """The float IRModule computing in `dtype`, parameters packed in the order of `parameters`."""
    model.to(dtype)
    mod, params = model.export_tvm(spec=model.spec(dtype))
    assert [name for name, _ in params] == [name for name, _ in parameters(model)]
    return mod
