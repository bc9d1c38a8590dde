"""One request on its way: prompt, what was computed of it, the answer and its text."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qcc.runtime.engine.detokenize import Detokenizer
from qcc.runtime.engine.library import Floats, Tokens
from qcc.runtime.engine.sampling import Sampler, SamplingParams
from qcc.runtime.engine.stop import StopStrings


@dataclass(frozen=True)
class Times:
    """Seconds: waiting for a place, from there to the first token, from there to the last."""

    queued: float
    prefill: float
    decode: float


@dataclass(frozen=True)
class GenerationResult:
    """An answer. `finish_reason`: "stop" (end token or stop string), "length", "cancelled".

    `token_ids` are all tokens that were sampled, the end token too; `text` has neither that nor a
    stop string.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_token_ids: list[int]
    cached_tokens: int
    times: Times

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def completion_tokens(self) -> int:
        """Number of tokens of the answer."""
        return len(self.token_ids)

    @property
    def prefill_tokens_per_second(self) -> float:
        """Tokens of the prompt that were computed, a second."""
        computed = self.prompt_tokens - self.cached_tokens
        return computed / self.times.prefill if self.times.prefill > 0 else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first, a second; 0 where there was one only."""
        if len(self.token_ids) < 2:
            return 0.0
        return (len(self.token_ids) - 1) / self.times.decode if self.times.decode > 0 else 0.0


@dataclass
class Session:
    """A sequence that stays in the KV cache between requests, as in a conversation.

    `cached` are the tokens whose keys and values are there. One request at a time.
    """

    seq: int | None = None
    cached: list[int] = field(default_factory=list)
    pages: int = 0
    busy: bool = False


class Request:
    """State of a request; the scheduler moves it on."""

    def __init__(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        max_tokens: int,
        stop_ids: Iterable[int],
        tokenizer: Any,
        vocab_size: int,
        session: Session | None = None,
    ) -> None:
        """`max_tokens` is what params and context allow together; `stop_ids` end the answer."""
        self.prompt = list(prompt)
        self.params = params
        self.max_tokens = max_tokens
        self.stop_ids = frozenset(stop_ids)
        self.session = session
        self.seq = -1
        self.pages = 0
        self.computed = 0  # tokens of the prompt that are in the KV cache
        self.reused = 0  # those of them that were there before
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.pieces: deque[str] = deque()  # text that nobody took yet
        self._text: list[str] = []
        self._sample = Sampler(params, self.prompt, vocab_size)
        self._detokenizer = Detokenizer(tokenizer, self.prompt)
        self._stops = StopStrings(params.stop, params.include_stop)
        self.submitted = time.perf_counter()
        self.started = self.first = self.last = 0.0
        if max_tokens == 0:
            self.finish("length")

    @property
    def prefilled(self) -> bool:
        """Whether the whole prompt is in the KV cache."""
        return self.computed == len(self.prompt)

    def next_part(self, limit: int) -> Tokens:
        """int32[n], n <= limit: tokens of the prompt to compute next."""
        return np.array(self.prompt[self.computed : self.computed + limit], np.int32)

    def accept(self, logits: Floats) -> None:
        """Choose the next token from f32[V], add its text, and finish where the answer ends."""
        token = self._sample(logits)
        self.token_ids.append(token)
        self.last = time.perf_counter()
        self.first = self.first or self.last
        if token in self.stop_ids:
            if self.params.include_stop:
                self._show(self._detokenizer.push(token))
            self.finish("stop")
            return
        self._show(self._detokenizer.push(token))
        if self._stops.matched is not None:
            self.finish("stop")
        elif len(self.token_ids) >= self.max_tokens:
            self.finish("length")

    def finish(self, reason: str) -> None:
        """The answer is over; text that was held back comes out, unless a stop string ended it."""
        self._emit(self._stops.push(self._detokenizer.finish()))
        self._emit(self._stops.finish())
        stopped = self._stops.matched is not None and reason == "length"
        self.finish_reason = "stop" if stopped else reason

    def _show(self, text: str) -> None:
        self._emit(self._stops.push(text))

    def _emit(self, text: str) -> None:
        if text:
            self.pieces.append(text)
            self._text.append(text)

    def result(self) -> GenerationResult:
        """The answer so far."""
        started = self.started or self.submitted
        first = self.first or started
        return GenerationResult(
            text="".join(self._text),
            token_ids=list(self.token_ids),
            finish_reason=self.finish_reason or "cancelled",
            prompt_token_ids=list(self.prompt),
            cached_tokens=self.reused,
            times=Times(started - self.submitted, first - started, max(self.last - first, 0.0)),
        )
