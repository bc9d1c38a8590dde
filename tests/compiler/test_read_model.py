"""Checkpoints whose names lack the first part, as without a head, or have older names of norms."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qcc.compiler.driver import convert_model
from qcc.compiler.options import CompileOptions
from qcc.runtime.artifact import Artifact

from ..embeddings import BERT, save_embedding


def same_weights(usual: Path, renamed: Path, tmp_path: Path) -> None:
    first, second = (
        Artifact.open(convert_model(str(folder), tmp_path / name, CompileOptions(quant="q4f16_1")))
        for folder, name in ((usual, "a"), (renamed, "b"))
    )
    assert first.records.keys() == second.records.keys()
    for name in first.records:
        np.testing.assert_array_equal(first.read(name), second.read(name))


def test_names_without_prefix(checkpoint: Any, tmp_path: Path) -> None:
    """GPT-2's first files are such, and hold masks besides; their weights are the same."""
    sizes = {"n_embd": 84, "n_layer": 2, "n_head": 3, "n_positions": 256, "vocab_size": 361}
    usual = checkpoint("gpt2", whole=True, **sizes)
    bare = tmp_path / "bare"
    shutil.copytree(usual, bare)
    tensors = load_file(usual / "model.safetensors")
    assert all(name.startswith("transformer.") for name in tensors)
    renamed = {name.removeprefix("transformer."): array for name, array in tensors.items()}
    renamed["h.0.attn.bias"] = np.ones((1, 1, 256, 256), np.float32)
    save_file(renamed, bare / "model.safetensors")
    same_weights(usual, bare, tmp_path)


@pytest.mark.parametrize("head", [False, True])
def test_norms_with_gamma_and_beta(tmp_path: Path, head: bool) -> None:
    """BERT's first files have these for weight and bias, a head's own norm too."""
    usual = save_embedding(tmp_path / "usual", "bert", BERT, "mean", head=head)
    older = tmp_path / "older"
    shutil.copytree(usual, older)
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): array
        for name, array in load_file(usual / "model.safetensors").items()
    }
    norms = 1 + 2 * BERT["num_hidden_layers"] + head
    assert sum(name.endswith(".beta") for name in tensors) == norms
    save_file(tensors, older / "model.safetensors")
    same_weights(usual, older, tmp_path)
