"""Embedding models: what sentence-transformers' files beside a checkpoint say of one.

  modules.json                       the steps: Transformer, Pooling, Normalize
  1_Pooling/config.json              which tokens make the vector
  sentence_bert_config.json          the longest text, in tokens
  config_sentence_transformers.json  prompts by name, and what two vectors are compared by

A decoder whose layers keep no state may be one, and an encoder is nothing else. What is not read
changes the vectors, so it is refused.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qcc.compiler.config import ModelConfig, PoolingConfig, read_json, shown
from qcc.compiler.models.architecture import Architecture, WeightSource
from qcc.compiler.sizes import MAX_CHUNK, SizeFlags, Sizes, check_flags, positions_limit
from qcc.runtime.errors import QccError

TASKS = ("auto", "generation", "embedding")
MODULES = "modules.json"
# Our kind -> what Pooling's older files call it; the newer ones have one "pooling_mode".
POOLINGS = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}
OLDER_KINDS = {"weight": "gamma", "bias": "beta"}  # of norms
_NEWER = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
# A text is computed in one go, so each token of the window takes memory at once.
DEFAULT_WINDOW = 2048
DEFAULT_BATCH = 32  # texts in one pass; only their tokens take memory


@dataclass(frozen=True)
class EmbeddingFacts:
    """How an embedding model is used; `max_tokens` None: as long as its positions reach."""

    pooling: PoolingConfig
    max_tokens: int | None = None
    lower_case: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    similarity: str = "cosine"

    def as_dict(self) -> dict[str, Any]:
        """What mlc-chat-config.json has under `embedding`."""
        return {
            "pooling": self.pooling.kind,
            "normalized": self.pooling.normalized,
            "lower_case": self.lower_case,
            "prompts": self.prompts,
            "default_prompt": self.default_prompt,
            "similarity": self.similarity,
        }


def embedding_facts(folder: Path, task: str, config: ModelConfig) -> EmbeddingFacts | None:
    """What the checkpoint in a folder is as an embedding model; None: it generates text.

    Where no file says how, a decoder's vector is that of its last token, an encoder's the mean,
    both of length 1.

    Raises:
        QccError: a step, a pooling or a value that is not implemented; an encoder asked for text;
            a task that is none of TASKS.
    """
    if task not in TASKS:
        raise QccError(f"task {shown(task)}: it must be one of {', '.join(TASKS)}")
    if task == "generation" and config.bidirectional:
        raise QccError(
            f"{folder}: {config.model_type} is an encoder: it writes no text; leave out "
            "--task generation to make embeddings with it"
        )
    has_steps = (folder / MODULES).is_file()
    if task == "generation" or (task == "auto" and not has_steps and not config.bidirectional):
        return None
    if not has_steps:
        return EmbeddingFacts(PoolingConfig("mean" if config.bidirectional else "last"))
    lengths = _object(folder / "sentence_bert_config.json")
    uses = _object(folder / "config_sentence_transformers.json")
    return EmbeddingFacts(
        _pooling(folder),
        _max_tokens(lengths, folder),
        lengths.get("do_lower_case") is True,
        *_prompts(uses, folder),
        _similarity(uses, folder),
    )


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none."""
    found = read_json(path) if path.is_file() else {}
    if not isinstance(found, dict):
        raise QccError(f"{path}: not a JSON object")
    return found


def _pooling(folder: Path) -> PoolingConfig:
    """The steps of modules.json: a Transformer, a Pooling, at most a Normalize."""
    path = folder / MODULES
    steps = read_json(path)
    try:
        kinds = [str(step["type"]).rpartition(".")[2] for step in steps]
        folders = [str(step.get("path", "")) for step in steps]
    except (AttributeError, KeyError, TypeError) as err:
        raise QccError(f"{path}: not a list of sentence-transformers' modules") from err
    unknown = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if unknown:
        raise QccError(
            f"{path}: step {shown(unknown[0])} is not implemented; supported: Transformer, "
            "Pooling, Normalize"
        )
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise QccError(
            f"{path}: the steps are {shown(kinds) if kinds else 'none'}; they must be Transformer, "
            "Pooling and, if any, Normalize"
        )
    if folders[0] or not folders[1].replace("_", "").isalnum():
        raise QccError(f"{path}: paths {shown(folders)}: the model must lie beside the file")
    return PoolingConfig(_pooling_kind(folder / folders[1] / "config.json"), len(kinds) == 3)


def _pooling_kind(path: Path) -> str:
    """cls, mean or last."""
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise QccError(f"{path}: not a JSON object")
    prefix = "pooling_mode_"
    modes = [key.removeprefix(prefix) for key in raw if key.startswith(prefix) and raw[key] is True]
    newer = raw.get("pooling_mode")
    modes += newer if isinstance(newer, list) else [] if newer is None else [newer]
    names = {theirs: ours for ours, theirs in POOLINGS.items()} | _NEWER
    found = {names.get(mode) if isinstance(mode, str) else None for mode in modes}
    if len(found) != 1 or None in found:
        raise QccError(
            f"{path}: pooling {shown(modes) if modes else 'none'} is not implemented; "
            "supported: one of cls, mean and lasttoken"
        )
    if raw.get("include_prompt") is False:
        raise QccError(f"{path}: include_prompt false is not implemented: prompts count here")
    return str(found.pop())


