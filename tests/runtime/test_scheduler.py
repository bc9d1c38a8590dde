"""The scheduler on a model in NumPy whose logits depend on every token before them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from qcc.runtime.engine.llm import TextStream
from qcc.runtime.engine.model import Limits
from qcc.runtime.engine.request import Request, Session
from qcc.runtime.engine.sampling import SamplingParams
from qcc.runtime.engine.scheduler import Scheduler
from qcc.runtime.errors import QccError

V = 258  # bytes, <s>, </s>
BOS, EOS = 256, 257
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_tokenizer() -> Any:
    """One token a byte."""
    vocab = {char: i for i, char in enumerate(ALPHABET)} | {"<s>": BOS, "</s>": EOS}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


TOKENIZER = byte_tokenizer()


class NumpyModel:
    """Logits of a position: random, seeded by all tokens up to it. Refuses what TVM would."""

    def __init__(self, **changes: Any) -> None:
        fields: dict[str, Any] = {
            "vocab_size": V,
            "prefill_chunk_size": 8,
            "max_batch_size": 3,
            "max_length": 64,
            "window": None,
            "page_size": 4,
            "pages": 49,
        }
        self.limits = Limits(**{**fields, **changes})
        self.cache: dict[int, list[int]] = {}
        self.runs: list[tuple[str, list[int]]] = []  # what ran: kind, appended lengths
        self.fail = False

    def add_sequence(self, seq: int) -> None:
        assert seq not in self.cache
        self.cache[seq] = []

    def remove_sequence(self, seq: int) -> None:
        del self.cache[seq]

    def pop(self, seq: int, count: int) -> None:
        assert 0 < count <= len(self.cache[seq])
        assert self.limits.window is None or len(self.cache[seq]) <= self.limits.window
        del self.cache[seq][-count:]

    def prefill(self, seqs: Sequence[int], tokens: Sequence[Any]) -> Any:
        assert sum(map(len, tokens)) <= self.limits.prefill_chunk_size
        return self._run("prefill", seqs, tokens)

    def decode(self, seqs: Sequence[int], tokens: Any) -> Any:
        return self._run("decode", seqs, [[token] for token in tokens])

    def verify(self, seq: int, tokens: Any) -> Any:
        assert len(tokens) <= self.limits.prefill_chunk_size
        return np.concatenate([self._run("verify", [seq], [[token]]) for token in tokens])

    def _run(self, kind: str, seqs: Sequence[int], tokens: Sequence[Any]) -> Any:
        assert len(set(seqs)) == len(seqs) <= self.limits.max_batch_size
        assert len(self.cache) <= self.limits.max_batch_size
        for seq, part in zip(seqs, tokens, strict=True):
            assert len(part), "an empty append"
            self.cache[seq] += map(int, part)
        if self.fail:
            raise RuntimeError("storage allocation failure")
        assert sum(map(self._pages, self.cache.values())) <= self.limits.pages, "out of pages"
        self.runs.append((kind, [len(part) for part in tokens]))
        return np.stack([logits_after(self.cache[seq]) for seq in seqs])

    def _pages(self, tokens: list[int]) -> int:
        kept = min(len(tokens), self.limits.window or len(tokens))
        return -(-kept // self.limits.page_size)


def logits_after(tokens: list[int]) -> Any:
    """f32[V]; letters are the likeliest, so that the answers are text."""
    logits = np.random.default_rng(tokens).standard_normal(V).astype(np.float32)
    letters = [TOKENIZER.token_to_id(char) for char in "abcdefghĠ"]
    logits[letters] += 6
    return logits


def request(prompt: Sequence[int], model: NumpyModel, session: Any = None, **changes: Any) -> Any:
    params = SamplingParams(**{"temperature": 1.0, "seed": 0, "max_tokens": 12, **changes})
    scheduler = Scheduler(model)
    scheduler.check_prompt(prompt)
    room = scheduler.room(len(prompt), params.max_tokens)
    stops = {EOS, *params.stop_token_ids}
    return Request(prompt, params, room, stops, TOKENIZER, V, session)


def run(model: NumpyModel, requests: Sequence[Any]) -> list[Any]:
    scheduler = Scheduler(model)
    for one in requests:
        scheduler.submit(one)
    while scheduler.busy:
        scheduler.step()
    return [one.result() for one in requests]


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[BOS, *map(int, rng.integers(0, 256, rng.integers(1, 30)))] for _ in range(count)]


def test_a_batch_gives_what_each_gives_alone() -> None:
    alone = []
    for i, prompt in enumerate(prompts(9)):
        model = NumpyModel()
        alone += run(model, [request(prompt, model, seed=i, max_tokens=3 + i)])
    model = NumpyModel()
    many = [request(p, model, seed=i, max_tokens=3 + i) for i, p in enumerate(prompts(9))]
    together = run(model, many)
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    assert [r.text for r in together] == [r.text for r in alone]
    assert model.cache == {}
    assert max(len(lengths) for kind, lengths in model.runs if kind == "decode") == 3


def test_greedy_tokens_are_those_of_the_full_logits() -> None:
    model = NumpyModel()
    (result,) = run(model, [request(prompts(1)[0], model, temperature=0)])
    tokens = prompts(1)[0]
    for token in result.token_ids:
        assert token == int(logits_after(tokens).argmax())
        tokens.append(token)


def test_prompts_are_computed_in_chunks_while_others_decode() -> None:
    model = NumpyModel()
    scheduler = Scheduler(model)
    first = request([BOS], model, max_tokens=20)
    scheduler.submit(first)
    scheduler.step()
    late = request(list(range(21)), model)
    scheduler.submit(late)
    said = []
    while not late.token_ids:
        scheduler.step()
        said.append(len(first.token_ids))
    assert said == [3, 4, 5], "the first goes on by one token a chunk of the second"
    assert [r for r in model.runs if r[0] == "prefill"] == [
        ("prefill", [1]),
        ("prefill", [8]),
        ("prefill", [8]),
        ("prefill", [5]),
    ]


def test_short_prompts_share_a_chunk() -> None:
    model = NumpyModel()
    run(model, [request([BOS, i], model) for i in range(3)])
    assert model.runs[0] == ("prefill", [2, 2, 2])


def test_no_more_pages_than_there_are() -> None:
    """Each of these needs 11 to 13 of 25 pages at its longest: two at a time."""
    model = NumpyModel(pages=25)
    results = run(model, [request([BOS] * 20, model, max_tokens=25 + i) for i in range(5)])
    assert [r.completion_tokens for r in results] == [25, 26, 27, 28, 29]
    assert max(len(lengths) for _, lengths in model.runs) == 2


def test_the_context_bounds_the_answer() -> None:
    model = NumpyModel()
    full, tight = [1] * 64, [1] * 60
    results = run(model, [request(p, model, max_tokens=None) for p in (full, tight)])
    assert [(r.completion_tokens, r.finish_reason) for r in results] == [
        (1, "length"),
        (4, "length"),
    ]


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ([1] * 65, "the prompt has 65 tokens, the context window 64"),
        ([], "no tokens"),
        ([1, 258], "token id 258 in the prompt: the model has 0 to 257"),
        ([-1], "token id -1"),
    ],
)
def test_a_prompt_that_cannot_run_is_refused(prompt: list[int], text: str) -> None:
    with pytest.raises(QccError, match=text):
        Scheduler(NumpyModel()).check_prompt(prompt)


def test_stop_tokens_end_and_are_no_text() -> None:
    model = NumpyModel()
    prompt = prompts(1)[0]
    (free,) = run(model, [request(prompt, model)])
    stop = free.token_ids[5]
    (result,) = run(model, [request(prompt, model, stop_token_ids=[stop])])
    at = free.token_ids.index(stop)
    assert result.token_ids == free.token_ids[: at + 1]
    assert result.finish_reason == "stop"
    assert result.text == TOKENIZER.decode(free.token_ids[:at])


def test_a_stop_string_over_tokens_never_leaks() -> None:
    model = NumpyModel()
    prompt = prompts(1)[0]
    (free,) = run(model, [request(prompt, model)])
    stop = free.text[4:7]
    scheduler = Scheduler(model)
    one = request(prompt, model, stop=[stop])
    scheduler.submit(one)
    pieces = list(TextStream(scheduler, one))
    assert "".join(pieces) == free.text[: free.text.index(stop)] == one.result().text
    assert one.result().finish_reason == "stop"
    (shown,) = run(model, [request(prompt, model, stop=[stop], include_stop=True)])
    assert shown.text == free.text[: free.text.index(stop) + 3]


def test_seeds() -> None:
    model = NumpyModel()
    prompt = prompts(1)[0]
    a, b, c = run(model, [request(prompt, model, seed=seed) for seed in (1, 1, 2)])
    assert a.token_ids == b.token_ids != c.token_ids


def test_no_tokens_wanted_runs_nothing() -> None:
    model = NumpyModel()
    (result,) = run(model, [request([BOS], model, max_tokens=0)])
    assert (result.text, result.finish_reason, model.runs) == ("", "length", [])


def test_a_session_computes_only_what_is_new() -> None:
    model = NumpyModel()
    scheduler, session = Scheduler(model), Session()

    def turn(prompt: list[int]) -> Any:
        one = request(prompt, model, session)
        scheduler.submit(one)
        while scheduler.busy:
            scheduler.step()
        return one.result()

    first = turn([BOS, 1, 2, 3])
    assert first.cached_tokens == 0
    longer = [*first.prompt_token_ids, *first.token_ids, 9, 8]
    model.runs.clear()
    second = turn(longer)
    # The answer's last token was sampled, never computed.
    assert second.cached_tokens == len(longer) - 3
    assert model.runs[0] == ("prefill", [3])
    fresh = NumpyModel()
    assert second.token_ids == run(fresh, [request(longer, fresh)])[0].token_ids
    edited = [*longer[:6], 7, 7]
    third = turn(edited)
    assert third.cached_tokens == 6
    assert third.token_ids == run(fresh, [request(edited, fresh)])[0].token_ids
    again = turn(edited)
    assert (again.cached_tokens, again.token_ids) == (len(edited) - 1, third.token_ids)
    other = turn([5, 6])
    assert other.cached_tokens == 0
    assert other.token_ids == run(fresh, [request([5, 6], fresh)])[0].token_ids


def test_idle_sessions_give_way() -> None:
    model = NumpyModel()
    scheduler, sessions = Scheduler(model), [Session() for _ in range(3)]
    for session in sessions:
        scheduler.submit(request([BOS, 1, 2], model, session))
    while scheduler.busy:
        scheduler.step()
    assert len(model.cache) == 3
    scheduler.submit(request([BOS], model))
    while scheduler.busy:
        scheduler.step()
    assert [s.seq is None for s in sessions] == [True, False, False]
    assert len(model.cache) == 2


def test_an_idle_session_gives_way_while_its_next_request_waits() -> None:
    """The request of the session then computes its whole prompt again."""
    model = NumpyModel(max_batch_size=1)
    scheduler, session = Scheduler(model), Session()
    scheduler.submit(request([BOS, 1, 2], model, session))
    while scheduler.busy:
        scheduler.step()
    first, second = request([5, 6], model), request([BOS, 1, 2, 3], model, session)
    scheduler.submit(first)
    scheduler.submit(second)
    while scheduler.busy:
        scheduler.step()
    fresh = NumpyModel()
    for one, prompt in ((first, [5, 6]), (second, [BOS, 1, 2, 3])):
        assert one.result().token_ids == run(fresh, [request(prompt, fresh)])[0].token_ids
        assert one.result().cached_tokens == 0
    assert (list(model.cache), session.busy) == ([session.seq], False)


def test_cancelled_requests_leave_no_trace() -> None:
    model = NumpyModel()
    scheduler = Scheduler(model)
    one, waiting = request([BOS], model), request([BOS] * 9, model)
    stream = TextStream(scheduler, one)
    scheduler.submit(one)
    for _ in stream:
        break
    scheduler.submit(waiting)
    stream.close()
    scheduler.cancel(waiting)
    assert (scheduler.busy, model.cache) == (False, {})
    assert one.result().finish_reason == waiting.result().finish_reason == "cancelled"


def test_a_run_that_fails_takes_its_requests_along_and_no_others() -> None:
    model = NumpyModel()
    scheduler, session = Scheduler(model), Session()
    scheduler.submit(request([BOS, 1], model, session))
    model.fail = True
    with pytest.raises(RuntimeError, match="storage"):
        scheduler.step()
    assert (model.cache, session.seq, session.cached, scheduler.busy) == ({}, None, [], False)
    model.fail = False
    scheduler.submit(request([BOS, 1], model, session))
    while scheduler.busy:
        scheduler.step()
    assert session.cached[:2] == [BOS, 1]


def test_a_sliding_window_has_no_bound_but_wants_one() -> None:
    model = NumpyModel(max_length=None, window=16, pages=19)
    with pytest.raises(QccError, match="--n-predict"):
        Scheduler(model).room(5, None)
    results = run(model, [request([BOS] * 40, model, max_tokens=50) for _ in range(4)])
    assert {r.completion_tokens for r in results} == {50}


def test_a_session_that_slid_begins_anew() -> None:
    model = NumpyModel(max_length=None, window=16, pages=19)
    scheduler, session = Scheduler(model), Session()
    for prompt in ([BOS] * 20, [BOS] * 18 + [1]):
        one = request(prompt, model, session)
        scheduler.submit(one)
        while scheduler.busy:
            scheduler.step()
    assert one.result().cached_tokens == 0


def test_logits_of_every_position_in_chunks() -> None:
    model = NumpyModel()
    tokens = prompts(1, seed=3)[0][:21]
    logits = Scheduler(model).logits(tokens)
    expected = np.stack([logits_after(tokens[: i + 1]) for i in range(len(tokens))])
    np.testing.assert_array_equal(logits, expected)
    assert model.cache == {}
