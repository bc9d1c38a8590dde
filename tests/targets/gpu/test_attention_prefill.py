"""Many queries a sequence, against the chunk itself and against cached pages, on software GPUs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcc.targets.gpu.limits import Limits
from qcc.targets.spec import KVCacheConfig

from .attention_cases import PagedBatch, gpu_config, own_part, random_part, sliding_part, tree_part

CASES: dict[str, dict[str, Any]] = {
    "d64-f16": {"heads": (8, 2), "dim": 64, "dtype": "float16"},
    "d80-mqa-f32": {"heads": (7, 1), "dim": 80},
    "d256-f32": {"heads": (2, 2), "dim": 256},
    "d36-lse-cap-f16": {
        "heads": (8, 2),
        "dim": 36,
        "rotary": 16,
        "returns_lse": True,
        "logit_soft_cap": 2.0,
        "dtype": "float16",
    },
}
PARENTS = [-1, 0, 0, 1, 2, 4, 3, 5, 7, 8, 8, 6]


@pytest.mark.parametrize("name", CASES)
def test_paged_prefill_on_a_gpu(name: str) -> None:
    c = gpu_config(**CASES[name])
    rng = np.random.default_rng(1)
    sizes = ((1, 1), (37, 70), (3, 0), (16, 16))
    PagedBatch(c, [random_part(c, rng, t, n) for t, n in sizes]).prefill()


@pytest.mark.parametrize("name", CASES)
def test_ragged_prefill_on_a_gpu(name: str) -> None:
    c = gpu_config(**CASES[name])
    rng = np.random.default_rng(1)
    for causal in (False, True):
        parts = [own_part(c, rng, t, causal) for t in (1, 45, 33)]
        PagedBatch(c, parts).ragged(causal)


WINDOWED = gpu_config("float16", heads=(6, 2), dim=20, rotary=8, layer_window=21)


def test_prefill_in_a_layers_window() -> None:
    rng = np.random.default_rng(2)
    parts = [random_part(WINDOWED, rng, t, n, k_base=7) for t, n in ((40, 70), (3, 100))]
    parts[1].positions[:] = [130, 107, 119]  # queries of several sequences may meet
    batch = PagedBatch(WINDOWED, parts)
    batch.prefill(window=True)
    batch.prefill()
    PagedBatch(WINDOWED, [own_part(WINDOWED, rng, t, True) for t in (70, 5)]).ragged(True, True)


def test_a_windowed_layer_of_a_gpu_reads_only_its_window() -> None:
    """NaN in keys that no query of a tile sees: a weight of 0 would not stop it."""
    c = gpu_config("float32", heads=(8, 2), dim=64, layer_window=21)
    part = random_part(c, np.random.default_rng(3), 3, 100)
    part.k[:70], part.v[:70] = np.nan, np.nan
    batch = PagedBatch(c, [part])
    part.k[:70], part.v[:70] = 0, 0
    batch.prefill(window=True)


def test_prefill_in_a_sliding_window() -> None:
    c = gpu_config("float32", heads=(4, 2), dim=64, sliding_window_size=60, attention_sink_size=4)
    rng = np.random.default_rng(4)
    PagedBatch(c, [sliding_part(c, rng, t, n) for t, n in ((1, 70), (40, 30), (9, 100))]).prefill()
    PagedBatch(c, [sliding_part(c, rng, t, 0, own=True) for t in (90, 7)]).ragged(True)


def test_halves_of_rope_that_are_no_vectors() -> None:
    """Pairs of numbers 6 apart: vectors of two."""
    c = gpu_config("float32", heads=(2, 2), dim=20, rotary=12, sliding_window_size=60)
    rng = np.random.default_rng(5)
    PagedBatch(c, [sliding_part(c, rng, t, n) for t, n in ((1, 70), (20, 30))]).prefill()


TREES = {
    "full": (gpu_config("float32", heads=(4, 2), dim=64), Limits(paired_trees=True)),
    "window": (
        gpu_config("float16", heads=(6, 2), dim=20, rotary=8, layer_window=3),
        Limits(),
    ),
}


@pytest.mark.parametrize(("c", "limits"), TREES.values(), ids=TREES)
def test_trees_on_a_gpu(c: KVCacheConfig, limits: Limits) -> None:
    """In the cache, and of the chunk alone; one sequence's tree lies in another block of pages.

    The window is shorter than the trees are deep.
    """
    rng = np.random.default_rng(6)
    parts = [tree_part(c, rng, PARENTS, 2, 40), tree_part(c, rng, PARENTS[:5], 3, 0)]
    parts.append(random_part(c, rng, 3, 33))
    own = [tree_part(c, rng, PARENTS[:n], n, 0) for n in (12, 5)]
    for window in (False, True) if c.layer_window else (False,):
        PagedBatch(c, parts, limits).tree(window)
        PagedBatch(c, own, limits).ragged_tree(window)


def test_attention_within_the_least_limits() -> None:
    """8 storage buffers and 16 KiB: index arrays are gathered, tiles are small."""
    limits = Limits(max_storage_buffers=8, workgroup_bytes=16 * 1024)
    c = gpu_config("float32", heads=(8, 2), dim=256, layer_window=21)
    rng = np.random.default_rng(7)
    batch = PagedBatch(c, [random_part(c, rng, t, n) for t, n in ((5, 70), (3, 0))], limits)
    batch.prefill(window=True)
    one = PagedBatch(c, [random_part(c, rng, 1, n) for n in (70, 16)], limits)
    one.decode(window=True)


def test_prefill_on_dawn() -> None:
    """Of small tiles: SwiftShader compiles long shaders slowly."""
    c, limits = gpu_config("float32", heads=(8, 2), dim=64), Limits(workgroup_bytes=8 * 1024)
    rng = np.random.default_rng(8)
    parts = [random_part(c, rng, t, n) for t, n in ((37, 70), (3, 5))]
    PagedBatch(c, parts, limits).prefill(adapter="dawn")
    PagedBatch(c, [own_part(c, rng, 45, True)], limits).ragged(True, adapter="dawn")