def _max_tokens(raw: dict[str, Any], folder: Path) -> int | None:
    value = raw.get("max_seq_length")
    if value is not None and (type(value) is not int or value < 1):
        raise QccError(
            f"{folder / 'sentence_bert_config.json'}: max_seq_length is {shown(value)}, it must be "
            "a whole number >= 1"
        )
    return value


def _prompts(raw: dict[str, Any], folder: Path) -> tuple[dict[str, str], str | None]:
    """Prompts by name, and the name of the one that is used where none is asked for."""
    where = folder / "config_sentence_transformers.json"
    prompts, default = raw.get("prompts") or {}, raw.get("default_prompt_name")
    texts = [*prompts, *prompts.values()] if isinstance(prompts, dict) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise QccError(f"{where}: prompts must map names to texts")
    if default is not None and not (isinstance(default, str) and default in prompts):
        raise QccError(f"{where}: default_prompt_name {shown(default)} is none of its prompts")
    return prompts, default


def _similarity(raw: dict[str, Any], folder: Path) -> str:
    value = raw.get("similarity_fn_name") or "cosine"
    if value not in SIMILARITIES:
        raise QccError(
            f"{folder / 'config_sentence_transformers.json'}: similarity_fn_name {shown(value)} is "
            f"not supported; supported: {', '.join(SIMILARITIES)}"
        )
    return str(value)


def as_embedding(config: ModelConfig, pooling: PoolingConfig) -> ModelConfig:
    """The config of an architecture as that of an embedding model.

    There is no lm_head, and no cache that rolls: a window of all layers is one of each.
    """
    changed = replace(config, pooling=pooling, tie_word_embeddings=True)
    if config.sliding_window is None:
        return changed
    return replace(
        changed,
        sliding_window=None,
        layer_window=config.sliding_window,
        windowed=(True,) * config.num_hidden_layers,
    )


def embedding_sizes(config: ModelConfig, flags: SizeFlags, max_tokens: int | None) -> Sizes:
    """Resolve flags; a text has up to context_window_size tokens, a pass prefill_chunk_size.

    Raises:
        QccError: a size beyond the model's limit, or that an embedding model does not have.
    """
    check_flags(flags)
    for flag, value in (
        ("--sliding-window", flags.sliding_window),
        ("--attention-sink", flags.attention_sink),
    ):
        if value:
            raise QccError(f"{flag}: an embedding model sees each text whole and keeps no cache")
    limit = positions_limit(config)
    if flags.context_window is not None and flags.context_window > limit:
        raise QccError(
            f"--context-window {flags.context_window} exceeds the {limit} positions that the model "
            f"has (max_position_embeddings {config.max_position_embeddings})"
        )
    usual = min(limit, DEFAULT_WINDOW, max_tokens or limit)
    context = flags.context_window or min(usual, flags.prefill_chunk or usual)
    chunk = flags.prefill_chunk or context
    if chunk < context:
        raise QccError(
            f"--prefill-chunk {chunk}: an embedding model computes a text in one go, so it must "
            f"reach the context window {context}; lower --context-window too"
        )
    if chunk > MAX_CHUNK:
        raise QccError(
            f"--context-window {context}: an embedding model computes a text in one go, of at most "
            f"{MAX_CHUNK} tokens"
        )
    return Sizes(
        context_window_size=context,
        sliding_window_size=-1,
        attention_sink_size=-1,
        prefill_chunk_size=chunk,
        max_batch_size=flags.max_batch or DEFAULT_BATCH,
    )


def without_prefix(
    architecture: Architecture, config: ModelConfig, names: Collection[str]
) -> Architecture:
    """The architecture for a checkpoint whose names lack the first part, as `model.`, if so.

    A model without its head is saved like that.
    """
    shape = config.vocab_size, config.hidden_size
    (table,) = architecture.source(config, architecture.embedding, shape).sources
    prefix, _, rest = table.name.partition(".")
    if table.name in names or rest not in names:
        return architecture
    usual = architecture.source

    def source(config: ModelConfig, name: str, shape: tuple[int, ...]) -> WeightSource:
        found = usual(config, name, shape)
        bare = (replace(s, name=s.name.removeprefix(f"{prefix}.")) for s in found.sources)
        return replace(found, sources=tuple(bare))

    return replace(architecture, source=source)


def with_older_norms(architecture: Architecture, names: Collection[str]) -> Architecture:
    """The architecture for a checkpoint whose norms have gamma and beta for weight and bias.

    BERT's first files are such.
    """
    if not any(name.endswith(".gamma") for name in names):
        return architecture
    usual = architecture.source

    def source(config: ModelConfig, name: str, shape: tuple[int, ...]) -> WeightSource:
        found = usual(config, name, shape)
        there = tuple(replace(s, name=_older(s.name, names)) for s in found.sources)
        return replace(found, sources=there)

    return replace(architecture, source=source)


def _older(name: str, names: Collection[str]) -> str:
    """A tensor's name, or the older one where the checkpoint has that instead."""
    layer, _, kind = name.rpartition(".")
    older = f"{layer}.{OLDER_KINDS.get(kind, kind)}"
    return older if name not in names and older in names else name


def refuse_text(folder: Path) -> None:
    """Say that a method with text does not do for an embedding model."""
    raise QccError(
        f"{folder}: an embedding model is not calibrated yet: use a method without text (--method "
        "rtn, mse or hqq) and no static scales of activations"
    )
