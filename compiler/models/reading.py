"""The fields of config.json that all decoder-only architectures share, read in one place."""

from __future__ import annotations

from typing import Any

from qcc.compiler.config import ConfigReader, ModelConfig, attention_heads
from qcc.compiler.models.blocks import ACTIVATIONS
from qcc.compiler.models.rope import rope_from_hf


def read_common(
    reader: ConfigReader,
    model_type: str,
    *,
    default_positions: int,
    default_kv_heads: int | None = None,
    norm_eps: tuple[str, float] = ("rms_norm_eps", 1e-6),
    default_act: str = "silu",
    rope_keys: dict[str, Any] | None = None,
    **switches: Any,
) -> ModelConfig:
    """A ModelConfig whose defaults are those of transformers' config class of `model_type`.

    Args:
        reader: of config.json; refuses here what nobody read.
        model_type: the architecture's own.
        default_positions: max_position_embeddings where the key is absent.
        default_kv_heads: num_key_value_heads where the key is absent; None: as many as heads.
        norm_eps: the norm's key and its default.
        default_act: hidden_act where the key is absent.
        rope_keys: the architecture's own names, as `rope_from_hf` takes them.
        switches: the fields of ModelConfig that differ between architectures.
    """
    hidden, heads, kv_heads, head_dim = attention_heads(reader, default_kv_heads)
    positions = reader.integer("max_position_embeddings", default_positions)
    config = ModelConfig(
        model_type=model_type,
        hidden_size=hidden,
        intermediate_size=reader.integer("intermediate_size"),
        num_hidden_layers=reader.integer("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=reader.integer("vocab_size"),
        max_position_embeddings=positions,
        norm_eps=reader.number(*norm_eps),
        hidden_act=reader.choice("hidden_act", ACTIVATIONS, default_act),
        tie_word_embeddings=reader.flag("tie_word_embeddings", False),
        rope=rope_from_hf(reader, head_dim, positions, **(rope_keys or {})),
        **switches,
    )
    reader.finish()
    return config
