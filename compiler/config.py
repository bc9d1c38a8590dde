"""config.json -> ModelConfig: read once, checked once, nothing ignored in silence.

A key that no architecture reads and that is not known to be harmless is refused: a dropped key
yields fluent rubbish.
"""

from __future__ import annotations

import json
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcc.compiler.maxima import INT32_MAX, MAXIMA
from qcc.compiler.recurrent_config import DeltaConfig, MambaConfig, StateTensor
from qcc.quant_schemes.errors import did_you_mean
from qcc.runtime.errors import QccError

# Keys that say nothing about the numbers of a forward pass at inference.
HARMLESS_KEYS = frozenset(
    """
    architectures auto_map torch_dtype dtype transformers_version _name_or_path use_cache
    initializer_range pretraining_tp bos_token_id eos_token_id pad_token_id unk_token_id
    attention_dropout hidden_dropout classifier_dropout attention_probs_dropout_prob
    hidden_dropout_prob resid_pdrop embd_pdrop attn_pdrop embedding_dropout residual_dropout
    embed_dropout
    gradient_checkpointing model_type is_decoder
    output_attentions output_hidden_states return_dict use_return_dict torchscript
    chunk_size_feed_forward
    id2label label2id problem_type task_specific_params _attn_implementation
    _attn_implementation_autoset tokenizer_class finetuning_task cross_attention_hidden_size
    add_cross_attention is_encoder_decoder tie_encoder_decoder pruned_heads
    keys_to_ignore_at_inference
    is_llama_config transformers.js_config unsloth_fixed unsloth_version max_sequence_length
    tokenizer_model_max_length tokenizer_padding_side
    """.split()
)
# Switches that some checkpoints write down although they are off; any other value is refused.
HARMLESS_AT: dict[str, Any] = {
    "use_mrope": False,  # DeepSeek-R1-Distill-Qwen
    "rope_interleaved": False,  # SmolLM2
    "attention_bias": False,  # architectures without these biases do not read the key
    "mlp_bias": False,
    "use_bidirectional_attention": False,  # Gemma; True is an embedding model's
}
QUANTIZED_KEYS = ("quantization_config", "compression_config")
# Every key that a ConfigReader is asked for, while somebody set it to a set.
KEYS_READ: ContextVar[set[str] | None] = ContextVar("KEYS_READ", default=None)
# Of a quantization_config; qcc.compiler.imports reads them.
IMPORTED_METHODS = ("gptq", "awq", "fp8", "mxfp4")


