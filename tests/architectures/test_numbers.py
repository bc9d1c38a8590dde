"""Every architecture computes what transformers computes, however tokens reach it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ..sequences import Runs
from .cases import QUANTIZED, Case
from .conftest import Original
from .our_weights import our_weights

# Tokens that are decoded one by one, behind all others.
DECODED = 12
CHUNK = 33  # within pages and windows

Close = Callable[[Any, Any], None]


@pytest.fixture
def ids(case: Case, original: Original, some_ids: Any) -> list[int]:
    found: list[int] = some_ids(case.count)
    return found


@pytest.fixture
def close(tolerance: float) -> Close:
    def compare(found: Any, expected: Any) -> None:
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)

    return compare


@pytest.fixture
def runs(case: Case, original: Original, compiled: Any) -> Runs:
    return Runs(compiled(original.folder, "q0f32", **case.sizes))


def test_prefill(runs: Runs, original: Original, ids: list[int], close: Close) -> None:
    """All positions in one go, and the last one alone as clients ask for it."""
    expected = original.logits(ids)
    assert 4 < np.abs(expected).max() < 40, "logits too flat to show mistakes, or f32 makes some"
    with runs.sequences(2) as (every, last):
        close(runs.verify(every, ids), expected)
        close(runs.prefill([last], [ids]), expected[-1:])


def test_chunks_then_decode(runs: Runs, original: Original, ids: list[int], close: Close) -> None:
    expected = original.logits(ids)
    with runs.sequences(1) as (seq,):
        close(by_chunks(runs, seq, ids), expected)


def by_chunks(runs: Runs, seq: int, ids: list[int]) -> Any:
    """f32[n, V]: chunks, then tokens one by one."""
    prompt = len(ids) - DECODED
    parts = [runs.verify(seq, ids[:prompt][at : at + CHUNK]) for at in range(0, prompt, CHUNK)]
    parts += [runs.decode([seq], [token]) for token in ids[prompt:]]
    return np.concatenate(parts)


def test_batch(case: Case, runs: Runs, original: Original, some_ids: Any, close: Close) -> None:
    """Three sequences of different lengths, prefilled together, then decoded together."""
    texts = [some_ids(length + 4, seed=length) for length in case.lengths]
    expected = [original.logits(text)[-5:] for text in texts]
    with runs.sequences(3) as seqs:
        close(runs.prefill(seqs, [text[:-4] for text in texts]), [rows[0] for rows in expected])
        for step in range(4):
            found = runs.decode(seqs, [text[step - 4] for text in texts])
            close(found, [rows[step + 1] for rows in expected])


@pytest.mark.parametrize("case", QUANTIZED, indirect=True)
@pytest.mark.parametrize("scheme", ["q4f16_1", pytest.param("q8f16_1", marks=pytest.mark.slow)])
def test_quantized(
    case: Case, original: Original, ids: list[int], compiled: Any, close: Close, scheme: str,
    tolerance: float, in_f32: Callable[[str], str],
) -> None:  # fmt: skip
    """Against the original on the dequantized weights, which differ from the checkpoint's."""
    scheme = in_f32(scheme)
    runs = Runs(compiled(original.folder, scheme, **case.sizes))
    weights = our_weights(runs.llm.artifact.folder, original.folder, scheme)
    expected = original.with_weights(weights)(ids)
    assert np.abs(expected - original.logits(ids)).max() > 5 * tolerance
    with runs.sequences(1) as (seq,):
        close(by_chunks(runs, seq, ids), expected)


def test_memory_budget(runs: Runs, original: Original, cli: Any) -> None:
    """What `qcc show` foretells of a checkpoint, the artifact holds and its library says."""
    foretold, found = (
        json.loads(cli("show", folder, "--quant", "q0f32", "--json").out)
        for folder in (original.folder, runs.llm.artifact.folder)
    )
    (library,) = found["libraries"].values()
    files = runs.llm.artifact.folder.glob("params_shard_*.bin")
    assert foretold["stored_bytes"] == sum(file.stat().st_size for file in files)
    assert foretold["kv_bytes_per_token"] == library["kv_bytes_per_token"]
    # Behind the slots come tensors without numbers of their own.
    slots = list(runs.model.library.params)[: len(runs.model.library.metadata.slots)]
    held = [runs.model.library.device.array(slot).nbytes for slot in slots]
    assert library["budget"]["weights"] == sum(held) >= foretold["stored_bytes"]
    tokens = foretold["kv_bytes_per_token"] * library["kv_tokens"]
    assert library["budget"]["kv_cache"] >= tokens
