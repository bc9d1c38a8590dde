"""q0f32 libraries against transformers in f32: the logits of every position."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def check(
    compiled: Any, hugging_face: Any, logits_of: Any, some_ids: Any, tolerance: float
) -> Callable[..., None]:
    """Compare a model's logits of `count` tokens with transformers'."""

    def compare(folder: Path, count: int, **sizes: int) -> None:
        llm = compiled(folder, "q0f32", **sizes)
        model = hugging_face(folder)
        ids = some_ids(count, model.config.vocab_size)
        expected = logits_of(model, ids)
        assert np.abs(expected).max() > 4, "the checkpoint's logits are too flat to show mistakes"
        np.testing.assert_allclose(llm.logits(ids), expected, rtol=0, atol=tolerance)

    return compare


@pytest.mark.parametrize(("name", "count"), [("stories260K", 512), ("babyllama-tok361", 256)])
def test_trained_models(check: Any, shared: Path, name: str, count: int) -> None:
    check(shared / "models" / name, count)


def test_bundled_model(check: Any, bundled: Path) -> None:
    check(bundled, 200)


ROPES: dict[str, dict[str, Any] | None] = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn with mscale": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "beta_fast": 16.0,
    },
}


@pytest.mark.parametrize("rope", ROPES)
def test_llama_rope_types(check: Any, checkpoint: Any, rope: str) -> None:
    """Past original_max_position_embeddings, where the types differ."""
    check(llama(checkpoint, rope), 200)


def llama(checkpoint: Any, rope: str) -> Path:
    """The same weights with every rope type."""
    parameters = ROPES[rope]
    return Path(
        checkpoint("llama", rope_parameters=parameters) if parameters else checkpoint("llama")
    )


@pytest.mark.parametrize("rope", [rope for rope in ROPES if rope != "default"])
def test_the_rope_types_differ(
    checkpoint: Any, hugging_face: Any, logits_of: Any, some_ids: Any, tolerance: float, rope: str
) -> None:
    """Else a library that ignores the type would pass."""
    ids = some_ids(200)
    default, other = (
        logits_of(hugging_face(llama(checkpoint, name)), ids) for name in ("default", rope)
    )
    assert np.abs(default - other).max() > 1000 * tolerance


def test_llama_dynamic_rope_at_its_context(check: Any, checkpoint: Any) -> None:
    """The base grows with the length: fixed when compiling, so compared at just that length."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    folder = checkpoint("llama", rope_parameters=rope, max_position_embeddings=96)
    check(folder, 160, context_window=160)


def test_llama_with_odd_sizes_and_biases(check: Any, checkpoint: Any) -> None:
    """GQA 7:1, head_dim apart from hidden_size / heads, untied, biases everywhere."""
    folder = checkpoint(
        "llama",
        hidden_size=84,
        num_attention_heads=7,
        num_key_value_heads=1,
        head_dim=20,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
    )
    check(folder, 100)


def test_qwen2(check: Any, checkpoint: Any) -> None:
    """Biases on q, k, v alone; GQA 7:1."""
    check(checkpoint("qwen2", hidden_size=112, num_attention_heads=14), 100)


@pytest.mark.parametrize("parallel", [True, False])
def test_gpt_neox(check: Any, checkpoint: Any, parallel: bool) -> None:
    """Partial rotary, parallel and sequential residual."""
    pct = 0.25 if parallel else 0.5
    folder = checkpoint("gpt_neox", use_parallel_residual=parallel, rotary_pct=pct)
    check(folder, 100)


def test_mistral_in_one_go(check: Any, checkpoint: Any) -> None:
    """A chunk of five windows."""
    check(checkpoint("mistral"), 120, prefill_chunk=128)


def test_a_window_of_one_token_less_differs(
    checkpoint: Any, hugging_face: Any, logits_of: Any, some_ids: Any, tolerance: float
) -> None:
    """The weights are the same, so the comparison above would notice a window off by one."""
    found = [
        logits_of(hugging_face(checkpoint("mistral", **sizes)), some_ids(120))
        for sizes in ({}, {"sliding_window": 23})
    ]
    assert np.abs(found[0] - found[1]).max() > 1000 * tolerance


def test_mistral_without_a_window(check: Any, checkpoint: Any) -> None:
    check(checkpoint("mistral", sliding_window=None, tie_word_embeddings=False), 120)
