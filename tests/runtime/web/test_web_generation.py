"""Whole answers and their place in the cache: as the Python scheduler gives them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcc.runtime.engine.llm import TextStream
from qcc.runtime.engine.model import Limits
from qcc.runtime.engine.request import Request, Session
from qcc.runtime.engine.sampling import SamplingParams
from qcc.runtime.engine.scheduler import Scheduler
from qcc.runtime.engine.tokenizer import Tokenizer

Ask = Callable[[str, Any], Any]
V = 1024
END = 7


def logits_after(held: Sequence[int]) -> Any:
    """float32[V] in whole numbers: what driver.ts computes too."""
    state = 12345
    for token in held:
        state = (state * 1103515245 + token + 12345) % 2**32
    rows = (np.arange(1, V + 1, dtype=np.uint64) * 2654435761) % 2**32
    mixed = ((np.uint64(state) ^ rows) * np.uint64(2246822519)) % 2**32
    return ((mixed.astype(np.uint32) >> 20) / 256).astype(np.float32)


class StandIn:
    """One sequence, whose tokens are its state."""

    def __init__(self, **limits: Any) -> None:
        fields = {"max_length": None, "window": None, **limits}
        self.limits = Limits(V, fields.pop("chunk"), 1, page_size=4, pages=500, **fields)
        self.held: list[int] = []

    def add_sequence(self, seq: int) -> None:
        self.held = []

    def remove_sequence(self, seq: int) -> None:
        self.held = []

    def pop(self, seq: int, count: int) -> None:
        del self.held[-count:]

    def prefill(self, seqs: Sequence[int], tokens: Sequence[Any]) -> Any:
        self.held += map(int, tokens[0])
        return logits_after(self.held)[None]

    def decode(self, seqs: Sequence[int], tokens: Any) -> Any:
        return self.prefill(seqs, [tokens])

    def verify(self, seq: int, tokens: Any) -> Any:
        raise NotImplementedError


def python_answers(folder: Path, limits: Any, requests: list[dict[str, Any]]) -> list[Any]:
    """What the Python runtime makes of the requests, in one session."""
    backend = Tokenizer(folder, {}).backend
    scheduler = Scheduler(StandIn(**limits))
    session, answers = Session(), []
    for asked in requests:
        params = SamplingParams(**asked["params"])
        room = scheduler.room(len(asked["prompt"]), params.max_tokens)
        request = Request(asked["prompt"], params, room, asked["stop_ids"], backend, V, session)
        scheduler.submit(request)
        pieces = []
        stream = TextStream(scheduler, request)
        for piece in stream:
            pieces.append(piece)
            if len(pieces) == asked["leave"]:
                break
        stream.close()
        result = stream.result
        computed = len(asked["prompt"]) - result.cached_tokens
        answers.append((result.text, result.token_ids, result.finish_reason, computed))
    return answers


@pytest.mark.parametrize(
    "limits", [{"chunk": 8, "max_length": 90}, {"chunk": 16, "window": 24}], ids=["full", "sliding"]
)
def test_answers(ask: Ask, bundled: Path, limits: dict[str, int]) -> None:
    """Prompts that share beginnings, stop texts, end tokens, limits, answers left early."""
    rng = random.Random(1)
    base = [rng.randrange(8, V) for _ in range(40)]
    requests: list[dict[str, Any]] = []
    for index in range(40):
        prompt = base[: rng.randrange(1, 40)] + [rng.randrange(8, V) for _ in range(index % 5)]
        params: dict[str, Any] = {"temperature": index % 2, "seed": index}
        params["max_tokens"] = rng.choice([0, 1, 12, 25])
        params["logit_bias"] = {END: 14.0} if index % 3 == 0 else {}
        params["stop"] = ["a", "the"] if index % 4 == 1 else []
        params["include_stop"] = index % 8 == 1
        leave = 3 if index % 6 == 5 else 0
        requests.append({"prompt": prompt, "params": params, "stop_ids": [END], "leave": leave})
    web = {{"max_length": "maxLength"}.get(name, name): size for name, size in limits.items()}
    argument = {"folder": str(bundled), "limits": {"vocabulary": V, **web}, "requests": requests}
    found = ask("conversation", argument)
    wanted = python_answers(bundled, limits, requests)
    for index, (given, mine) in enumerate(zip(found, wanted, strict=True)):
        text, tokens, reason, computed = mine
        where = f"request {index}"
        if not requests[index]["leave"]:
            assert given["text"] == text, where
            assert given["tokenIds"] == tokens, where
            assert given["finishReason"] == reason, where
        assert "".join(given["pieces"]) == given["text"], where
        assert len(requests[index]["prompt"]) - given["cachedTokens"] == computed, where
