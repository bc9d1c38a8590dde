"""Several requests in one batch. Knows tokens, pages and sequences; neither text nor TVM.

A step admits waiting requests, computes one chunk of prompts, then one token of every request whose
prompt is computed: so those that decode never wait longer than a chunk. A request is admitted only
when the pages of its longest possible answer are free: it is never pushed out again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from qcc.runtime.engine.library import Floats, Tokens
from qcc.runtime.engine.model import Model
from qcc.runtime.engine.request import Request, Session
from qcc.runtime.errors import QccError

_Forward = Callable[[Sequence[int]], Floats]


class Scheduler:
    """Runs requests on a model."""

    def __init__(self, model: Model) -> None:
        """Start with an empty batch."""
        self.model = model
        self.limits = model.limits
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._idle: list[Session] = []  # sessions with a sequence in the cache and no request
        self._next_seq = 0

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """Refuse a prompt that cannot run.

        Raises:
            QccError: empty, longer than the context, or with a token that the model lacks.
        """
        limits = self.limits
        if not len(prompt):
            raise QccError("the prompt has no tokens; give a text, or the id of a first token")
        if limits.max_length is not None and len(prompt) > limits.max_length:
            raise QccError(
                f"the prompt has {len(prompt)} tokens, the context window {limits.max_length}; "
                "shorten it, or use a larger --context-window (here, and of qcc compile)"
            )
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= limits.vocab_size:
            bad = low if low < 0 else high
            raise QccError(
                f"token id {bad} in the prompt: the model has 0 to {limits.vocab_size - 1}"
            )

    def room(self, prompt: int, max_tokens: int | None) -> int:
        """Tokens that an answer to `prompt` tokens may have; a full context leaves one.

        Raises:
            QccError: neither the context nor the request bounds the answer.
        """
        if self.limits.max_length is None:
            if max_tokens is None:
                raise QccError(
                    "with a sliding window an answer has no bound of its own; give max_tokens "
                    "(--n-predict)"
                )
            return max_tokens
        left = max(1, self.limits.max_length - prompt)
        return left if max_tokens is None else min(left, max_tokens)

    def submit(self, request: Request) -> None:
        """Queue a request whose prompt was checked."""
        if request.session:
            assert not request.session.busy, "a session takes one request at a time"
            request.session.busy = True
        if request.finish_reason is None:
            self.waiting.append(request)
        elif request.session:
            request.session.busy = False

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self.waiting or self.running)

    def step(self) -> None:
        """Move every admitted request on by at most one chunk and one token.

        Raises:
            QccError: logits that are not finite. The requests of that run are cancelled.
        """
        self._admit()
        part = self._next_prefill()
        if part:
            self._run_prefill(part)
        ready = [r for r in self.running if r.prefilled and r.token_ids]
        if ready:
            tokens = np.array([r.token_ids[-1] for r in ready], np.int32)
            self._run(ready, [1] * len(ready), lambda seqs: self.model.decode(seqs, tokens), ready)

    def cancel(self, request: Request) -> None:
        """Take a request out; its answer so far stands."""
        if request in self.waiting:
            self.waiting.remove(request)
            request.finish("cancelled")
            if request.session:
                request.session.busy = False
        elif request in self.running:
            request.finish("cancelled")
            self._retire(request)

    def forget(self, session: Session) -> None:
        """Free what an idle session holds in the cache."""
        assert not session.busy, "the session's request must end first"
        self._drop(session)

    def _drop(self, session: Session) -> None:
        """Free a sequence that no running request uses; the session's next one may be waiting."""
        if session in self._idle:
            self._idle.remove(session)
        if session.seq is not None:
            self.model.remove_sequence(session.seq)
        session.seq, session.cached, session.pages = None, [], 0

    def clear(self) -> None:
        """Cancel all requests and forget all sessions."""
        for request in [*self.waiting, *self.running]:
            self.cancel(request)
        for session in list(self._idle):
            self.forget(session)

    def logits(self, tokens: Sequence[int]) -> Floats:
        """f32[n, V] of every position of int[n], on a sequence of its own.

        Raises:
            QccError: as check_prompt; or requests are running, which could need the pages.
        """
        self.check_prompt(tokens)
        if self.busy:
            raise QccError("logits: wait until the running requests have ended, or call reset()")
        for session in list(self._idle):
            self.forget(session)
        ids = np.asarray(tokens, np.int32)
        seq = self._new_sequence()
        try:
            parts = [
                self.model.verify(seq, ids[at : at + self.limits.prefill_chunk_size]).copy()
                for at in range(0, len(ids), self.limits.prefill_chunk_size)
            ]
        finally:
            self.model.remove_sequence(seq)
        return np.concatenate(parts)

    # The steps of a step.

    def _admit(self) -> None:
        """Give waiting requests a place, first come first served."""
        while self.waiting and len(self.running) < self.limits.max_batch_size:
            request = self.waiting[0]
            length = None
            if self.limits.max_length is not None:
                # The last token of an answer is never appended.
                length = len(request.prompt) + request.max_tokens - 1
            elif self.limits.window is not None:
                length = min(len(request.prompt) + request.max_tokens, self.limits.window)
            pages = self.limits.pages_of(length)
            if not self._make_room(request, pages):
                if not self.running:
                    raise QccError(
                        f"the request needs {pages} pages of KV cache, there are "
                        f"{self.limits.pages}; lower max_tokens (--n-predict)"
                    )
                return
            self.waiting.popleft()
            self._place(request, pages)

    def _make_room(self, request: Request, pages: int) -> bool:
        """Whether `pages` and a place are free; idle sessions give way, the oldest first."""
        own = request.session
        others = [session for session in self._idle if session is not own]
        while True:
            held = sum(r.pages for r in self.running) + sum(s.pages for s in others)
            places = len(self.running) + len(others)
            if held + pages <= self.limits.pages and places < self.limits.max_batch_size:
                return True
            if not others:
                return False
            self._drop(others.pop(0))

    def _place(self, request: Request, pages: int) -> None:
        session = request.session
        if session and session in self._idle:
            self._idle.remove(session)
        if session and session.seq is not None:
            request.computed = request.reused = self._reuse(session, request.prompt)
            request.seq = session.seq if session.seq is not None else self._new_sequence()
            session.cached = request.prompt[: request.computed]
        else:
            request.seq = self._new_sequence()
        if session:
            session.seq = request.seq
        request.pages = pages
        request.started = time.perf_counter()
        self.running.append(request)

    def _reuse(self, session: Session, prompt: list[int]) -> int:
        """Cut a session's sequence to what it shares with a prompt; returns that length.

        The prompt's last token is always computed: its logits are wanted. A sequence that slid has
        lost its beginning and cannot be cut, nor can one with states: it begins anew.
        """
        shared = 0
        for old, new in zip(session.cached, prompt[:-1], strict=False):
            if old != new:
                break
            shared += 1
        assert session.seq is not None, "only a session with a sequence is cut"
        surplus = len(session.cached) - shared
        slid = self.limits.window is not None and len(session.cached) > self.limits.window
        if shared == 0 or (surplus and (slid or not self.limits.forgets)):
            self.model.remove_sequence(session.seq)
            session.seq = None
            return 0
        if surplus:
            self.model.pop(session.seq, surplus)
        return shared

    def _next_prefill(self) -> list[tuple[Request, Tokens]]:
        """Parts of prompts, together at most one chunk, the oldest requests first."""
        left = self.limits.prefill_chunk_size
        parts = []
        for request in self.running:
            if not request.prefilled and left > 0:
                tokens = request.next_part(left)
                left -= len(tokens)
                parts.append((request, tokens))
        return parts

    def _run_prefill(self, parts: list[tuple[Request, Tokens]]) -> None:
        requests = [request for request, _ in parts]
        tokens = [part for _, part in parts]
        lengths = [len(part) for part in tokens]
        last = [
            request
            for request, part in parts
            if request.computed + len(part) == len(request.prompt)
        ]
        self._run(requests, lengths, lambda seqs: self.model.prefill(seqs, tokens), last)

    def _run(
        self,
        requests: list[Request],
        lengths: list[int],
        forward: _Forward,
        sampled: Iterable[Request],
    ) -> None:
        """One forward pass, then a token for each request in `sampled`.

        If the pass does not end, its sequences are in no known state: their requests are cancelled.
        """
        assert sum(lengths) <= self.limits.prefill_chunk_size or max(lengths) == 1, "chunk exceeded"
        assert len(requests) <= self.limits.max_batch_size, "batch exceeded"
        fed = [_fed(request, size) for request, size in zip(requests, lengths, strict=True)]
        wanted = set(map(id, sampled))
        try:
            logits = forward([request.seq for request in requests])
        except BaseException:
            for request in requests:
                request.finish("cancelled")
                self._retire(request, broken=True)
            raise
        for request, tokens in zip(requests, fed, strict=True):
            if not request.prefilled:
                request.computed += len(tokens)
            if request.session:
                request.session.cached += tokens
        try:
            for request, row in zip(requests, logits, strict=True):
                if id(request) in wanted:
                    request.accept(row)
        except QccError:
            for request in requests:
                if request.finish_reason is None:
                    request.finish("cancelled")
            raise
        finally:
            for request in requests:
                if request.finish_reason is not None:
                    self._retire(request)

    def _retire(self, request: Request, broken: bool = False) -> None:
        """Take a request out of the batch; its sequence goes, unless a session keeps it."""
        self.running.remove(request)
        session = request.session
        if session is None:
            self.model.remove_sequence(request.seq)
            return
        session.busy = False
        # What the cache holds now, not what the answer might have come to.
        session.pages = self.limits.pages_of(len(session.cached))
        if broken:
            self.forget(session)
        else:
            self._idle.append(session)

    def _new_sequence(self) -> int:
        seq = self._next_seq
        self.model.add_sequence(seq)
        self._next_seq += 1
        return seq


def _fed(request: Request, size: int) -> list[int]:
    """The tokens that the next pass appends to a request's sequence."""
    if request.prefilled:
        return [request.token_ids[-1]]
    return request.prompt[request.computed : request.computed + size]
