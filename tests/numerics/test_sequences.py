"""However tokens reach the model, the logits are the same: chunks, decode steps, batches, forks.

And over long contexts they are transformers', or those of a reference in f64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from ..sequences import Runs
from .sliding_llama import reference

LONG = {"max_position_embeddings": 2048}  # four chunks
NEOX = {"use_parallel_residual": True, "rotary_pct": 0.25, **LONG}
CASES = {
    "llama": ("llama", LONG, "q0f32", {}),
    "4 bits": ("gpt_neox", NEOX, "q4f16_1", {}),
    # Windows of 24 tokens on pages of 16, in chunks of up to five windows.
    "sliding window": ("mistral", {}, "q4f16_1", {"prefill_chunk": 128}),
}
LOW = ["4 bits", "sliding window"]
# TVM's KV cache forks a sequence with a sliding window only within its attention sink.
FORKING = ["llama", "4 bits"]


@pytest.fixture(params=CASES)
def runs(request: Any, compiled: Any, checkpoint: Any) -> Iterator[Runs]:
    """The cases' libraries, with an empty KV cache."""
    arch, overrides, quant, sizes = CASES[request.param]
    llm = compiled(checkpoint(arch, **overrides), quant, low=request.param in LOW, **sizes)
    llm.model.cache.clear()
    yield Runs(llm)
    llm.model.cache.clear()


@pytest.fixture(scope="module")
def expected(checkpoint: Any, hugging_face: Any, on_our_weights: Any, logits_of: Any) -> Any:
    """expected(name of a case, ids, artifact; None: the checkpoint's weights): [n, V]."""

    def logits(case: str, ids: list[int], artifact: Any) -> Any:
        arch, overrides, quant, _ = CASES[case]
        folder = checkpoint(arch, **overrides)
        model = on_our_weights(artifact, folder, quant) if artifact else hugging_face(folder)
        if arch == "mistral":
            return reference(model.state_dict(), ids, 24, 0)
        return logits_of(model, ids)

    return logits


@pytest.fixture
def ids(some_ids: Any) -> list[int]:
    return some_ids(100)


@pytest.fixture
def whole(runs: Runs, ids: list[int]) -> Any:
    """f32[100, V]: all positions in one go."""
    seq = runs.new()
    logits = runs.verify(seq, ids)
    runs.model.remove_sequence(seq)
    return logits


@pytest.fixture
def same(same_library: float) -> Any:
    def compare(found: Any, expected: Any) -> None:
        np.testing.assert_allclose(found, expected, rtol=0, atol=same_library)

    return compare


def test_prefill_gives_the_last_position(runs: Runs, ids: list[int], whole: Any, same: Any) -> None:
    same(runs.prefill([runs.new()], [ids]), whole[-1:])


def test_prefill_then_decode(runs: Runs, ids: list[int], whole: Any, same: Any) -> None:
    seq = runs.new()
    same(runs.prefill([seq], [ids[:30]]), whole[29:30])
    for i in range(30, 100):
        same(runs.decode([seq], ids[i : i + 1]), whole[i : i + 1])


@pytest.mark.parametrize("size", [1, 7, 16, 33])
def test_chunks(runs: Runs, ids: list[int], whole: Any, same: Any, size: int) -> None:
    """Chunks that end within pages and windows, and at their ends."""
    seq = runs.new()
    parts = [runs.verify(seq, ids[i : i + size]) for i in range(0, 100, size)]
    same(np.concatenate(parts), whole)


def test_a_batch_is_each_alone(runs: Runs, ids: list[int], some_ids: Any, same: Any) -> None:
    """Three sequences of different lengths: prefilled together, then decoded together."""
    prompts = [ids[:50], some_ids(9, seed=1), some_ids(17, seed=2)]
    more = some_ids(40, seed=3)[1:]
    alone = []
    for prompt in prompts:
        seq = runs.new()
        alone.append(runs.verify(seq, prompt + more)[len(prompt) - 1 :])
        runs.model.remove_sequence(seq)
    seqs = [runs.new() for _ in prompts]
    same(runs.prefill(seqs, prompts), np.stack([logits[0] for logits in alone]))
    for step, token in enumerate(more):
        found = runs.decode(seqs, [token] * len(seqs))
        same(found, np.stack([logits[step + 1] for logits in alone]))


def test_prefill_of_some_while_others_are_longer(
    runs: Runs, ids: list[int], whole: Any, some_ids: Any, same: Any
) -> None:
    """Later chunks of one sequence beside the first of another."""
    other_ids = some_ids(20, seed=4)
    alone = runs.new()
    expected = runs.verify(alone, other_ids)[-1]
    runs.model.remove_sequence(alone)
    seq, other = runs.new(), runs.new()
    runs.prefill([seq], [ids[:45]])
    same(runs.prefill([seq, other], [ids[45:60], other_ids]), np.stack([whole[59], expected]))