def shown(value: Any) -> str:
    """A value as an error quotes it: one line, and short however long the value."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deep, or an integer of 5000 digits
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= 60 else f"{text[:57]}..."


class UnknownKey(QccError):
    """A key of config.json that its architecture does not know."""

    def __init__(self, key: str, text: str) -> None:
        """`text`: the whole error."""
        super().__init__(text)
        self.key = key


class ConfigReader:
    """Reads a raw config by key, remembers what was read, and refuses the rest at the end."""

    def __init__(self, raw: dict[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where
        self._read: set[str] = set()

    def _note(self, key: str) -> None:
        """Remember that `key` was read, here and for whoever listens."""
        self._read.add(key)
        heard = KEYS_READ.get()
        if heard is not None:
            heard.add(key)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`, or `default` where it is absent or null."""
        self._note(key)
        value = self.raw.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        """A whole number from `minimum` to what MAXIMA says of `key` (else to int32's end)."""
        value = self.get(key, default)
        maximum = MAXIMA.get(key, INT32_MAX)
        if type(value) is not int or not minimum <= value <= maximum:
            raise QccError(
                f"{self.where}: {key} is {shown(value)}, it must be a whole number >= {minimum} "
                f"and <= {maximum}"
            )
        return value

    def optional(self, key: str, default: int | None = None) -> int | None:
        """A whole number from 1, or None where the key is null; `default` where it is absent."""
        self._note(key)
        if key not in self.raw:
            return default
        return None if self.get(key) is None else self.integer(key)

    def soft_cap(self, key: str, default: float) -> float:
        """A positive number, or 0 where the key is null: no cap; `default` where it is absent."""
        self._note(key)
        if key not in self.raw:
            return default
        return 0.0 if self.raw[key] is None else self.number(key)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite positive number."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
            raise QccError(f"{self.where}: {key} is {shown(value)}, it must be a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise QccError(f"{self.where}: {key} is {shown(value)}, it must be true or false")
        return value

    def choice(self, key: str, allowed: tuple[str, ...], default: str | None = None) -> str:
        """One of `allowed`."""
        value = self.get(key, default)
        if value not in allowed:
            raise QccError(
                f"{self.where}: {key} {shown(value)} is not supported; "
                f"supported: {', '.join(allowed)}"
            )
        return str(value)

    def finish(self) -> None:
        """Refuse every key that was neither read nor is known to be harmless."""
        for key in QUANTIZED_KEYS:
            value = self.raw.get(key)
            method = value.get("quant_method") if isinstance(value, dict) else None
            if value and (key != "quantization_config" or method not in IMPORTED_METHODS):
                raise QccError(
                    f"{self.where}: it has a {key} {shown(method or value)}: of quantized "
                    f"checkpoints only {', '.join(IMPORTED_METHODS)} (safetensors) and GGUF "
                    "files are read; compile the float checkpoint that it was made from"
                )
        for key, value in self.raw.items():
            if (
                key in (*QUANTIZED_KEYS, *self._read, *HARMLESS_KEYS)
                or value is None
                or value == {}
            ):
                continue
            # `is`, as 0 and 0.0 equal False in Python.
            if key in HARMLESS_AT and value is HARMLESS_AT[key]:
                continue
            hint = did_you_mean(key, self._read)
            raise UnknownKey(
                key,
                f"{self.where}: unknown key {shown(key)} = {shown(value)}{hint}; it may change "
                "the numbers, so it is refused; remove it if it does not",
            )


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: the type, base, rotated dimensions and the type's own numbers."""

    rope_type: str
    theta: float
    rotary_dim: int
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    rotated: int = 0  # pairs that turn, of "proportional"


@dataclass(frozen=True)
class ExpertsConfig:
    """The experts of a layer: `count` of `intermediate_size`, of which a token uses `per_token`.

    A token's weights for its experts are their scores, divided by their sum if `normalized`, times
    `weight_scale`. They all come from `groups_per_token` of the `groups` of equal size that experts
    with neighbouring numbers form.
    `shared_size` is the intermediate size of the expert that all tokens use; 0: there is none.
    `dense_layers` are those that have a usual MLP instead. `swiglu`, of gpt-oss, is (alpha, limit);
    `packed` experts are stored as MXFP4, [out, in].
    """

    count: int
    per_token: int
    intermediate_size: int
    normalized: bool
    shared_size: int = 0
    dense_layers: tuple[int, ...] = ()
    weight_scale: float = 1.0
    groups: int = 1
    groups_per_token: int = 1
    swiglu: tuple[float, float] | None = None
    packed: bool = False


@dataclass(frozen=True)
class LatentConfig:
    """The sizes of multi-head latent attention, under Hugging Face's names.

    A head's query and key are qk_nope_head_dim numbers that are not rotated, then those that are,
    in pairs (2 i, 2 i + 1) if `interleaved`. q_lora_rank 0: queries are made of x in one step.
    """

    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    interleaved: bool = False

    @property
    def query_dim(self) -> int:
        """Numbers of a head's query."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cached(self) -> int:
        """Numbers of what the cache holds of a token."""
        return self.qk_rope_head_dim + self.kv_lora_rank


@dataclass(frozen=True)
class PoolingConfig:
    """How an embedding model makes one vector of a text's tokens: `kind` is cls, mean or last."""

    kind: str
    normalized: bool = True  # to length 1


@dataclass(frozen=True)
class ModelConfig:
    """What the blocks are built from; the names are Hugging Face's where it has one.

    `sliding_window` is that of models whose layers all have it: their cache rolls. `layer_window`
    is the window, in tokens, of the layers that `windowed` marks; the cache keeps all tokens.
    `layer_ropes` names each layer's rope: "rope", "local_rope", or "" for none; () where all layers
    have `rope`. The scales multiply embeddings, what a layer adds to the residual, and logits.
    `rope_length` is what rope types that depend on the length are made for. With `latent` attention
    num_key_value_heads and head_dim are those of the cache. An embedding model has `pooling` and no
    lm_head.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    hidden_act: str
    tie_word_embeddings: bool
    rope: RopeConfig
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    lm_head_bias: bool = False
    sliding_window: int | None = None
    parallel_residual: bool = False
    attention_scale: float | None = None  # of the scores; None: head_dim ** -0.5
    attention_soft_cap: float = 0.0
    logit_soft_cap: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    layer_window: int = 0
    windowed: tuple[bool, ...] = ()
    local_rope: RopeConfig | None = None
    layer_ropes: tuple[str, ...] = ()
    rope_length: int = 0
    experts: ExpertsConfig | None = None
    latent: LatentConfig | None = None
    delta: DeltaConfig | None = None
    mamba: MambaConfig | None = None
    learned_positions: bool = False
    qk_norm: bool = False  # where an architecture may have norms of q and k
    attention_sinks: bool = False  # a term in each head's softmax
    unit_head: bool = False  # rows of lm_head are normalized
    bidirectional: bool = False  # a token sees those behind it, too
    token_types: int = 0  # kinds of tokens with a vector each
    unused_positions: int = 0  # rows of the table of positions before the first position's
    pooling: PoolingConfig | None = None

    def is_windowed(self, layer: int) -> bool:
        """Whether a layer sees the last `layer_window` tokens only."""
        return bool(self.windowed) and self.windowed[layer]

    @property
    def cache_layers(self) -> tuple[int, ...]:
        """The layers whose keys and values a cache holds, by their places in it."""
        layers, delta = range(self.num_hidden_layers), self.delta
        return tuple(i for i in layers if delta is None or delta.beside or not delta.layers[i])

    @property
    def states(self) -> tuple[StateTensor, ...]:
        """What a sequence keeps besides; each layer's together, in the layers' order."""
        return () if self.delta is None else self.delta.states

    @property
    def rotates_in_graph(self) -> bool:
        """Whether layers differ in their rope, so that the cache cannot apply it."""
        return bool(set(self.layer_ropes) - {"rope"})

    def rope_of(self, name: str) -> RopeConfig:
        """A rope by its name in `layer_ropes`."""
        found = self.rope if name == "rope" else self.local_rope
        assert found is not None, name
        return found


def read_json(path: Path) -> Any:
    """Read a JSON file; missing or malformed is a one-line error."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise QccError(f"{path}: no such file; a checkpoint folder has a {path.name}") from err
    except OSError as err:
        raise QccError(f"{path}: {err.strerror}") from err
    except (ValueError, RecursionError) as err:  # ValueError alone: an integer of 5000 digits
        raise QccError(f"{path}: not valid JSON: {err}") from err


def attention_heads(
    reader: ConfigReader, default_kv_heads: int | None = None, default_head_dim: int | None = None
) -> tuple[int, int, int, int]:
    """hidden_size, num_attention_heads, num_key_value_heads and head_dim, checked together.

    `default_kv_heads` is what transformers takes where the key is absent (None: as many as
    heads); null there always means as many as heads. `default_head_dim` is for an absent head_dim
    (None: hidden_size / heads).
    """
    hidden = reader.integer("hidden_size")
    heads = reader.integer("num_attention_heads")
    absent = "num_key_value_heads" not in reader.raw
    kv_default = default_kv_heads if absent and default_kv_heads is not None else heads
    kv_heads = reader.integer("num_key_value_heads", kv_default)
    explicit = reader.get("head_dim", default_head_dim)
    if explicit is None and hidden % heads:
        raise QccError(
            f"{reader.where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
        )
    head_dim = reader.integer("head_dim", default_head_dim or hidden // heads)
    if heads % kv_heads:
        raise QccError(
            f"{reader.where}: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {kv_heads}"
        )
    return hidden, heads, kv_heads, head_dim
