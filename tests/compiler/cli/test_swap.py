"""SwappableModel: a replaced weight computes as if the checkpoint held it; restored, as before."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="module")
def swappable(checkpoint: Any) -> Any:
    from qcc.compiler.cli._swap import SwappableModel

    return SwappableModel(checkpoint("llama"))


def with_weights(folder: Path, out: Path, changed: dict[str, Any]) -> Path:
    """A copy of a checkpoint in which some tensors are others."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    assert set(changed) <= set(tensors)
    save_file({**tensors, **changed}, out / "model.safetensors", {"format": "pt"})
    return out


def source(folder: Path, name: str) -> Any:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")[name]


def test_replaced_weights_compute_as_a_checkpoint_with_them(
    swappable: Any, checkpoint: Any, compiled: Any, some_ids: Any, tmp_path: Path
) -> None:
    """A source of a fused weight, a plain one, and the table that is the lm_head as well."""
    folder, ids = checkpoint("llama"), some_ids(40)
    first = swappable.logits(ids)
    names = [
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.embed_tokens.weight",
    ]
    rng = np.random.default_rng(1)
    changed = {}
    for name in names:
        old = source(folder, name)
        changed[name] = (old + 0.1 * rng.standard_normal(old.shape)).astype(np.float32)
    other = compiled(with_weights(folder, tmp_path / "other", changed))
    for name in names:
        swappable.replace(name, changed[name])
    both = swappable.logits(ids)
    np.testing.assert_array_equal(both, other.logits(ids))
    assert np.abs(both - first).max() > 0.1
    for name in names:
        swappable.restore(name)
    np.testing.assert_array_equal(swappable.logits(ids), first)


def test_sources_of_one_parameter_are_replaced_apart(
    swappable: Any, checkpoint: Any, some_ids: Any
) -> None:
    """Restoring q_proj leaves k_proj replaced; restoring the parameter restores all."""
    folder, ids = checkpoint("llama"), some_ids(20)
    prefix = "model.layers.1.self_attn."
    q, k = (source(folder, f"{prefix}{part}_proj.weight") for part in "qk")
    first = swappable.logits(ids)
    swappable.replace(f"{prefix}k_proj.weight", 2 * k)
    only_k = swappable.logits(ids)
    swappable.replace(f"{prefix}q_proj.weight", -q)
    assert not np.array_equal(swappable.logits(ids), only_k)
    swappable.restore(f"{prefix}q_proj.weight")
    np.testing.assert_array_equal(swappable.logits(ids), only_k)
    swappable.restore(f"{prefix}qkv_proj.weight")
    np.testing.assert_array_equal(swappable.logits(ids), first)


def test_what_does_not_fit_is_refused(swappable: Any) -> None:
    from qcc.runtime.errors import QccError

    with pytest.raises(QccError, match=r"the model has no weight 'nothing'"):
        swappable.replace("nothing", np.zeros((2, 2), np.float32))
    name = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(QccError, match=r"given \[2, 2\], the model has \[64, 172\]"):
        swappable.replace(name, np.zeros((2, 2), np.float32))


def test_the_library_is_compiled_once(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from qcc.compiler.cli import _swap
    from qcc.compiler.reference import Original

    folder = checkpoint("llama")
    made = _swap.compiled_float(Original(folder), "q0f32")
    monkeypatch.setattr(_swap, "compile_model", lambda *_: pytest.fail("compiled again"))
    assert _swap.compiled_float(Original(folder), "q0f32") == made
