"""A Llama in numpy f64 that sees all tokens through a sliding window with attention sinks.

A sequence keeps its first S tokens and the last W - S. Keys are rotated by their place in the cache
(StreamingLLM, arXiv 2309.17453): a query that has W - 1 tokens before it there sees a sink at
distance W - 1 - i, however far it is in the text. transformers has no such model; without sinks it
has, but its f32 angles depart from it as positions grow: at 2,000 they make 9e-4 in the logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


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


def reference(weights: Mapping[str, Any], ids: list[int], window: int, sinks: int) -> Any:
    """f64[n, V] of weights by transformers' names: a tied Llama of 2 layers, 4 heads over 2 KV
    heads of 16."""
    w = {name: np.asarray(tensor, np.float64) for name, tensor in weights.items()}
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
