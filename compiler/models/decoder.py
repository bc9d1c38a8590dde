"""The decoder and its layers, and the functions of a causal language model that clients call.

Shapes: b sequences, s tokens of each, h hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tvm import te
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import op
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache

from qcc.compiler.config import ModelConfig
from qcc.compiler.models.attention import Attention, Step
from qcc.compiler.models.blocks import (
    Embedding,
    GatedMLP,
    Linear,
    RMSNorm,
    scaled,
    soft_cap,
    take,
)
from qcc.compiler.models.texts import encoded, texts_spec

if TYPE_CHECKING:
    from qcc.compiler.models.encoder import Encoder

MakeNorm = Callable[[int, float], nn.Module]


@dataclass(frozen=True)
class Names:
    """What Hugging Face calls the parts of an architecture's model."""

    model: str = "model"
    embedding: str = "embed_tokens"
    norm: str = "norm"
    lm_head: str = "lm_head"


class DecoderLayer(nn.Module):  # type: ignore[misc]
    """Pre-norm attention and MLP, each with a residual."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        attention: Callable[[ModelConfig, int], nn.Module] = Attention,
        mlp: Callable[[ModelConfig], nn.Module] = GatedMLP,
        norm: MakeNorm = RMSNorm,
    ) -> None:
        """Make the parts under Hugging Face's usual names."""
        self.residual_scale = config.residual_scale
        self.input_layernorm = norm(config.hidden_size, config.norm_eps)
        self.self_attn = attention(config, index)
        self.post_attention_layernorm = norm(config.hidden_size, config.norm_eps)
        self.mlp = mlp(config)

    def forward(self, x: nn.Tensor, step: Step) -> nn.Tensor:
        """x [b, s, h] -> [b, s, h]."""
        x = x + scaled(self.self_attn(self.input_layernorm(x), step), self.residual_scale)
        return x + scaled(self.mlp(self.post_attention_layernorm(x)), self.residual_scale)


class SandwichLayer(DecoderLayer):
    """Norms before and after attention and MLP, the latter within the residual, as in Gemma 2."""

    def __init__(self, config: ModelConfig, index: int, norm: MakeNorm, **parts: Any) -> None:
        """Make the parts under Hugging Face's names."""
        super().__init__(config, index, norm=norm, **parts)
        self.pre_feedforward_layernorm = norm(config.hidden_size, config.norm_eps)
        self.post_feedforward_layernorm = norm(config.hidden_size, config.norm_eps)

    def forward(self, x: nn.Tensor, step: Step) -> nn.Tensor:
        """x [b, s, h] -> [b, s, h]."""
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), step))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class PostNormLayer(nn.Module):  # type: ignore[misc]
    """Attention and MLP of x as it is, a norm after each, within the residual, as in OLMo 2."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        attention: Callable[[ModelConfig, int], nn.Module] = Attention,
    ) -> None:
        """Make the parts under Hugging Face's names."""
        self.self_attn = attention(config, index)
        self.mlp = GatedMLP(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, x: nn.Tensor, step: Step) -> nn.Tensor:
        """x [b, s, h] -> [b, s, h]."""
        x = x + self.post_attention_layernorm(self.self_attn(x, step))
        return x + self.post_feedforward_layernorm(self.mlp(x))


class ParallelLayer(nn.Module):  # type: ignore[misc]
    """Attention and MLP side by side, of one norm of x."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        norm: MakeNorm,
        attention: Callable[[ModelConfig, int], nn.Module] = Attention,
        mlp: Callable[[ModelConfig], nn.Module] = GatedMLP,
    ) -> None:
        """Make the parts under Hugging Face's names."""
        self.input_layernorm = norm(config.hidden_size, config.norm_eps)
        self.self_attn = attention(config, index)
        self.mlp = mlp(config)

    def forward(self, x: nn.Tensor, step: Step) -> nn.Tensor:
        """x [b, s, h] -> [b, s, h]."""
        normed = self.input_layernorm(x)
        return x + self.self_attn(normed, step) + self.mlp(normed)


class Decoder(nn.Module):  # type: ignore[misc]
    """Embedding, layers, last norm, under the architecture's names."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: Embedding,
        layers: list[nn.Module],
        norm: nn.Module,
        names: Names,
    ):
        """Name the parts."""
        self.config, self.names = config, names
        setattr(self, names.embedding, embedding)
        self.embed_positions = (
            Embedding(config.max_position_embeddings, config.hidden_size)
            if config.learned_positions
            else None
        )
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
        tokens = x.shape[0] * x.shape[1]
        if self.embed_positions is not None:
            x = x + op.reshape(self.embed_positions(kv.get_query_positions(tokens)), x.shape)
        step, found = Step.of(self.config, kv, tokens), []
        for layer in self.layers:
            x = layer(x, step)
            found.append(x)
        return [*found[:-1], getattr(self, self.names.norm)(x)]


class CausalLM(nn.Module):  # type: ignore[misc]
    """A decoder of layers and norm of one kind, and the functions that clients call.

    `layer(config, index)` and `norm(size, eps)` make the architecture's parts; a tied lm_head is
    the embedding's table.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: Callable[[ModelConfig, int], nn.Module] = DecoderLayer,
        norm: MakeNorm = RMSNorm,
        names: Names = Names(),
    ) -> None:
        """Make the whole model."""
        self.config, self.names = config, names
        self.exports_layers = False  # set it before `export`: `layer_outputs` is for debugging
        decoder = Decoder(
            config,
            Embedding(config.vocab_size, config.hidden_size),
            [layer(config, index) for index in range(config.num_hidden_layers)],
            norm(config.hidden_size, config.norm_eps),
            names,
        )
        setattr(self, names.model, decoder)
        if not config.tie_word_embeddings:
            setattr(
                self,
                names.lm_head,
                Linear(config.hidden_size, config.vocab_size, config.lm_head_bias),
            )

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
        return scaled(self.decoder.embedding(input_ids), self.config.embedding_scale)

    def _logits(self, x: nn.Tensor) -> nn.Tensor:
        logits = self.head(x)
        logits = logits.astype("float32") if logits.dtype != "float32" else logits
        return soft_cap(scaled(logits, self.config.logit_scale), self.config.logit_soft_cap)

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

    def encode(self, input_ids: nn.Tensor, ends: nn.Tensor) -> nn.Tensor:
        """Texts end to end, int32[n] and int32[b] -> f32[b, h]: the one function of `texts`."""
        return encoded(self.config, input_ids, ends, self.embed, self.hidden)

    def spec(self, dtype: str) -> dict[str, Any]:
        """Shapes and dtypes of every exported function, parameters packed."""
        if self.config.pooling is not None:
            return texts_spec()
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


def parameters(model: CausalLM | Encoder) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every parameter, in the order of the packed tuple."""
    return [(name, tuple(int(d) for d in param.shape)) for name, param in model.named_parameters()]


def export(model: CausalLM | Encoder, dtype: str) -> Any:
    """The float IRModule computing in `dtype`, parameters packed in the order of `parameters`."""
    model.to(dtype)
    mod, params = model.export_tvm(spec=model.spec(dtype))
    assert [name for name, _ in params] == [name for name, _ in parameters(model)]
    return mod
