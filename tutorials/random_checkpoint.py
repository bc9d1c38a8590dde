"""Make a Hugging Face checkpoint of real size with random weights: for speed, not for sense.

    python -m qcc.tutorials.random_checkpoint --shape llama-3.2-1b -o DIR
    python -m qcc.tutorials.random_checkpoint --arch phi3 --set num_hidden_layers=2 ... -o DIR

--shape: the sizes of a released model; --arch: a small model of any architecture that qcc has. The
architecture itself says what its tensors are called.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from qcc.compiler.config import ModelConfig, UnknownKey
from qcc.compiler.models import architectures, find_architecture
from qcc.compiler.models.architecture import Architecture
from qcc.compiler.models.decoder import parameters
from qcc.quant_schemes.errors import did_you_mean
from qcc.runtime.errors import QccError
from qcc.tutorials.published_shapes import SHAPES
from qcc.tutorials.tiny import MODEL_DIR

BLOCK = 4_194_301  # a prime; 8 MiB of bfloat16
SHARD_BYTES = 1_000_000_000
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

# A small model: a few million weights. All heads are key-value heads, and an MLP is four times as
# wide as the model: some architectures know no other.
SMALL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 4096,
    "max_position_embeddings": 2048,
}
# What some architectures call them.
OTHER_NAMES = {
    "hidden_size": ("n_embd",),
    "intermediate_size": ("n_inner",),
    "num_hidden_layers": ("n_layer", "num_layers"),
    "num_attention_heads": ("n_head",),
    "max_position_embeddings": ("n_positions",),
}
# Sizes that only some have, whose defaults are those of large models.
SMALL_PARTS: dict[str, Any] = {
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 256,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "mamba_d_ssm": 256,
    "mamba_n_heads": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 32,
}
# Architectures whose config.json has all that within another mapping.
WITHIN = {"qwen3_5": "text_config"}
EXPERTS, COUNT = ("num_experts", "num_local_experts", "n_routed_experts"), 8


@dataclass(frozen=True)
class Tensor:
    """A tensor of the checkpoint; `fill`: all its numbers, None: normals."""

    shape: tuple[int, ...]
    fill: float | None = None


def shape_config(shape: str, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """config.json of a named shape with some fields changed.

    Raises:
        QccError: unknown shape or field, or a value that the architecture does not take.
    """
    if shape not in SHAPES:
        guess = did_you_mean(shape, SHAPES)
        raise QccError(f"--shape: unknown {shape!r}{guess}; shapes: {', '.join(SHAPES)}")
    return _changed(SHAPES[shape], overrides or {}, shape)


def small_config(arch: str, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """config.json of a small model of an architecture, under that architecture's names.

    Raises:
        QccError: unknown architecture or field, or a value that the architecture does not take.
    """
    known = architectures()
    if arch not in known:
        guess = did_you_mean(arch, known)
        raise QccError(
            f"--arch: unknown {arch!r}{guess}; architectures: {', '.join(sorted(known))}"
        )
    names = {"architectures": [known[arch].hf_names[0]], "model_type": arch}
    config = _with_experts({**names, **SMALL, **SMALL_PARTS})
    if "qk_rope_head_dim" in config:
        config.pop("head_dim", None)  # a head has two parts, of sizes of their own
    if "num_experts_per_tok" in config and "moe_intermediate_size" not in config:
        config["intermediate_size"] = SMALL_PARTS["moe_intermediate_size"]  # that of an expert
    for name, others in OTHER_NAMES.items():
        for other in others:
            if other in _known_fields({**config, other: SMALL[name]}):
                config = {other if key == name else key: config[key] for key in config}
    config = _changed(config, overrides or {}, arch)
    if arch not in WITHIN:
        return config
    return {**names, WITHIN[arch]: {k: v for k, v in config.items() if k not in names}}


def _with_experts(config: dict[str, Any]) -> dict[str, Any]:
    """The known fields, and the number of experts under the architecture's name for it, if any."""
    for name in EXPERTS:
        try:
            found = _known_fields({**config, name: COUNT})
        except QccError:
            continue  # it wants another one
        if name in found:
            return found
    return _known_fields(config)


