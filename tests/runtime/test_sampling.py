"""Sampling against its definitions: brute force in NumPy, and Hugging Face's own processors."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from qcc.runtime.engine.sampling import Sampler, SamplingParams, candidates, pick
from qcc.runtime.errors import QccError

V = 50


def some_logits(seed: int = 0, size: int = V) -> np.ndarray:
    return (3 * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


def probabilities(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """f64[V]: the distribution that is drawn from."""
    ids, probs = candidates(logits, params.temperature, params.top_k, params.top_p, params.min_p)
    full = np.zeros(len(logits))
    full[ids] = probs
    return full / full.sum()


@pytest.mark.parametrize("size", [V, 5000])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 5},
        {"top_k": 1000},
        {"top_p": 0.7},
        {"top_p": 1e-9},
        {"min_p": 0.1},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
    ],
)
def test_the_distribution_is_that_of_hugging_face(changes: dict, size: int) -> None:
    torch = pytest.importorskip("torch")
    warpers = pytest.importorskip("transformers.generation.logits_process")
    params = SamplingParams(**changes)
    logits = some_logits(1, size)
    chain = [warpers.TemperatureLogitsWarper(params.temperature)]
    if params.top_k:
        chain.append(warpers.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(warpers.TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(warpers.MinPLogitsWarper(params.min_p))
    scores = torch.from_numpy(logits.copy())[None]
    for warper in chain:
        scores = warper(None, scores)
    expected = torch.softmax(scores[0].double(), 0).numpy()
    got = probabilities(logits, params)
    assert (got > 0).tolist() == (expected > 0).tolist()
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_top_p_that_is_reached_exactly_takes_no_more() -> None:
    halves = np.log(np.array([0.25, 0.5, 0.25], np.float64)).astype(np.float32)
    ids, _ = candidates(halves - halves.max(), 1.0, 0, 0.5, 0)
    assert ids.tolist() == [1]


def test_repetition_penalty_is_hugging_faces() -> None:
    torch = pytest.importorskip("torch")
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits, prompt = some_logits(2), [3, 7, 7, 11]
    sampler = Sampler(SamplingParams(repetition_penalty=1.3), prompt, V)
    processor = warpers.RepetitionPenaltyLogitsProcessor(1.3)
    expected = processor(torch.tensor([prompt]), torch.from_numpy(logits.copy())[None])[0].numpy()
    np.testing.assert_allclose(sampler._penalized(logits), expected, rtol=1e-6)


def test_presence_and_frequency_count_the_answer_only() -> None:
    params = SamplingParams(temperature=0, presence_penalty=0.5, frequency_penalty=0.25)
    sampler = Sampler(params, [9], V)
    logits = np.zeros(V, np.float32)
    logits[[4, 9]] = 10, 5
    before = logits.copy()
    assert [sampler(logits) for _ in range(3)] == [4, 4, 4]
    penalized = sampler._penalized(logits)
    assert penalized[4] == pytest.approx(10 - 0.5 - 3 * 0.25)
    assert penalized[9] == 5  # in the prompt only
    np.testing.assert_array_equal(logits, before)


def test_penalties_break_a_greedy_loop() -> None:
    logits = np.zeros(V, np.float32)
    logits[[4, 9]] = 1.0, 0.9
    sampler = Sampler(SamplingParams(temperature=0, presence_penalty=0.2), [], V)
    assert [sampler(logits), sampler(logits)] == [4, 9]


def test_logit_bias_bans_and_forces() -> None:
    logits = some_logits(3)
    best = int(logits.argmax())
    banned = Sampler(SamplingParams(temperature=0, logit_bias={best: -100}), [], V)
    assert banned(logits) == int(np.argsort(logits)[-2])
    forced = Sampler(SamplingParams(temperature=1, logit_bias={7: 100.0}, seed=0), [], V)
    assert {forced(logits) for _ in range(20)} == {7}
    with pytest.raises(QccError, match="token 50 is not below the vocabulary 50"):
        Sampler(SamplingParams(logit_bias={50: 1}), [], V)


def test_greedy_takes_the_likeliest_whatever_else_is_set() -> None:
    logits = some_logits(4)
    for changes in ({}, {"top_k": 3}, {"top_p": 0.1}, {"min_p": 0.9}):
        sampler = Sampler(SamplingParams(temperature=0, **changes), [], V)
        assert sampler(logits) == int(logits.argmax())


def test_a_tiny_temperature_is_greedy_and_does_not_overflow() -> None:
    logits = some_logits(5) * 1e4
    assert Sampler(SamplingParams(temperature=1e-30, seed=0), [], V)(logits) == logits.argmax()


def test_draws_follow_the_distribution() -> None:
    logits = some_logits(6)
    params = SamplingParams(temperature=1.2, top_p=0.9, seed=1)
    sampler = Sampler(params, [], V)
    counts = np.bincount([sampler(logits) for _ in range(20_000)], minlength=V) / 20_000
    expected = probabilities(logits, params)
    assert np.abs(counts - expected).max() < 4 * np.sqrt(0.25 / 20_000)
    assert not counts[expected == 0].any()


@pytest.mark.parametrize("size", [1, 7, 1024, 1025, 5000])
def test_a_pick_is_where_the_running_sum_passes(size: int) -> None:
    rng = np.random.default_rng(size)
    probs = rng.random(size).astype(np.float32) * (rng.random(size) < 0.5)
    probs[-1] = 0 if size > 1 else 1
    sums = probs.cumsum(dtype=np.float64)
    for uniform in [0.0, 1 - 2**-53, 1.0, *rng.random(200)]:
        index = pick(probs, uniform)
        assert probs[index] > 0
        before = sums[index - 1] if index else 0.0
        assert before - 1e-9 <= uniform * sums[-1] <= sums[index] + 1e-9


def test_a_seed_repeats_and_another_differs() -> None:
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(seed=seed), [], V)
        return [sampler(some_logits(i)) for i in range(30)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    logits = some_logits(7)
    logits[3] = bad
    with pytest.raises(QccError, match="not finite"):
        Sampler(SamplingParams(), [], V)(logits)


def test_a_masked_token_is_never_drawn() -> None:
    logits = np.full(V, -np.inf, np.float32)
    logits[5] = 0
    assert Sampler(SamplingParams(seed=0), [], V)(logits) == 5


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"temperature": -0.1}, "temperature -0.1: must be 0 .greedy. or more"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_p": 0}, "for greedy use temperature 0"),
        ({"top_p": 1.1}, "top_p 1.1: must be above 0, at most 1"),
        ({"top_k": -2}, "top_k -2"),
        ({"top_k": 1.5}, "top_k 1.5: must be a whole number"),
        ({"min_p": 2}, "min_p 2: must be 0 to 1"),
        ({"repetition_penalty": 0}, "above 0"),
        ({"presence_penalty": 3}, "presence_penalty 3: must be -2 to 2"),
        ({"max_tokens": -1}, "max_tokens -1"),
        ({"seed": -1}, "seed -1"),
        ({"stop": [""]}, "at least one character"),
        ({"logit_bias": {1: float("inf")}}, "logit_bias of token 1"),
    ],
)
def test_bad_parameters_are_refused_by_name(changes: dict, text: str) -> None:
    with pytest.raises(QccError, match=text):
        SamplingParams(**changes)


def test_parameters_are_frozen_and_normal() -> None:
    params = SamplingParams(stop="END", logit_bias={1: 2})
    assert params.stop == ("END",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        params.logit_bias[1] = 3  # type: ignore[index]
