"""BERT: learned positions, token types, norms after attention and MLP; an encoder of texts."""

from __future__ import annotations

from typing import Any

from qcc.compiler.config import ConfigReader, ModelConfig
from qcc.compiler.models.architecture import Architecture, Source, sources
from qcc.compiler.models.encoder import Encoder
from qcc.compiler.models.reading import read_common
from qcc.compiler.models.rope import NO_ROPE
from qcc.runtime.errors import QccError

# Of other heads than the embedding, of training, and of the pooler, which no embedding uses.
UNREAD = (
    *("directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers"),
    *("pooler_size_per_head", "pooler_type", "gradient_checkpointing", "tie_word_embeddings"),
)


def read_config(raw: dict[str, Any], where: str) -> ModelConfig:
    """config.json of a BertModel, or of one with a head that is left out."""
    return read_encoder(ConfigReader(raw, where), "bert")


def read_encoder(reader: ConfigReader, model_type: str, **switches: Any) -> ModelConfig:
    """The config of BERT and its kin, which have the same keys and defaults."""
    for key in UNREAD:
        reader.get(key)
    if reader.flag("is_decoder", False):
        raise QccError(f"{reader.where}: is_decoder true is not supported: it is an encoder here")
    reader.choice("position_embedding_type", ("absolute",), "absolute")
    return read_common(
        reader,
        model_type,
        default_positions=512,
        norm_eps=("layer_norm_eps", 1e-12),
        act=("hidden_act", "gelu"),
        tied=True,
        rope=NO_ROPE,
        learned_positions=True,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        bidirectional=True,
        token_types=reader.integer("type_vocab_size", 2),
        **switches,
    )


def encoder_source(prefix: str) -> Source:
    """The names of BERT's tensors; `prefix` is what a class with a head puts before them."""
    return sources(
        fused={"qkv_proj": ("query", "key", "value")},
        renamed={
            "model": prefix,
            "embed_tokens": "embeddings.word_embeddings",
            "embed_positions": "embeddings.position_embeddings",
            "embed_types": "embeddings.token_type_embeddings",
            "embed_norm": "embeddings.LayerNorm",
            "layers": "encoder.layer",
            "self_attn.o_proj": "attention.output.dense",
            "self_attn": "attention.self",
            "attention_norm": "attention.output.LayerNorm",
            "mlp.up_proj": "intermediate.dense",
            "mlp.down_proj": "output.dense",
            "output_norm": "output.LayerNorm",
        },
    )


# The pooler and heads, which make no embeddings, and a buffer.
IGNORED = ("*pooler.dense.*", "cls.*", "lm_head.*", "*embeddings.position_ids")
FLOATING = ("*.embed_positions.weight", "*.embed_types.weight")

ARCHITECTURE = Architecture(
    model_type="bert",
    hf_names=("BertModel", "BertForMaskedLM", "BertForPreTraining"),
    description="BERT and embedding models on it: BGE, E5, GTE, MiniLM",
    config=read_config,
    module=Encoder,
    source=encoder_source("bert"),
    ignored=IGNORED,
    floating=FLOATING,
)
