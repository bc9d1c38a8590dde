"""Trained models of 4 bits: low precision beside what the weights cost, and full contexts.

KL divergence in nats over held-out stories; the reference of the weights is transformers in f32 on
the checkpoint, that of a way to run the same library in high precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

A32 = """
dtype: float16
linear: 4/32a
embedding: 8/32a
lm_head: 8/32a
method: mse
"""
CASES = [
    ("babyllama-tok361", 256, "q4f16_1"),
    ("stories260K", 512, "a32"),
    pytest.param(("babyllama-tok361", 256, "a32"), marks=pytest.mark.slow),
    pytest.param(("stories260K", 512, "q4f16_1"), marks=pytest.mark.slow),
]
WINDOWS = 3
MOST = 0.1  # of what the weights cost
# precision, KV cache, may use tiles, token by token; the least that its rounding must show
WAYS = {
    "decode int8": ("low", "f32", True, True, 1e-5),
    "decode int8, f16 KV": ("low", "f16", True, True, 1e-5),
    "decode int8, int8 KV": ("low", "int8", True, True, 1e-5),
    "prefill int8": ("low", "f32", False, False, 1e-5),
    "prefill tiles": ("low", "f32", True, False, 1e-6),
    "prefill, f16 KV": ("low", "f16", True, False, 1e-6),
    "f16 KV alone": ("high", "f16", True, False, 1e-8),
    "f16 KV alone, decode": ("high", "f16", True, True, 1e-8),
    "int8 KV alone": ("high", "int8", True, False, 1e-6),
}


def divergence(reference: Any, ours: Any) -> float:
    """Mean KL(reference || ours) of logits f32[n, V]."""
    p, q = (
        x - x.max(1, keepdims=True) - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1))[:, None]
        for x in (reference.astype(np.float64), ours.astype(np.float64))
    )
    return float((np.exp(p) * (p - q)).sum(1).mean())


class Trained:
    """A model's artifact under one scheme, its windows of text, and logits of two references."""

    def __init__(self, llm: Any, windows: list[list[int]], original: Any, ours: Any) -> None:
        """`original`, `ours`: transformers' logits, on the checkpoint's and on our weights."""
        self.llm, self.windows, self.original, self.ours = llm, windows, original, ours
        self.high = self.logits("high", "f32", True, False)
        self.cost = divergence(original, self.high)

    def logits(self, precision: str, kv: str, tiles: bool, step_by_step: bool) -> Any:
        """f32[n, V] of all windows, one behind the other."""
        model = self.llm.model
        model.switch(precision, kv, tiles)
        if not step_by_step:
            return np.concatenate([self.llm.logits(ids) for ids in self.windows])
        rows = []
        for seq, ids in enumerate(self.windows):
            model.add_sequence(seq)
            rows += [model.decode([seq], np.array([t], np.int32)).copy() for t in ids]
            model.remove_sequence(seq)
        return np.concatenate(rows)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[2]}")
def trained(
    request: Any, shared: Path, compiled: Any, hugging_face: Any, on_our_weights: Any,
    logits_of: Any, tmp_path_factory: Any,
) -> Iterator[Trained]:  # fmt: skip
    from qcc.runtime import LLM

    name, context, scheme = request.param
    text = shared / "text/tinystories_valid_excerpt.txt"
    folder = shared / "models" / name
    if not (folder.is_dir() and text.is_file()):
        pytest.skip(f"{folder} or {text} is not there")
    if scheme == "a32":
        path = tmp_path_factory.mktemp("scheme") / "a32.yaml"
        path.write_text(A32, encoding="utf-8")
        scheme = str(path)
    artifact = compiled(folder, scheme, low=True).artifact.folder
    llm = LLM(artifact, precision="high")
    content = text.read_text(encoding="utf-8").replace("<|endoftext|>", "")
    ids = llm.tokenizer.encode_rendered(content)
    step = context - 1
    windows = [[1, *ids[at : at + step]] for at in range(0, WINDOWS * step, step)]
    assert {len(window) for window in windows} == {context}
    models = hugging_face(folder), on_our_weights(artifact, folder, scheme)
    yield Trained(
        llm, windows, *(np.concatenate([logits_of(m, w) for w in windows]) for m in models)
    )


@pytest.mark.parametrize("way", WAYS)
def test_low_precision_costs_little_beside_the_weights(trained: Trained, way: str) -> None:
    """Also more than nothing: it must be the way that is meant."""
    *how, least = WAYS[way]
    assert 0.005 < trained.cost < 1
    found = divergence(trained.high, trained.logits(*how))
    assert least < found < MOST * trained.cost, (found, trained.cost)


def test_tiles_are_those_of_this_processor(trained: Trained) -> None:
    """Where there are none the two prefills are the same."""
    from qcc.runtime.machine import enable_tiles

    tiled, plain = (trained.logits("low", "f32", tiles, False) for tiles in (True, False))
    assert (tiled == plain).all() != enable_tiles()


def test_full_contexts_in_high_precision(
    trained: Trained, tolerance: float, same_library: float
) -> None:
    """All positions up to the last that the model allows, at once and token by token."""
    np.testing.assert_allclose(trained.high, trained.ours, rtol=0, atol=tolerance)
    decoded = trained.logits("high", "f32", True, True)
    np.testing.assert_allclose(decoded, trained.high, rtol=0, atol=same_library)
