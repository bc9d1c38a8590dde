"""What holds of models whose layers keep states: however tokens come, and what cannot go back."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from qcc.runtime import SamplingParams
from qcc.runtime.engine.request import Session
from qcc.runtime.errors import QccError

from ..sequences import Runs
from .cases import CASES, Case
from .conftest import Original

EACH = [pytest.param(c, id=c.name) for c in CASES if c.name in ("qwen3_5", "falcon_h1")]
SOME = [each for each in EACH if each.id == "qwen3_5"]
each_kind = pytest.mark.parametrize("case", EACH, indirect=True)


@pytest.fixture
def runs(case: Case, original: Original, compiled: Any) -> Any:
    found = Runs(compiled(original.folder, "q0f32", **case.sizes))
    found.model.cache.clear()
    yield found
    found.llm.reset()
    found.model.cache.clear()


@pytest.fixture
def ids(some_ids: Any) -> list[int]:
    found: list[int] = some_ids(60)
    return found


@pytest.fixture
def close(tolerance: float) -> Any:
    def compare(found: Any, expected: Any) -> None:
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)

    return compare


@each_kind
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_chunks_shorter_than_the_convolution(
    runs: Runs, original: Original, ids: list[int], close: Any, size: int
) -> None:
    """By `batch_verify`, and by `prefill`, of which only a chunk's last position comes back."""
    expected = original.logits(ids)
    verified, prefilled = runs.new(), runs.new()
    for at in range(0, len(ids), size):
        part = ids[at : at + size]
        close(runs.verify(verified, part), expected[at : at + len(part)])
        close(runs.prefill([prefilled], [part]), expected[at + len(part) - 1][None])


@each_kind
def test_sequences_come_and_go(runs: Runs, original: Original, some_ids: Any, close: Any) -> None:
    """Places are used again, out of order; prompts of 1 to 3 tokens are computed beside others."""
    texts = [some_ids(40, seed=seed) for seed in range(6)]
    expected = [original.logits(text) for text in texts]
    done = dict.fromkeys(range(6), 0)

    def advance(which: list[int], seqs: list[int], counts: list[int]) -> None:
        parts = [texts[i][done[i] : done[i] + n] for i, n in zip(which, counts, strict=True)]
        one = all(n == 1 for n in counts)
        found = runs.decode(seqs, [p[0] for p in parts]) if one else runs.prefill(seqs, parts)
        for i, n in zip(which, counts, strict=True):
            done[i] += n
        close(found, [expected[i][done[i] - 1] for i in which])

    a, b, c = (runs.new() for _ in range(3))
    advance([0, 1, 2], [a, b, c], [3, 11, 1])
    advance([0, 2], [a, c], [1, 1])
    runs.model.remove_sequence(b)
    d = runs.new()
    advance([3, 0], [d, a], [2, 9])
    advance([2, 3, 0], [c, d, a], [1, 1, 1])
    runs.model.remove_sequence(a)
    e, f = runs.new(), runs.new()
    advance([4, 5, 2], [e, f, c], [1, 5, 2])
    advance([5, 2, 3, 4], [f, c, d, e], [1, 1, 1, 1])
    advance([4], [e], [1])


@each_kind
def test_forks(runs: Runs, original: Original, ids: list[int], some_ids: Any, close: Any) -> None:
    """A child begins where its parent is; from an earlier position it is refused."""
    tails = [some_ids(9, seed=seed)[1:] for seed in (1, 2)]
    parent = runs.new()
    runs.verify(parent, ids[:20])
    child = runs.fork(parent)
    for seq, tail in zip((parent, child), tails, strict=True):
        expected = original.logits(ids[:20] + tail)[20:]
        close(runs.verify(seq, tail[:3]), expected[:3])
    with pytest.raises(QccError, match="cannot go on after the first 11 of 23 tokens"):
        runs.fork(parent, 11)
    runs.model.remove_sequence(parent)
    close(runs.verify(child, tails[1][3:]), original.logits(ids[:20] + tails[1])[23:])


@each_kind
def test_tokens_are_not_forgotten(runs: Runs, ids: list[int]) -> None:
    seq = runs.new()
    runs.verify(seq, ids[:10])
    runs.model.pop(seq, 0)
    assert not runs.model.limits.forgets
    with pytest.raises(QccError, match="cannot forget the last 3 tokens of a sequence; compute"):
        runs.model.pop(seq, 3)


@each_kind
def test_a_session_whose_prompt_departs_begins_anew(runs: Runs, ids: list[int]) -> None:
    """A prompt that goes on where the session is computes the rest; any other, all of it."""
    llm, session = runs.llm, Session()
    greedy = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)

    def answer(prompt: list[int], within: Session | None) -> Any:
        stream = llm.stream(prompt, greedy, within)
        assert "".join(stream) == stream.result.text
        return stream.result

    first = answer(ids[:20], session)
    longer = [*ids[:20], *first.token_ids[:4], *ids[30:40]]
    for prompt, reused in ((longer, 24), (ids[:33], 0), (ids[:20], 0)):
        found = answer(prompt, session)
        assert found.token_ids == answer(prompt, None).token_ids
        assert found.cached_tokens == reused, prompt


@each_kind
def test_batches_of_requests(runs: Runs, some_ids: Any) -> None:
    """More requests than places: each is answered as if it were alone."""
    prompts = [some_ids(count, seed=count) for count in (3, 30, 1, 17, 2, 45)]
    greedy = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    alone = [runs.llm.generate([prompt], greedy)[0].token_ids for prompt in prompts]
    together = runs.llm.generate(prompts, greedy)
    assert [result.token_ids for result in together] == alone


@pytest.mark.parametrize("case", SOME, indirect=True)
def test_only_attention_has_pages(case: Case, runs: Runs, cli: Any) -> None:
    """The budget: keys and values of one layer of five, and the states of the others."""
    from qcc.runtime.engine.memory import budget

    meta, sizes = runs.model.library.metadata, case.config
    assert meta.num_hidden_layers == 1
    keys = sizes["linear_num_key_heads"] * sizes["linear_key_head_dim"]
    heads, wide = sizes["linear_num_value_heads"], sizes["linear_value_head_dim"]
    of_layer = 3 * (2 * keys + heads * wide) + heads * sizes["linear_key_head_dim"] * wide
    assert meta.state_bytes == 4 * 4 * of_layer
    held = runs.model.cache.recurrent
    of_four = [4 * math.prod(map(int, state.shape)) for state in held.tensors]
    assert sum(of_four) == 4 * meta.state_bytes
    for batch in (1, 4):
        found = budget(meta, batch, 64)
        assert found.states == batch * meta.state_bytes
        assert found.total == sum((found.weights, found.kv_cache, found.temporaries, found.states))
    shown = cli("show", runs.llm.artifact.folder).out
    each = f"{meta.state_bytes / 1e3:,.1f} kB a sequence"
    assert f"states               {4 * meta.state_bytes / 1e6:10,.1f} MB  ({each})" in shown
