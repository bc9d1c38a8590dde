"""The original in transformers: whole, layer by layer, on other weights; what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcc.compiler import reference
from qcc.compiler.reference import Original, Transformers, reference_logits
from qcc.runtime.errors import QccError


def test_logits_whole_and_layer_by_layer(
    checkpoint: Any,
    hugging_face: Any,
    logits_of: Any,
    some_ids: Any,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Windows of several lengths, in their order; the name says which way it went."""
    model = checkpoint("llama")
    windows = [some_ids(20, seed=1), some_ids(50, seed=2), some_ids(9, seed=3)]
    name, stream = reference_logits(Original(model))
    assert name.startswith("transformers ") and name.endswith("fp32")
    monkeypatch.setattr(reference, "SHARE", 0.0)
    layered, by_layer = reference_logits(Original(model))
    assert layered == f"{name}, layer by layer"
    for ids, one, other in zip(windows, stream(windows), by_layer(windows), strict=True):
        wanted = logits_of(hugging_face(model), ids)
        assert np.abs(one - wanted).max() < tolerance
        assert np.abs(other - wanted).max() < tolerance


@pytest.mark.parametrize("arch", ["llama", "gpt_neox"])
def test_other_weights_take_the_checkpoints_names(
    arch: str, checkpoint: Any, some_ids: Any
) -> None:
    """The same weights give the same logits; with one doubled they do not."""
    from safetensors.numpy import load_file

    model, ids = checkpoint(arch), some_ids(12)
    weights = dict(load_file(model / "model.safetensors"))

    def logits(*others: Any) -> Any:
        return next(Transformers.load(Original(model), *others).logits([ids]))

    first = logits()
    np.testing.assert_array_equal(logits(weights), first)
    name = next(n for n in weights if "layers.1.mlp.d" in n and n.endswith("weight"))
    assert np.abs(logits({**weights, name: 2 * weights[name]}) - first).max() > 0.1


def test_hidden_states_end_in_the_last_norm(
    checkpoint: Any, hugging_face: Any, some_ids: Any
) -> None:
    """Embedding, layer 0, then layer 1 with the norm: from it the head makes the logits."""
    model, ids = checkpoint("llama"), some_ids(12)
    states, logits = Transformers.load(Original(model)).hidden_states(ids)
    table = hugging_face(model).get_input_embeddings().weight.detach().numpy()
    assert len(states) == 3
    np.testing.assert_array_equal(states[0], table[ids])
    assert np.abs(states[-1] @ table.T - logits).max() < 1e-4


def test_sizes_and_what_transformers_refuses(checkpoint: Any, tmp_path: Path) -> None:
    model = checkpoint("llama")
    files = (model / "model.safetensors").stat().st_size
    assert 0 < files - Original(model).float_bytes < 10_000, "an f32 file but for its header"
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "config.json").write_text('{"model_type": "none such"}')
    with pytest.raises(QccError, match=r"does not load it \(.*\); use --reference qcc"):
        Transformers.load(Original(broken))
