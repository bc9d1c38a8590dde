"""Make a Hugging Face checkpoint of real size with random weights: for speed, not for sense.

    python -m qcc.tutorials.random_checkpoint --shape llama-3.2-1b -o DIR
    python -m qcc.tutorials.random_checkpoint --arch llama --set hidden_size=256 ... -o DIR

Writes config.json, generation_config.json, model.safetensors (above 1 GB: shards and their index)
in bfloat16, and a small tokenizer. The same seed gives the same bytes. Tensors are cut from one
block of normals at an offset that their name decides: as fast as the disk, at a few MB of memory.
Its length is prime, so that no two rows of a matrix are equal.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from qcc.quant_schemes.errors import did_you_mean
from qcc.runtime.errors import QccError
from qcc.tutorials.tiny import MODEL_DIR

BLOCK = 4_194_301  # a prime; 8 MiB of bfloat16
SHARD_BYTES = 1_000_000_000
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

_GATED = {"hidden_act": "silu", "attention_dropout": 0.0, "initializer_range": 0.02}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _GATED
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": _GATED
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": 24,
        "tie_word_embeddings": True,
    },
    "mistral-7b": _GATED
    | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
    },
    "pythia-160m": {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "vocab_size": 50304,
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "use_parallel_residual": True,
        "attention_bias": True,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
    },
}
ARCHITECTURES = {shape["model_type"]: name for name, shape in SHAPES.items()}


def shape_config(shape: str, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """config.json of a named shape with some fields changed.

    Raises:
        QccError: unknown shape or field, or heads that do not divide.
    """
    if shape not in SHAPES:
        guess = did_you_mean(shape, SHAPES)
        raise QccError(f"--shape: unknown {shape!r}{guess}; shapes: {', '.join(SHAPES)}")
    config = dict(SHAPES[shape])
    for key, value in (overrides or {}).items():
        if key not in config:
            guess = did_you_mean(key, config)
            raise QccError(f"--set: {shape} has no field {key!r}{guess}; has: {', '.join(config)}")
        config[key] = value
    heads, kv_heads = config["num_attention_heads"], _kv_heads(config)
    if heads % kv_heads or ("head_dim" not in config and config["hidden_size"] % heads):
        raise QccError(
            f"--set: num_attention_heads={heads} must be a multiple of "
            f"num_key_value_heads={kv_heads} and divide hidden_size={config['hidden_size']}"
        )
    return config


def _kv_heads(config: dict[str, Any]) -> int:
    return int(config.get("num_key_value_heads", config["num_attention_heads"]))


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Hugging Face's names and shapes of all tensors, in the order of the file."""
    pairs = _neox_tensors(config) if config["model_type"] == "gpt_neox" else _llama_tensors(config)
    return dict(pairs)


