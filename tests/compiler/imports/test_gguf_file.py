"""A .gguf file as a checkpoint folder: names, row order, numbers, codes and config."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qcc.compiler.config import ModelConfig
from qcc.compiler.imports.gguf_header import read_header
from qcc.compiler.models import find_architecture
from qcc.compiler.source import checksum, locate
from qcc.compiler.weights.checkpoint import Checkpoint
from qcc.quant_schemes.packing import dequantize_codes
from qcc.runtime.errors import QccError

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
KINDS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
KINDS += ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "MXFP4"]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**WIDE, "num_key_value_heads": 2, "head_dim": 64}),
    "llama-untied": ("llama", {**WIDE, "tie_word_embeddings": False, "attention_bias": True}),
    "mistral": ("mistral", WIDE),
    "qwen2": ("qwen2", {**WIDE, "rope_theta": 1e6}),
    "gpt_neox": ("gpt_neox", {**WIDE, "rotary_pct": 0.5, "use_parallel_residual": False}),
}
Write = Callable[..., dict[str, Any]]


def config_of(folder: Path) -> ModelConfig:
    """The config that the models are built from."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return find_architecture(raw, "config.json").config(raw, "config.json")


def every_kind() -> Callable[[str, Any], str]:
    """All types in turn."""
    turn = iter(KINDS * 10)
    return lambda name, tensor: next(turn)


@pytest.mark.parametrize("model", MODELS)
def test_a_file_is_the_checkpoint_it_was_made_from(
    model: str, checkpoint: Callable[..., Path], write_gguf: Write, tmp_path: Path
) -> None:
    """The same config and names; numbers as the gguf package has them, codes that make the same."""
    arch, fields = MODELS[model]
    source = checkpoint(arch, **fields)
    numbers = write_gguf(source, tmp_path / "m.gguf", every_kind())
    folder = locate(str(tmp_path / "m.gguf"))
    assert config_of(folder) == config_of(source)
    kept = 0
    with Checkpoint.open(folder) as found:
        assert sorted(found.names) == sorted(numbers)
        for name, expected in numbers.items():
            found.check(name, expected.shape)
            read = found.read(name)
            assert (read.astype(np.float32) == expected).all(), name
            flat = found.read_flat(name, 3, expected.size - 5)
            assert (flat.astype(np.float32) == expected.reshape(-1)[3:-5]).all(), name
            fmt = found.format(name)
            if fmt is not None:
                kept += 1
                assert (dequantize_codes(found.quantized(name), fmt) == expected).all(), name
    assert kept >= 5


def test_the_head_is_what_the_package_reads(
    checkpoint: Callable[..., Path], write_gguf: Write, tmp_path: Path
) -> None:
    """Metadata and table against gguf.GGUFReader's."""
    path = tmp_path / "m.gguf"
    write_gguf(checkpoint("llama", **WIDE), path, every_kind())
    header, reader = read_header(path), gguf.GGUFReader(path)
    fields = {key: f.contents() for key, f in reader.fields.items() if not key.startswith("GGUF.")}
    assert header.metadata == fields
    assert [*header.tensors] == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        info = header.tensors[tensor.name]
        assert info.kind == tensor.tensor_type.name
        assert info.shape[::-1] == tuple(tensor.shape)
        assert (info.begin, info.nbytes) == (tensor.data_offset, tensor.n_bytes)


def test_a_folder_with_one_file_and_its_cache(
    checkpoint: Callable[..., Path], write_gguf: Write, tmp_path: Path
) -> None:
    """It is found without its name, imported once, and anew when it changes."""
    source = checkpoint("llama", **WIDE)
    write_gguf(source, tmp_path / "m.gguf", lambda name, tensor: "Q8_0")
    folder = locate(str(tmp_path))
    before, made = checksum(folder), (folder / "config.json").stat().st_mtime_ns
    assert locate(str(tmp_path / "m.gguf")) == folder
    assert (folder / "config.json").stat().st_mtime_ns == made
    write_gguf(source, tmp_path / "m.gguf", lambda name, tensor: "Q4_0")
    again = locate(str(tmp_path))
    assert again != folder and checksum(again) != before
    write_gguf(source, tmp_path / "n.gguf", lambda name, tensor: "Q4_0")
    with pytest.raises(QccError, match=r"several .gguf files \(m.gguf, n.gguf\); give one of them"):
        locate(str(tmp_path))