def test_removal_leaves_the_others(
    runs: Runs, ids: list[int], whole: Any, some_ids: Any, same: Any
) -> None:
    """Freed pages are used by new sequences; those that stay keep theirs."""
    first, kept, last = runs.new(), runs.new(), runs.new()
    for seq, seed in ((first, 5), (last, 6)):
        runs.prefill([seq], [some_ids(40, seed=seed)])
    runs.prefill([kept], [ids[:40]])
    runs.model.remove_sequence(first)
    new = runs.new()
    runs.prefill([new], [some_ids(60, seed=7)])
    runs.model.remove_sequence(last)
    same(runs.verify(kept, ids[40:70]), whole[40:70])
    runs.model.remove_sequence(new)
    same(runs.verify(kept, ids[70:]), whole[70:])


@pytest.mark.parametrize("runs", FORKING, indirect=True)
def test_forks_leave_the_others(runs: Runs, ids: list[int], some_ids: Any, same: Any) -> None:
    """Parent and child share a prefix, go apart, and the parent may go."""
    prefix, left, right = ids[:21], some_ids(20, seed=8)[1:], some_ids(20, seed=9)[1:]
    expected = []
    for tail in (left, right):
        seq = runs.new()
        expected.append(runs.verify(seq, prefix + tail)[len(prefix) :])
        runs.model.remove_sequence(seq)
    parent = runs.new()
    runs.prefill([parent], [prefix])
    child = runs.fork(parent)
    same(runs.verify(parent, left[:10]), expected[0][:10])
    same(runs.verify(child, right[:10]), expected[1][:10])
    same(runs.verify(parent, left[10:]), expected[0][10:])
    runs.model.remove_sequence(parent)
    same(runs.verify(child, right[10:]), expected[1][10:])


@pytest.mark.parametrize("runs", FORKING, indirect=True)
def test_fork_of_a_part(runs: Runs, ids: list[int], some_ids: Any, same: Any) -> None:
    """A child of the first 11 tokens, in the midst of a page."""
    tail = some_ids(13, seed=10)[1:]
    alone = runs.new()
    expected = runs.verify(alone, ids[:11] + tail)[11:]
    runs.model.remove_sequence(alone)
    parent = runs.new()
    before = runs.verify(parent, ids[:20])
    child = runs.fork(parent, 11)
    same(runs.verify(child, tail), expected)
    again = runs.new()
    same(runs.verify(again, ids[:20]), before)


def test_popped_tokens_are_forgotten(
    runs: Runs, ids: list[int], whole: Any, some_ids: Any, same: Any
) -> None:
    seq = runs.new()
    runs.verify(seq, ids[:10] + some_ids(8, seed=11))
    runs.model.pop(seq, 8)
    same(runs.verify(seq, ids[10:20]), whole[10:20])


def long(runs: Runs) -> int:
    """Tokens: all that the model takes; 1,024 where it takes any number."""
    return runs.model.limits.max_length or 1024


@pytest.mark.parametrize("runs", CASES, indirect=True)
def test_long_contexts(
    request: Any, runs: Runs, some_ids: Any, expected: Any, tolerance: float
) -> None:
    """All tokens in chunks, and the last 32 of them one by one; windows slide over 42 times."""
    case, ids = request.node.callspec.params["runs"], some_ids(long(runs))
    theirs = expected(case, ids, None if case == "llama" else runs.llm.artifact.folder)
    np.testing.assert_allclose(runs.llm.logits(ids), theirs, rtol=0, atol=tolerance)
    seq, size = runs.new(), runs.model.limits.prefill_chunk_size
    for at in range(0, len(ids) - 32, size):
        runs.prefill([seq], [ids[at : min(at + size, len(ids) - 32)]])
    decoded = [runs.decode([seq], [token])[0] for token in ids[-32:]]
    np.testing.assert_allclose(decoded, theirs[-32:], rtol=0, atol=tolerance)


@pytest.mark.parametrize("runs", LOW, indirect=True)
def test_long_contexts_in_low_precision(
    request: Any, runs: Runs, some_ids: Any, expected: Any
) -> None:
    """In chunks and token by token, what it costs stays below a tenth of what 4 bits cost."""
    from qcc.runtime import LLM

    def rows(logits: Any) -> Any:
        x = logits.astype(np.float64)
        return x - np.log(np.exp(x).sum(1, keepdims=True))

    def divergence(p: Any, q: Any) -> Any:
        """Of the first and of the second half, where whatever adds up shows."""
        return (np.exp(p) * (p - q)).sum(1).reshape(2, -1).mean(1)

    ids = some_ids(long(runs))
    high = rows(runs.llm.logits(ids))
    cost = divergence(rows(expected(request.node.callspec.params["runs"], ids, None)), high)
    llm = LLM(runs.llm.artifact.folder, precision="low")
    low = Runs(llm)
    seq = low.new()
    decoded = np.concatenate([low.decode([seq], [token]) for token in ids])
    low.model.remove_sequence(seq)
    for logits in (llm.logits(ids), decoded):
        found = divergence(high, rows(logits))
        assert (found > 1e-6).all() and (found < 0.1 * cost).all(), (found, cost)
