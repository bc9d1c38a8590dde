"""A sliding window with attention sinks, against a Llama in numpy f64 (sliding_llama.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from .sliding_llama import reference


def weights_of(folder: Path) -> Any:
    return load_file(folder / "model.safetensors")


def test_the_reference_without_sinks_is_transformers_mistral(
    checkpoint: Any, hugging_face: Any, logits_of: Any, some_ids: Any, tolerance: float
) -> None:
    folder, ids = checkpoint("mistral"), some_ids(100)
    expected = logits_of(hugging_face(folder), ids)
    np.testing.assert_allclose(
        reference(weights_of(folder), ids, 24, 0), expected, rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("size", [1, 10, 100])
def test_sinks(compiled: Any, checkpoint: Any, some_ids: Any, tolerance: float, size: int) -> None:
    """Four windows of tokens, in chunks of `size`; a sink of 5 ends within a page."""
    folder, ids = checkpoint("llama"), some_ids(100)
    llm = compiled(folder, "q0f32", sliding_window=24, attention_sink=5, prefill_chunk=128)
    model = llm.model
    model.add_sequence(77)
    parts = [ids[i : i + size] for i in range(0, 100, size)]
    found = np.concatenate([model.verify(77, np.array(part, np.int32)) for part in parts])
    model.remove_sequence(77)
    expected = reference(weights_of(folder), ids, 24, 5)
    assert np.abs(expected - reference(weights_of(folder), ids, 24, 0)).max() > 1000 * tolerance
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
