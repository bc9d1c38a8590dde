"""gpt-oss's packed experts: against transformers' own unpacking, and as a model that runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from qcc.compiler.reference import Original, Transformers
from qcc.compiler.weights.checkpoint import Checkpoint
from qcc.runtime import LLM
from qcc.runtime.errors import QccError

SETTINGS = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
FIELDS: dict[str, Any] = {
    "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 20,
    "num_hidden_layers": 2, "num_local_experts": 3, "num_experts_per_tok": 2,
    "intermediate_size": 64, "vocab_size": 361, "max_position_embeddings": 256,
    "sliding_window": 24, "tie_word_embeddings": False,
    "rope_scaling": {"rope_type": "default"},
}  # fmt: skip


@pytest.fixture(scope="module")
def experts(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A gpt-oss whose experts are random codes, and its tensors."""
    folder = tmp_path_factory.mktemp("mxfp4") / "model"
    shutil.copytree(checkpoint("gpt_oss", whole=True, **FIELDS), folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith("_proj") and "experts" in name]:
        experts, k, n = tensors.pop(name).shape
        sizes = (experts, n, k // 32)
        blocks = torch.randint(0, 256, (*sizes, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_blocks"] = blocks
        # Weights of about 1 / sqrt(k).
        scales = torch.randint(122, 125, sizes, generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = scales
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    configure(folder, {})
    return folder, tensors


def configure(folder: Path, changes: dict[str, Any]) -> None:
    """Say in config.json that the experts are packed."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"] = {**SETTINGS, **changes}
    path.write_text(json.dumps(config), encoding="utf-8")


def test_numbers_are_transformers(experts: Any) -> None:
    """Its [experts, k, n], expert below expert and transposed; whole and in part."""
    folder, tensors = experts
    with Checkpoint.open(folder) as opened:
        name = "model.layers.1.mlp.experts.gate_up_proj"
        assert name in opened.names and f"{name}_blocks" not in opened.names
        theirs = convert_moe_packed_tensors(
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"], dtype=torch.float32
        )
        expected = theirs.numpy().swapaxes(1, 2).reshape(-1, 96)
        assert opened.shape(name) == expected.shape == (3 * 128, 96)
        np.testing.assert_array_equal(opened.read(name), expected)
        part = opened.read_flat(name, 7 * 96 + 5, 200 * 96 + 33)
        np.testing.assert_array_equal(part, expected.flat[7 * 96 + 5 : 200 * 96 + 33])


def test_codes_are_kept(
    experts: Any, cli: Any, some_ids: Any, tolerance: float, tmp_path: Path
) -> None:
    """Without --quant; logits are transformers', which dequantizes to the same numbers."""
    folder, tensors = experts
    out = tmp_path / "kept"
    ran = cli("compile", folder, "-o", out, "--context-window", 256)
    assert ran.status == 0, ran.err
    assert "codes kept: tensors 4 MXFP4 as [mxfp4]" in ran.err + ran.out
    llm, ids = LLM(out, precision="high"), some_ids(70)
    (expected,) = Transformers.load(Original(folder)).logits([ids])
    np.testing.assert_allclose(llm.logits(ids), expected, rtol=0, atol=tolerance)
    stored = llm.artifact.read("model.layers.0.mlp.experts.down_proj.q_weight")
    blocks = tensors["model.layers.0.mlp.experts.down_proj_blocks"].numpy()
    np.testing.assert_array_equal(stored.view(np.uint8).reshape(blocks.shape), blocks)
    scheme = json.loads((out / "qcc.json").read_text(encoding="utf-8"))["scheme"]
    assert scheme == "mxfp4"


def test_another_scheme_says_what_it_loses(experts: Any, cli: Any, tmp_path: Path) -> None:
    ran = cli("convert", experts[0], "--quant", "q4f16_1", "-o", tmp_path / "o")
    assert ran.status == 0, ran.err
    assert "warning: requantized, which loses quality: tensors 4 MXFP4" in ran.err + ran.out


@pytest.mark.parametrize(
    ("tensor", "changes", "message"),
    [
        ({}, {"bits": 4}, "quantization_config: unknown key 'bits' = 4"),
        ({"down_proj_scales": None}, {}, "0.mlp.experts.down_proj_scales' is missing"),
        ({"down_proj_scales": (3, 96, 1)}, {}, r"has shape \[3, 96, 1\], not \[3, 96, 2\]"),
        ({"down_proj_blocks": (3, 96, 2, 8)}, {}, r"\[3, 96, 2, 8\], not \[experts, n, k / 32, 16"),
        ({"down_proj_blocks": torch.float16}, {}, "has dtype float16, not U8"),
    ],
)
def test_bad_checkpoints_are_named(
    experts: Any, tmp_path: Path, tensor: Any, changes: Any, message: str
) -> None:
    folder, tensors = experts
    tensors = dict(tensors)
    for leaf, change in tensor.items():
        name = f"model.layers.0.mlp.experts.{leaf}"
        own = tensors.pop(name)
        if isinstance(change, tuple):
            tensors[name] = torch.zeros(change, dtype=own.dtype)
        elif change is not None:
            tensors[name] = own.to(change)
    shutil.copytree(folder, tmp_path / "bad")
    save_file(tensors, tmp_path / "bad" / "model.safetensors")
    configure(tmp_path / "bad", changes)
    with pytest.raises(QccError, match=message) as caught:
        Checkpoint.open(tmp_path / "bad")
    assert "\n" not in str(caught.value)


def test_an_exponent_that_is_nan(experts: Any, tmp_path: Path) -> None:
    folder, tensors = experts
    name = "model.layers.0.mlp.experts.down_proj"
    scales = tensors[f"{name}_scales"].clone()
    scales[1, 5, 1] = 255
    shutil.copytree(folder, tmp_path / "bad")
    save_file({**tensors, f"{name}_scales": scales}, tmp_path / "bad" / "model.safetensors")
    with Checkpoint.open(tmp_path / "bad") as opened, pytest.raises(QccError, match="holds 255"):
        opened.read(name)
