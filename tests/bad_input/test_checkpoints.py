"""Checkpoints that are damaged, incomplete or not supported: one line, exit 2, nothing left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

NORM = "model.layers.1.input_layernorm.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def test_no_such_folder(cli: Any, tmp_path: Path) -> None:
    text = cli("compile", tmp_path / "nowhere", "-o", tmp_path / "out").error()
    assert "nowhere: no such folder" in text


def test_no_weights(broken: Path, refused: Any) -> None:
    (broken / "model.safetensors").unlink()
    assert "no weights: it has neither of model.safetensors" in refused()
    assert "no weights" in refused(verb="compile")


def test_a_truncated_file(broken: Path, refused: Any) -> None:
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    text = refused(verb="compile")
    assert "model.safetensors" in text and "truncated" in text and "download" in text


def test_a_missing_shard(broken: Path, refused: Any) -> None:
    index = json.dumps({"weight_map": {NORM: "model-00001-of-00002.safetensors"}})
    (broken / "model.safetensors").unlink()
    (broken / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    assert "its shard model-00001-of-00002.safetensors is missing" in refused()


def test_a_missing_tensor(refused: Any, change_tensors: Any) -> None:
    change_tensors(lambda tensors: tensors.pop(UP))
    assert f"has no tensor {UP!r}" in refused()


def test_a_tensor_of_the_wrong_shape(refused: Any, change_tensors: Any) -> None:
    change_tensors(lambda tensors: tensors.update({UP: np.zeros((172, 65), "f4")}))
    assert f"tensor {UP!r} has shape [172, 65], config.json asks for [172, 64]" in refused()


def test_a_tensor_too_many(refused: Any, change_tensors: Any) -> None:
    """As the q_norm of a model that only claims to be a Llama."""
    extra = "model.layers.0.self_attn.q_norm.weight"
    change_tensors(lambda tensors: tensors.update({extra: np.ones(16, "f4")}))
    assert f"does not use: {extra!r}" in refused()


@pytest.mark.parametrize("scheme", ["q0f32", "q4f16_1"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", [NORM, UP])
def test_not_a_number(
    refused: Any, change_tensors: Any, scheme: str, value: float, name: str
) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        tensors[name].reshape(-1)[11] = value

    change_tensors(spoil)
    text = refused("--quant", scheme)
    assert f"tensor {name!r}" in text and "NaN or infinite" in text


def test_numbers_beyond_f16(refused: Any, change_tensors: Any) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        tensors[UP][3, 5] = 1e6

    change_tensors(spoil)
    text = refused("--quant", "q4f16_1")
    assert f"tensor {UP!r}: 1e+06 is beyond the range of float16" in text and "q4f32_1" in text


def test_pickled_weights(broken: Path, refused: Any) -> None:
    (broken / "model.safetensors").unlink()
    (broken / "pytorch_model.bin").write_bytes(b"PK")
    assert "pickled weights; pass --allow-pickle" in refused()


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["LlamaForCausalLMM"]}, "did you mean 'LlamaForCausalLM'"),
    ({"architectures": ["T5Model"]}, "architecture 'T5Model' is not supported"),
    ({"architectures": ..., "model_type": "lama"}, "architecture 'lama' is not supported"),
    ({"rope_parameters": {"rope_type": "axial"}}, "rope type 'axial' is not supported"),
    ({"rope_parameters": {"rope_type": "longrope"}}, "rope type 'longrope' needs short_factor"),
    (
        {"rope_parameters": {"rope_type": "su", "short_factor": [1.0], "long_factor": [1.0, 2.0]}},
        "short_factor is [1.0], it must be a list of",
    ),
    (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "betafast": 1}},
        "unknown key 'betafast' for rope type 'yarn'",
    ),
    ({"rope_parameters": {"rope_type": "linear"}}, "rope type 'linear' needs factor"),
    ({"hidden_act": "swish2"}, "hidden_act 'swish2' is not supported; supported: silu"),
    ({"attention_multiplier": 0.5}, "unknown key 'attention_multiplier' = 0.5"),
    ({"rms_norm_epsilon": 1e-3}, "did you mean 'rms_norm_eps'"),
    ({"vocab_size": "many"}, "vocab_size is 'many', it must be a whole number"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0, it must be a whole number >= 1"),
    ({"intermediate_size": ...}, "intermediate_size is None, it must be a whole number"),
    ({"num_key_value_heads": 3}, "is not a multiple of num_key_value_heads 3"),
    ({"attention_bias": 1}, "attention_bias is 1, it must be true or false"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, it must be a positive number"),
]


@pytest.mark.parametrize(("fields", "text"), CONFIGS, ids=[text[:40] for _, text in CONFIGS])
def test_configs(refused: Any, set_config: Any, fields: dict[str, Any], text: str) -> None:
    set_config(**fields)
    found = refused(verb="compile")
    assert text in found and "config.json" in found


@pytest.mark.parametrize(
    ("content", "text"),
    [("{", "not valid JSON"), ("[1]", "not a JSON object"), ("[" * 100000, "not valid JSON")],
)
def test_config_files(broken: Path, refused: Any, content: str, text: str) -> None:
    (broken / "config.json").write_text(content, encoding="utf-8")
    assert text in refused(verb="compile")


def test_no_config(broken: Path, refused: Any) -> None:
    (broken / "config.json").unlink()
    assert "config.json: no such file" in refused(verb="compile")
