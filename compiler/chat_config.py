"""mlc-chat-config.json (CONTRACTS section 3) and the tokenizer files beside it.

Only files of fixed names that lie in the checkpoint's folder are copied; a name that stands in one
of them is never followed. tokenizer.json is read as JSON: no tokenizer is built here. Where there
is a tokenizer.model alone, it and tokenizer_config.json are those that `tokenizer_files` makes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from qcc.compiler.config import ModelConfig, RopeConfig, shown
from qcc.compiler.conv_template import TokenFacts, derive
from qcc.compiler.embedding import EmbeddingFacts
from qcc.compiler.tokenizer_files import read_object, tokenizer_folder
from qcc.runtime.artifact import CHAT_CONFIG
from qcc.runtime.chat import find_template
from qcc.runtime.errors import QccError
from qcc.runtime.files import os_errors, write_file

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
OTHER_FILES = ("generation_config.json", "chat_template.jinja")
LEGAL_FILES = ("LICENSE*", "USE_POLICY*", "NOTICE*")
NOTE = "conv_template_note"  # in what is returned, not in the file

# Our field -> Hugging Face's key, where they differ; None: it has none.
_HF_NAMES: dict[str, str | None] = {
    "norm_eps": "rms_norm_eps",
    "rope": None,
    "qkv_bias": "attention_bias",
    "o_bias": None,
    "parallel_residual": "use_parallel_residual",
    "model_type": None,
    "rope_length": None,
    "local_rope": None,
    "experts": None,
    "pooling": None,
    "bidirectional": None,
    "unused_positions": None,
    "token_types": "type_vocab_size",
    "latent": None,
    "delta": None,
    "mamba": None,
}
_USUAL = ("qkv_bias", "mlp_bias", "sliding_window", "parallel_residual")
_NORM_KEYS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
# Sampling defaults: the value where generation_config.json says nothing, the least, the greatest.
_SAMPLING = {
    "temperature": (1.0, 0.0, 100.0),
    "presence_penalty": (0.0, -2.0, 2.0),
    "frequency_penalty": (0.0, -2.0, 2.0),
    "repetition_penalty": (1.0, 1e-6, 100.0),
    "top_p": (1.0, 0.0, 1.0),
}
# Stands for top_p 0, which transformers reads as "the likeliest token" and MLC and we refuse.
_LEAST_TOP_P = 1e-6


def write_chat_config(
    source: Path,
    out: Path,
    config: ModelConfig,
    scheme_name: str,
    sizes: Mapping[str, int],
    embedding: EmbeddingFacts | None = None,
) -> dict[str, Any]:
    """Copy the tokenizer's files and write mlc-chat-config.json; returns what was written.

    `sizes` are the fields of `qcc.compiler.sizes.Sizes`, `embedding` of an embedding model. Where
    the chat template cannot be told in full as a conv_template, the returned dict says so under
    "conv_template_note".

    Raises:
        QccError: no tokenizer, a file that is not what it should be, more tokens than vocab_size,
            no room to write.
    """
    tokenizer = tokenizer_folder(source)
    vocabulary = fitting_vocabulary(source, config)
    raw = read_object(source / "config.json")
    generation = read_object(source / "generation_config.json")
    special = special_tokens(source, vocabulary, raw, generation)
    tokens = TokenFacts(
        texts=special.texts,
        bos_id=special.ids["bos_token_id"],
        added=vocabulary.added,
        prefix=special.prefix,
        stop_ids=special.eos_list,
    )
    conv, note = derive(find_template(source)[0], tokens)
    chat: dict[str, Any] = {
        "version": "0.1.0",
        "model_type": config.model_type,
        "quantization": scheme_name,
        "model_config": _model_config(config, sizes, raw),
        "vocab_size": config.vocab_size,
        "context_window_size": sizes["context_window_size"],
        "sliding_window_size": sizes["sliding_window_size"],
        "prefill_chunk_size": sizes["prefill_chunk_size"],
        "attention_sink_size": sizes["attention_sink_size"],
        "tensor_parallel_shards": 1,
        "pipeline_parallel_stages": 1,
        "active_vocab_size": vocabulary.size,
        **_sampling(generation, source / "generation_config.json"),
        "tokenizer_files": [
            name
            for name in TOKENIZER_FILES
            if (source / name).is_file() or (tokenizer / name).is_file()
        ],
        "tokenizer_info": vocabulary.info,
        "conv_template": conv,
        **special.ids,
        "model_task": "chat" if embedding is None else "embedding",
    }
    if embedding is not None:
        chat["embedding"] = embedding.as_dict()
    for path in _files_to_copy(source, tokenizer):
        with os_errors(path, "read"):
            content = path.read_bytes()
        write_file(out / path.name, content)
    write_file(out / CHAT_CONFIG, json.dumps(chat, indent=2, ensure_ascii=False) + "\n")
    return {**chat, NOTE: note} if note else chat


@dataclass(frozen=True)
class Vocabulary:
    """What tokenizer.json says: token -> id, the largest id + 1, MLC's tokenizer_info."""

    ids: Mapping[str, int]
    added: Mapping[str, int]  # those among them that no merge makes
    size: int
    info: Mapping[str, Any]
    prefix: tuple[int, ...]  # what its post-processor puts before a text