def _llama_tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Llama, Mistral, and Qwen2, whose q, k and v have biases."""
    hidden, inter, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    q, kv = head_dim * config["num_attention_heads"], head_dim * _kv_heads(config)
    attention_bias, mlp_bias = config.get("attention_bias", False), config.get("mlp_bias", False)
    qkv_bias = attention_bias or config["model_type"] == "qwen2"
    linears = (
        ("self_attn.q_proj", (q, hidden), qkv_bias),
        ("self_attn.k_proj", (kv, hidden), qkv_bias),
        ("self_attn.v_proj", (kv, hidden), qkv_bias),
        ("self_attn.o_proj", (hidden, q), attention_bias),
        ("mlp.gate_proj", (inter, hidden), mlp_bias),
        ("mlp.up_proj", (inter, hidden), mlp_bias),
        ("mlp.down_proj", (hidden, inter), mlp_bias),
    )
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in (f"model.layers.{index}" for index in range(config["num_hidden_layers"])):
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        yield from _linears(layer, linears)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocab, hidden)


def _neox_tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """GPT-NeoX: biases everywhere, q, k and v of a head side by side."""
    hidden, inter, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    bias = config["attention_bias"]
    linears = (
        ("attention.query_key_value", (3 * hidden, hidden), bias),
        ("attention.dense", (hidden, hidden), bias),
        ("mlp.dense_h_to_4h", (inter, hidden), True),
        ("mlp.dense_4h_to_h", (hidden, inter), True),
    )
    yield "gpt_neox.embed_in.weight", (vocab, hidden)
    for layer in (f"gpt_neox.layers.{index}" for index in range(config["num_hidden_layers"])):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{norm}.weight", (hidden,)
            yield f"{layer}.{norm}.bias", (hidden,)
        yield from _linears(layer, linears)
    yield "gpt_neox.final_layer_norm.weight", (hidden,)
    yield "gpt_neox.final_layer_norm.bias", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "embed_out.weight", (vocab, hidden)


def _linears(
    layer: str, linears: tuple[tuple[str, tuple[int, int], bool], ...]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, shape, bias in linears:
        yield f"{layer}.{name}.weight", shape
        if bias:
            yield f"{layer}.{name}.bias", shape[:1]


def make_checkpoint(
    config: dict[str, Any], folder: Path, *, seed: int = 0, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write the checkpoint of `config` into `folder`, config.json last; bytes of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny = json.loads((MODEL_DIR / "config.json").read_text(encoding="utf-8"))
    tokens = {
        key: tiny[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in tiny
    }
    total = _write_weights(config, folder, seed, shard_bytes)
    for name in TOKENIZER_FILES:
        if (MODEL_DIR / name).is_file():
            shutil.copyfile(MODEL_DIR / name, folder / name)
    _write_json(folder / "generation_config.json", {"do_sample": False, **tokens})
    _write_json(folder / "config.json", {**config, **tokens, "dtype": "bfloat16"})
    return total


def _write_weights(config: dict[str, Any], folder: Path, seed: int, shard_bytes: int) -> int:
    """Write the tensors, a new file whenever `shard_bytes` are reached; one file needs no index."""
    shapes = tensor_shapes(config)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = total = 0
    for name, shape in shapes.items():
        nbytes = 2 * math.prod(shape)
        if size and size + nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size, total = size + nbytes, total + nbytes
    std = float(config["initializer_range"])
    normals = np.random.default_rng(seed).standard_normal(BLOCK, dtype=np.float32)
    block = (normals * std).astype(ml_dtypes.bfloat16)
    weight_map = {}
    for index, tensors in enumerate(shards):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        with (folder / name).open("wb") as file:
            _write_safetensors(file, tensors, block, seed)
        weight_map.update(dict.fromkeys(tensors, name))
    if len(shards) > 1:
        index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index_file)
    return total


def _write_safetensors(
    file: BinaryIO, tensors: dict[str, tuple[int, ...]], block: np.ndarray[Any, Any], seed: int
) -> None:
    """One safetensors file: u64 header length, JSON header, the tensors one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": [*shape], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name, shape in tensors.items():
        count = math.prod(shape)
        if "norm" in name and name.endswith(".weight"):
            file.write(np.ones(count, block.dtype).tobytes())
            continue
        position = zlib.crc32(f"{seed} {name}".encode()) % BLOCK
        while count:
            part = block[position : position + count]
            file.write(part.view(np.uint16).data)
            count, position = count - len(part), 0


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def parse_overrides(words: list[str]) -> dict[str, Any]:
    """`key=value` words as a dict; a value is JSON (64, true, null) or else a string."""
    overrides = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise QccError(f"--set: {word!r} is not of the form field=value")
        try:
            overrides[key] = json.loads(value)
        except json.JSONDecodeError:
            overrides[key] = value
    return overrides


def main(argv: list[str] | None = None) -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m qcc.tutorials.random_checkpoint",
        description="Make a Hugging Face checkpoint of real size with random weights.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--arch", choices=sorted(ARCHITECTURES), help="architecture, for its shape")
    parser.add_argument("--shape", help=f"one of: {', '.join(SHAPES)}")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=VALUE",
        help="change fields of config.json",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random numbers")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    try:
        shape = args.shape or ARCHITECTURES.get(args.arch, "llama-3.2-1b")
        config = shape_config(shape, parse_overrides(args.set))
        if args.arch and config["model_type"] != args.arch:
            raise QccError(f"--shape {shape} is of --arch {config['model_type']}, not {args.arch}")
        total = make_checkpoint(config, args.out, seed=args.seed)
    except (QccError, OSError) as err:
        parser.exit(2, f"{parser.prog}: error: {err}\n")
    print(f"{args.out}: {shape}, {total / 1e9:.2f} GB of bfloat16 weights, seed {args.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