def test_split_files_are_one_checkpoint(
    checkpoint: Callable[..., Path], tmp_path: Path, write_gguf: Write
) -> None:
    """-00001-of-00002 holds the metadata; any part may be named; a missing part is an error."""
    source = checkpoint("llama", **WIDE)
    whole = write_gguf(source, tmp_path / "w.gguf", lambda name, tensor: "Q8_0")
    header = read_header(tmp_path / "w.gguf")
    data = (tmp_path / "w.gguf").read_bytes()
    names = list(header.tensors)
    parts = [tmp_path / f"m-{i:05}-of-00002.gguf" for i in (1, 2)]
    for index, (part, some) in enumerate(zip(parts, (names[:5], names[5:]), strict=True)):
        writer = gguf.GGUFWriter(part, "llama")
        writer.add_uint16("split.count", 2)
        writer.add_uint16("split.no", index)
        reader = gguf.GGUFReader(tmp_path / "w.gguf")
        for key, field in reader.fields.items() if index == 0 else ():
            if not key.startswith(("GGUF.", "general.architecture")):
                sub = field.types[-1] if len(field.types) > 1 else None
                writer.add_key_value(key, field.contents(), field.types[0], sub)
        for name in some:
            info = header.tensors[name]
            raw = np.frombuffer(data, np.uint8, info.nbytes, info.begin)
            if info.kind == "F32":
                writer.add_tensor(name, raw.view(np.float32).reshape(info.shape))
            else:
                kind = gguf.GGMLQuantizationType[info.kind]
                writer.add_tensor(name, raw.reshape(info.shape[0], -1), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    folder = locate(str(parts[1]))
    assert folder == locate(str(parts[0]))
    with Checkpoint.open(folder) as found:
        assert sorted(found.names) == sorted(whole)
        for name, expected in whole.items():
            assert (found.read(name) == expected).all()
    parts[1].unlink()
    with pytest.raises(QccError, match=r"its part m-00002-of-00002.gguf is missing"):
        locate(str(parts[0]))


def test_rope_of_llama_3(
    checkpoint: Callable[..., Path], write_gguf: Write, tmp_path: Path
) -> None:
    """rope_freqs.weight, as llama.cpp's converter computes it, back to its parameters."""
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    fields = {**WIDE, "num_attention_heads": 2, "head_dim": 128, "num_key_value_heads": 1}
    source = checkpoint("llama", **fields, rope_parameters={**scaling, "rope_theta": 500000.0})
    factors = []
    for i in range(0, 128, 2):
        wavelength = 2 * np.pi * 500000.0 ** (i / 128)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192 / 1:
            factors.append(32.0)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / 32.0 + smooth))
    assert len(set(factors)) > 3
    path = tmp_path / "m.gguf"
    extra = {"rope_freqs.weight": np.array(factors, np.float32)}
    write_gguf(source, path, lambda name, tensor: "F16", extra=extra)
    folder = locate(str(path))
    assert config_of(folder).rope == config_of(source).rope
    with Checkpoint.open(folder) as found:
        assert "rope_freqs.weight" not in found.names
    factors[40] *= 1.01
    extra = {"rope_freqs.weight": np.array(factors, np.float32)}
    write_gguf(source, path, lambda name, tensor: "F16", extra=extra)
    with pytest.raises(QccError, match=r"rope_freqs\.weight are not those of Llama 3's"):
        locate(str(path))


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_rope_scaling(
    kind: str, checkpoint: Callable[..., Path], write_gguf: Write, tmp_path: Path
) -> None:
    """The keys of linear and yarn scaling."""
    rope: dict[str, Any] = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0}
    keys: dict[str, Any] = {"rope.scaling.type": kind, "rope.scaling.factor": 4.0}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = 64
        keys["rope.scaling.original_context_length"] = 64
    source = checkpoint("qwen2", **WIDE, rope_parameters=rope)
    write_gguf(source, tmp_path / "m.gguf", lambda name, tensor: "F16", keys)
    assert config_of(locate(str(tmp_path))).rope == config_of(source).rope


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"expert_count": 8}, "llama.expert_count is 8, a key that is not known"),
        ({"rope.scaling.type": "longrope"}, "'longrope', supported: none, linear, yarn"),
        (
            {"rope.scale_linear": "x"},
            "llama.rope.scale_linear is 'x', it must be a positive number",
        ),
        ({"attention.temperature": 2.0}, "llama.attention.temperature is 2.0, a key that is not"),
    ],
)
def test_keys_that_change_the_numbers_are_refused(
    keys: dict[str, Any],
    message: str,
    checkpoint: Callable[..., Path],
    write_gguf: Write,
    tmp_path: Path,
) -> None:
    """Each by its name."""
    source = checkpoint("llama", **WIDE)
    write_gguf(source, tmp_path / "m.gguf", lambda name, tensor: "F16", keys)
    with pytest.raises(QccError, match=message):
        locate(str(tmp_path))


def test_an_architecture_that_is_not_known(tmp_path: Path) -> None:
    """It is named, with those that are."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(QccError, match="architecture 'mamba' is not supported; supported: llama"):
        locate(str(tmp_path))


def test_the_label_is_the_file_type(
    checkpoint: Callable[..., Path], write_gguf: Write, tmp_path: Path
) -> None:
    """What llama.cpp calls the mix; else the type of most weights."""
    source = checkpoint("llama", **WIDE)
    for file_type, label in ((15, "gguf-q4_k_m"), (None, "gguf-q8_0")):
        write_gguf(source, tmp_path / "m.gguf", lambda n, t: "Q8_0", file_type=file_type)
        with Checkpoint.open(locate(str(tmp_path))) as found:
            assert found.label == label
    with Checkpoint.open(source) as plain:
        assert plain.label == "" and plain.origin(plain.names[0]) is None


@pytest.mark.parametrize("model", ["llama", "qwen2"])
def test_weights_are_those_that_transformers_reads(
    model: str, checkpoint: Callable[..., Path], write_gguf: Write, tmp_path: Path
) -> None:
    """Transformers' own GGUF loader, which knows llama.cpp's names and row order by itself."""
    arch, fields = MODELS[model]
    write_gguf(checkpoint(arch, **fields), tmp_path / "m.gguf", every_kind())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    expected = theirs.state_dict()
    with Checkpoint.open(locate(str(tmp_path))) as found:
        for name in found.names:
            assert (found.read(name).astype(np.float32) == expected[name].numpy()).all(), name
