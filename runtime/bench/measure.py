"""Times of the cases on a model: tokens in, greedy tokens out. No text, no tables."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from qcc.runtime.bench.cases import Case
from qcc.runtime.engine.library import Tokens
from qcc.runtime.engine.model import Model


@dataclass(frozen=True)
class Timing:
    """A case and the seconds of each of its runs, the warm-up left out."""

    case: Case
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds of a run."""
        return statistics.median(self.seconds)

    @property
    def step_seconds(self) -> float:
        """Of one decode step, median."""
        return self.median / self.case.tokens

    @property
    def rate(self) -> float:
        """tok/s, of all sequences together."""
        return self.case.tokens * self.case.batch / self.median

    @property
    def spread(self) -> float:
        """Half the distance from the slowest run to the fastest, as a share of the median."""
        return (max(self.seconds) - min(self.seconds)) / 2 / self.median


class Contexts:
    """Sequences of random tokens, kept from case to case: cut or grown to the depth wanted."""

    def __init__(self, model: Model, seed: int = 0) -> None:
        """Begin with none."""
        self.model = model
        self._random = np.random.default_rng(seed)
        self._lengths: list[int] = []  # of sequence i

    def tokens(self, count: int) -> Tokens:
        """int32[count] random token ids; the first ones of a vocabulary are special."""
        low = min(3, self.model.limits.vocab_size - 1)
        return self._random.integers(low, self.model.limits.vocab_size, count).astype(np.int32)

    def hold(self, count: int, depth: int) -> list[int]:
        """The ids of `count` sequences of exactly `depth` tokens."""
        for seq in range(count):
            if seq == len(self._lengths):
                self.model.add_sequence(seq)
                self._lengths.append(0)
            self._cut(seq, depth)
            if self._lengths[seq] < depth:
                self.append(seq, self.tokens(depth - self._lengths[seq]))
        return list(range(count))

    def append(self, seq: int, tokens: Tokens) -> None:
        """Prefill int32[n], chunk by chunk."""
        chunk = self.model.limits.prefill_chunk_size
        for at in range(0, len(tokens), chunk):
            self.model.prefill([seq], [tokens[at : at + chunk]])
        self._lengths[seq] += len(tokens)

    def step(self, seqs: Sequence[int], tokens: Tokens) -> Tokens:
        """One token of each sequence -> the likeliest next ones, int32[b]."""
        logits = self.model.decode(seqs, tokens)
        for seq in seqs:
            self._lengths[seq] += 1
        chosen: Tokens = np.argmax(logits, axis=-1).astype(np.int32)
        return chosen

    def close(self) -> None:
        """Forget all sequences."""
        for seq in range(len(self._lengths)):
            self.model.remove_sequence(seq)
        self._lengths = []

    def _cut(self, seq: int, depth: int) -> None:
        """Forget what is beyond `depth`; all of it, where a model cannot forget a part."""
        limits, surplus = self.model.limits, self._lengths[seq] - depth
        if surplus <= 0:
            return
        slid = limits.window is not None and self._lengths[seq] > limits.window
        if limits.forgets and not slid and depth:
            self.model.pop(seq, surplus)
            self._lengths[seq] = depth
        else:
            self.model.remove_sequence(seq)
            self.model.add_sequence(seq)
            self._lengths[seq] = 0


def measure(
    contexts: Contexts, case: Case, repeats: int, ran: Callable[[], None] = lambda: None
) -> Timing:
    """Time `repeats` runs after one that warms up; `ran` is called after each of them."""
    seconds = []
    for _ in range(repeats + 1):
        seconds.append(run_case(contexts, case))
        ran()
    return Timing(case, tuple(seconds[1:]))


def run_case(contexts: Contexts, case: Case) -> float:
    """Seconds of one run, its contexts made ready before the clock starts."""
    seqs = contexts.hold(case.batch, case.depth)
    tokens = contexts.tokens(case.tokens if case.kind == "prefill" else case.batch)
    start = time.perf_counter()
    if case.kind == "prefill":
        contexts.append(seqs[0], tokens)
    else:
        for _ in range(case.tokens):
            tokens = contexts.step(seqs, tokens)
    return time.perf_counter() - start