def _known_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The config without the fields that its architecture does not know."""
    config = dict(config)
    while True:
        try:
            _read(config, "config.json")
            return config
        except UnknownKey as err:
            del config[err.key]


def _changed(config: dict[str, Any], overrides: dict[str, Any], name: str) -> dict[str, Any]:
    changed = {**config, **overrides}
    try:
        _read(changed, "--set")
    except UnknownKey as err:
        guess = did_you_mean(err.key, config)
        has = ", ".join(config)
        raise QccError(f"--set: {name} has no field {err.key!r}{guess}; has: {has}") from err
    return changed


def _read(config: dict[str, Any], where: str) -> tuple[Architecture, ModelConfig]:
    architecture = find_architecture(config, where)
    return architecture, architecture.config(config, where)


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of the checkpoint, in the order of the file."""
    return {name: tensor.shape for name, tensor in tensors(config).items()}


def tensors(raw: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that the architecture makes its parameters of; norms do nothing to a vector."""
    architecture, config = _read(raw, "config.json")
    model = architecture.module(config)
    found: dict[str, Tensor] = {}
    for name, shape in parameters(model):
        fill = _fill(model, name, shape)
        for source in architecture.source(config, name, shape).sources:
            found[source.name] = Tensor(source.shape, fill)
    return found


def _fill(model: Any, name: str, shape: tuple[int, ...]) -> float | None:
    """1 for a norm's weight, 0 where the norm adds 1 to it, None for all else."""
    *path, kind = name.split(".")
    if len(shape) != 1 or kind != "weight":
        return None
    for part in path:
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    if not hasattr(model, "eps"):  # a convolution
        return None
    return 1.0 - float(getattr(model, "offset", 0.0))


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
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, tensor in tensors(config).items():
        nbytes = 2 * math.prod(tensor.shape)
        if size and size + nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size, total = size + nbytes, total + nbytes
    std = float(config.get("initializer_range", 0.02))
    normals = np.random.default_rng(seed).standard_normal(BLOCK, dtype=np.float32)
    block = (normals * std).astype(ml_dtypes.bfloat16)
    weight_map = {}
    for index, part in enumerate(shards):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        with (folder / name).open("wb") as file:
            _write_safetensors(file, part, block, seed)
        weight_map.update(dict.fromkeys(part, name))
    if len(shards) > 1:
        index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index_file)
    return total


def _write_safetensors(
    file: BinaryIO, part: dict[str, Tensor], block: np.ndarray[Any, Any], seed: int
) -> None:
    """One safetensors file: u64 header length, JSON header, the tensors one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in part.items():
        begin, end = end, end + 2 * math.prod(tensor.shape)
        header[name] = {"dtype": "BF16", "shape": [*tensor.shape], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name, tensor in part.items():
        count = math.prod(tensor.shape)
        if tensor.fill is not None:
            file.write(np.full(count, tensor.fill, block.dtype).tobytes())
            continue
        position = zlib.crc32(f"{seed} {name}".encode()) % BLOCK
        while count:
            piece = block[position : position + count]
            file.write(piece.view(np.uint16).data)
            count, position = count - len(piece), 0


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
    parser.add_argument(
        "--arch", metavar="NAME", help="a small model of an architecture of `qcc list models`"
    )
    parser.add_argument("--shape", metavar="NAME", help=f"one of: {', '.join(SHAPES)}")
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
        overrides = parse_overrides(args.set)
        if args.arch and not args.shape:
            name, config = args.arch, small_config(args.arch, overrides)
        else:
            name = args.shape or "llama-3.2-1b"
            config = shape_config(name, overrides)
        if args.arch and config["model_type"] != args.arch:
            raise QccError(f"--shape {name} is of --arch {config['model_type']}, not {args.arch}")
        total = make_checkpoint(config, args.out, seed=args.seed)
    except (QccError, OSError) as err:
        parser.exit(2, f"{parser.prog}: error: {err}\n")
    print(f"{args.out}: {name}, {total / 1e9:.3g} GB of bfloat16 weights, seed {args.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
