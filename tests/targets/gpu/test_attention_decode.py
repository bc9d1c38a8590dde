"""Decode: one query a sequence against cached pages, on software GPUs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from .attention_cases import PagedBatch, gpu_config, random_part, sliding_part

PLAIN: dict[str, dict[str, Any]] = {
    "d64-f32": {"heads": (8, 2), "dim": 64},
    "d80-mqa-f16": {"heads": (11, 1), "dim": 80, "dtype": "float16"},
    "d256-f16": {"heads": (2, 2), "dim": 256, "dtype": "float16"},
    "d12-lse-cap-f32": {"heads": (8, 2), "dim": 12, "returns_lse": True, "logit_soft_cap": 2.0},
}


@pytest.mark.parametrize("name", PLAIN)
def test_decodes_on_a_gpu(name: str) -> None:
    """Several sequences, one of them without keys; then one that is cut into parts."""
    c = gpu_config(**PLAIN[name])
    rng = np.random.default_rng(1)
    PagedBatch(c, [random_part(c, rng, 1, n) for n in (1, 16, 150, 0, 33)]).decode()
    PagedBatch(c, [random_part(c, rng, 1, 517)]).decode()


def test_decode_in_a_layers_window() -> None:
    """Of a part that begins in the middle of a page, and one that is not seen at all."""
    c = gpu_config("float16", heads=(8, 2), dim=96, layer_window=150)
    rng = np.random.default_rng(2)
    parts = [random_part(c, rng, 1, 517, k_base=7), random_part(c, rng, 1, 40)]
    parts[1].positions += 200
    batch = PagedBatch(c, parts)
    batch.decode(window=True)
    batch.decode()


def test_decode_in_a_sliding_window() -> None:
    c = gpu_config("float32", heads=(4, 2), dim=64, sliding_window_size=300, attention_sink_size=4)
    rng = np.random.default_rng(3)
    parts = [sliding_part(c, rng, 1, n) for n in (3, 40, 300, 450, 1000)]
    PagedBatch(c, parts).decode()
    PagedBatch(c, parts[-1:]).decode()


def test_decode_far_behind_the_keys() -> None:
    """Angles of 60,000 positions are as exact as those of 10."""
    c = gpu_config("float32", heads=(4, 2), dim=64, sliding_window_size=64_000)
    part = random_part(c, np.random.default_rng(5), 1, 40)
    part.positions += 60_000
    PagedBatch(c, [part]).decode()


def test_decode_on_dawn() -> None:
    c = gpu_config(**PLAIN["d64-f32"])
    rng = np.random.default_rng(4)
    PagedBatch(c, [random_part(c, rng, 1, n) for n in (517, 3)]).decode(adapter="dawn")