@dataclass(frozen=True)
class SpecialTokens:
    """Special tokens; `prefix` is what a text without a chat template begins with."""

    texts: Mapping[str, str]  # "bos_token" -> "<s>", as chat templates name them
    ids: Mapping[str, Any]  # "bos_token_id" -> 1 or None; eos_token_id may be a list
    prefix: list[int]

    @property
    def eos_list(self) -> list[int]:
        """All ids that end a text."""
        eos = self.ids["eos_token_id"]
        return list(eos) if isinstance(eos, list) else [] if eos is None else [eos]


def fitting_vocabulary(source: Path, config: ModelConfig) -> Vocabulary:
    """The tokenizer's vocabulary, whose ids the model must have.

    Raises:
        QccError: no tokenizer, not one, or of another model.
    """
    vocabulary = read_vocabulary(source)
    if vocabulary.size > config.vocab_size:
        name = "tokenizer.json" if (source / "tokenizer.json").is_file() else "tokenizer.model"
        raise QccError(
            f"{source / name}: token ids up to {vocabulary.size - 1}, but config.json "
            f"has vocab_size {config.vocab_size}; the tokenizer belongs to another model"
        )
    return vocabulary


def read_vocabulary(source: Path) -> Vocabulary:
    """Read tokenizer.json, or what tokenizer.model is converted to.

    Raises:
        QccError: missing, not JSON, not a tokenizer.
    """
    path = tokenizer_folder(source) / "tokenizer.json"
    if not path.is_file():
        raise QccError(
            f"{path}: no such file, and no tokenizer.model to make it of; "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...) writes it"
        )
    raw = read_object(path)
    try:
        entries = raw["model"]["vocab"]
        if isinstance(entries, list):  # Unigram: [token, score]
            entries = {str(token): index for index, (token, *_) in enumerate(entries)}
        added = {item["content"]: item["id"] for item in raw.get("added_tokens") or []}
        ids = {**entries, **added}
        if not ids or not all(type(index) is int and index >= 0 for index in ids.values()):
            raise ValueError("its vocabulary is not a table of token ids")
        info = _tokenizer_info(raw)
        prefix = tuple(_prefix_ids(raw.get("post_processor")))
    except (AttributeError, KeyError, TypeError, ValueError) as err:
        what = f"it has no {err}" if isinstance(err, KeyError) else str(err)
        raise QccError(f"{path}: not a tokenizer of the tokenizers library: {what}") from err
    return Vocabulary(ids, added, max(ids.values()) + 1, info, prefix)


def _parts(node: Any, plural: str) -> list[dict[str, Any]]:
    """A normalizer, decoder, ... as a flat list: a Sequence is its members in order."""
    if node is None:
        return []
    if node["type"] != "Sequence":
        return [node]
    return [part for member in node[plural] for part in _parts(member, plural)]


def _tokenizer_info(raw: Mapping[str, Any]) -> dict[str, Any]:
    decoders = _parts(raw.get("decoder"), "decoders")
    before = _parts(raw.get("pre_tokenizer"), "pretokenizers")
    normalizers = _parts(raw.get("normalizer"), "normalizers")
    kinds = {part["type"] for part in (*decoders, *before)}
    byte_level = "ByteLevel" in kinds and not raw["model"].get("byte_fallback")
    # Sentencepiece's dummy prefix has two spellings: Prepend and Strip, or Metaspace.
    prepends = any(p["type"] == "Prepend" and p.get("prepend") == "\u2581" for p in normalizers)
    strips = any(
        p["type"] == "Strip" and (p.get("content"), p.get("start"), p.get("stop")) == (" ", 1, 0)
        for p in decoders
    )
    return {
        "token_postproc_method": "byte_level" if byte_level else "byte_fallback",
        "prepend_space_in_encode": prepends or any(map(_prefixing_metaspace, before)),
        "strip_space_in_decode": strips or any(map(_prefixing_metaspace, decoders)),
    }


def _prefixing_metaspace(part: Mapping[str, Any]) -> bool:
    scheme = part.get("prepend_scheme", "always" if part.get("add_prefix_space") else "never")
    return bool(part["type"] == "Metaspace" and scheme != "never")


def _prefix_ids(post_processor: Any) -> Iterator[int]:
    """Ids that the post-processor puts before a single text."""
    for part in _parts(post_processor, "processors"):
        if part["type"] != "TemplateProcessing":
            continue
        for piece in part["single"]:
            if "SpecialToken" not in piece:
                break
            yield from part["special_tokens"][piece["SpecialToken"]["id"]]["ids"]


