"""A sliding window with attention sinks, against a Llama in numpy f64 that sees all tokens.

A sequence keeps its first S tokens and the last W - S. Keys are rotated by their place in the cache
(StreamingLLM, arXiv 2309.17453): a query that has W - 1 tokens before it there sees a sink at
distance W - 1 - i, however far it is in the text. transformers has no such model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file


def rms_norm(x: Any, weight: Any) -> Any:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5) * weight


def rotate(x: Any, positions: Any) -> Any:
    """x [n, heads, d] at int[n]."""
    half = x.shape[-1] // 2
    angles = positions[:, None, None] * 10000.0 ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attend(q: Any, k: Any, v: Any, window: int, sinks: int) -> Any:
    """q, k, v [n, heads, d], not rotated -> [n, heads, d]."""
    n, _, d = q.shape
    query, key = np.arange(n)[:, None], np.arange(n)[None]
    near = np.einsum("ihd,jhd->hij", rotate(q, query[:, 0]), rotate(k, key[0]))
    in_cache = rotate(q, np.minimum(query[:, 0], window - 1))
    to_sinks = np.einsum("ihd,jhd->hij", in_cache, rotate(k, key[0]))
    recent = query - key < window - sinks
    scores = np.where(recent | (query < window), near, to_sinks) / d**0.5
    kept = (key <= query) & (recent | (key < sinks))
    weights = np.exp(np.where(kept, scores, -np.inf))
    return np.einsum("hij,jhd->ihd", weights / weights.sum(axis=-1, keepdims=True), v)


def reference(folder: Path, ids: list[int], window: int, sinks: int) -> Any:
    """f64[n, V]: a tied Llama of 2 layers, 4 heads over 2 KV heads of 16."""
    w = {name: t.astype(np.float64) for name, t in load_file(folder / "model.safetensors").items()}
    x = w["model.embed_tokens.weight"][ids]
    for layer in ("model.layers.0.", "model.layers.1."):
        h = rms_norm(x, w[layer + "input_layernorm.weight"])
        q, k, v = (
            (h @ w[f"{layer}self_attn.{name}_proj.weight"].T).reshape(len(ids), -1, 16)
            for name in "qkv"
        )
        out = attend(q, k.repeat(2, axis=1), v.repeat(2, axis=1), window, sinks)
        x = x + out.reshape(len(ids), -1) @ w[layer + "self_attn.o_proj.weight"].T
        h = rms_norm(x, w[layer + "post_attention_layernorm.weight"])
        gate, up = (h @ w[f"{layer}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[layer + "mlp.down_proj.weight"].T
    return rms_norm(x, w["model.norm.weight"]) @ w["model.embed_tokens.weight"].T


def test_the_reference_without_sinks_is_transformers_mistral(
    checkpoint: Any, hugging_face: Any, logits_of: Any, some_ids: Any, tolerance: float
) -> None:
    folder, ids = checkpoint("mistral"), some_ids(100)
    expected = logits_of(hugging_face(folder), ids)
    np.testing.assert_allclose(reference(folder, ids, 24, 0), expected, rtol=0, atol=tolerance)


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
    expected = reference(folder, ids, 24, 5)
    assert np.abs(expected - reference(folder, ids, 24, 0)).max() > 1000 * tolerance
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