def special_tokens(
    source: Path,
    vocabulary: Vocabulary,
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
) -> SpecialTokens:
    """bos, eos and pad: generation_config.json, else config.json, else the tokenizer's strings.

    Several eos ids are the union of the two configs.
    """
    tokenizer_config = read_object(tokenizer_folder(source) / "tokenizer_config.json")
    by_id = {index: token for token, index in vocabulary.ids.items()}
    texts: dict[str, str] = {}
    ids: dict[str, Any] = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = tokenizer_config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        found = _ids(generation, f"{name}_id", source) + _ids(config, f"{name}_id", source)
        if not found and isinstance(token, str) and token in vocabulary.ids:
            found = [vocabulary.ids[token]]
        if isinstance(token, str):
            texts[name] = token
        elif found and found[0] in by_id:
            texts[name] = by_id[found[0]]
        found = list(dict.fromkeys(found))
        if name == "eos_token" and len(found) > 1:
            ids["eos_token_id"] = found
        elif name != "unk_token":
            ids[f"{name}_id"] = found[0] if found else None
    prefix = list(vocabulary.prefix)
    wants_bos = tokenizer_config.get("add_bos_token")
    if isinstance(wants_bos, bool):
        prefix = [ids["bos_token_id"]] if wants_bos and ids["bos_token_id"] is not None else []
    order = ("pad_token_id", "bos_token_id", "eos_token_id")
    return SpecialTokens(texts, {key: ids[key] for key in order}, prefix)


def _ids(raw: Mapping[str, Any], key: str, source: Path) -> list[int]:
    """An id or a list of them; a negative one stands for none."""
    value = raw.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(item) is int for item in values):
        raise QccError(
            f"{source}: {key} is {shown(value)}, it must be a token id or a list of them"
        )
    return [item for item in values if item >= 0]


def _sampling(generation: Mapping[str, Any], where: Path) -> dict[str, float]:
    result = {}
    for key, (default, least, greatest) in _SAMPLING.items():
        value = generation.get(key)
        value = default if value is None else value
        if type(value) not in (int, float) or not least <= value <= greatest:
            raise QccError(
                f"{where}: {key} is {shown(value)}, must be from {least:g} to {greatest:g}"
            )
        result[key] = float(value)
    result["top_p"] = max(result["top_p"], _LEAST_TOP_P)
    sampled = generation.get("do_sample")
    if sampled is not None and not isinstance(sampled, bool):
        raise QccError(f"{where}: do_sample is {shown(sampled)}, must be true or false")
    if sampled is False:  # clients read no generation_config.json: greedy has no other spelling
        result["temperature"] = 0.0
    return result


def _model_config(
    config: ModelConfig, sizes: Mapping[str, int], raw: Mapping[str, Any]
) -> dict[str, Any]:
    """The config under Hugging Face's names, with the sizes of the library."""
    values: dict[str, Any] = {}
    for item in fields(ModelConfig):
        name, value = _HF_NAMES.get(item.name, item.name), getattr(config, item.name)
        # Clients know the usual fields; what few architectures have, where it says something.
        if name is not None and (
            item.default is MISSING or item.name in _USUAL or value != item.default
        ):
            values[name] = value
    norm_key = next((key for key in _NORM_KEYS if key in raw), "rms_norm_eps")
    values[norm_key] = values.pop("rms_norm_eps")
    values["rope_theta"] = config.rope.theta
    values["partial_rotary_factor"] = config.rope.rotary_dim / config.head_dim
    values["rope_scaling"] = _rope_scaling(config.rope)
    return {**values, **sizes, "tensor_parallel_shards": 1}


def _rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.rope_type in ("default", "none"):
        return None
    scaling: dict[str, Any] = {"rope_type": rope.rope_type, "factor": rope.factor}
    always = ("low_freq_factor", "high_freq_factor") if rope.rope_type == "llama3" else ()
    for item in fields(RopeConfig):
        value = getattr(rope, item.name)
        if item.name in always or (
            item.name not in ("theta", "rotary_dim") and value != item.default
        ):
            scaling[item.name] = value
    return scaling


def _files_to_copy(source: Path, tokenizer: Path) -> list[Path]:
    """All that go into the artifact; the tokenizer's own folder comes first."""
    paths = [tokenizer / name for name in TOKENIZER_FILES]
    paths += [source / name for name in (*TOKENIZER_FILES, *OTHER_FILES)]
    for pattern in LEGAL_FILES:
        paths += sorted(source.glob(pattern))
    found: dict[str, Path] = {}
    for path in paths:
        if path.is_file():
            found.setdefault(path.name, path)
    return list(found.values())
