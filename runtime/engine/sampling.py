"""How a token is chosen from one row of logits. NumPy; knows no model and no batch.

Order: presence and frequency penalties, repetition penalty, logit bias, temperature, top-k, top-p,
min-p, one draw. Every request has a generator of its own, and each token takes one number from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from qcc.runtime.errors import QccError

Floats = npt.NDArray[np.float32]
BLOCK = 1024  # numbers that are summed one by one


@dataclass(frozen=True)
class SamplingParams:
    """What a user asks of an answer; checked once, here.

    max_tokens: None is as many as the context allows. top_k: 0 or -1 is off. Repetition penalty
    (Hugging Face): logits of tokens in prompt or answer are divided by it if positive, else
    multiplied. Presence and frequency penalty (OpenAI): subtracted from the logits of tokens in the
    answer, once and for each occurrence. logit_bias: token id -> added to its logit. seed: None is
    a new one each time. stop: strings that end the answer, of which they are no part unless
    `include_stop`. ignore_eos: the model's own end tokens end nothing; stop_token_ids still do.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: str | Iterable[str] = ()
    stop_token_ids: Iterable[int] = ()
    include_stop: bool = False
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            QccError: a value outside of what is allowed.
        """
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", MappingProxyType(dict(self.logit_bias)))
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 0)
        _whole("top_k", self.top_k, -1)
        if self.seed is not None:
            _whole("seed", self.seed, 0)
        _number("temperature", self.temperature, 0, math.inf, "0 (greedy) or more")
        _number("top_p", self.top_p, 0, 1, "above 0, at most 1")
        if self.top_p == 0:
            raise QccError("top_p 0: must be above 0, at most 1; for greedy use temperature 0")
        _number("min_p", self.min_p, 0, 1, "0 to 1")
        _number("repetition_penalty", self.repetition_penalty, 0, math.inf, "above 0")
        if self.repetition_penalty == 0:
            raise QccError("repetition_penalty 0: must be above 0 (1 is off)")
        _number("presence_penalty", self.presence_penalty, -2, 2, "-2 to 2")
        _number("frequency_penalty", self.frequency_penalty, -2, 2, "-2 to 2")
        for token, bias in self.logit_bias.items():
            _whole("logit_bias: token", token, 0)
            if not _is_number(bias) or math.isnan(bias) or bias == math.inf:
                raise QccError(f"logit_bias of token {token}: {bias!r} is no number below infinity")
        for token in self.stop_token_ids:
            _whole("stop_token_ids: token", token, 0)
        for text in stop:
            if not isinstance(text, str) or not text:
                raise QccError(f"stop {text!r}: must be a string of at least one character")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise QccError(f"{name} {value!r}: must be a whole number of {least} or more")


def _number(name: str, value: Any, low: float, high: float, allowed: str) -> None:
    if not _is_number(value) or not math.isfinite(value) or not low <= value <= high:
        raise QccError(f"{name} {value!r}: must be {allowed}")


class Sampler:
    """Chooses the tokens of one request."""

    def __init__(self, params: SamplingParams, prompt: Iterable[int], vocab_size: int) -> None:
        """`prompt` counts as seen for the repetition penalty only.

        Raises:
            QccError: a biased token that the model does not have.
        """
        self.params = params
        self.rng = np.random.default_rng(params.seed)
        self.counts = np.zeros(vocab_size, np.int32)  # of the answer's tokens
        self.seen = np.zeros(vocab_size, np.bool_)
        for token in prompt:
            self.seen[token] = True
        for token in params.logit_bias:
            if token >= vocab_size:
                raise QccError(
                    f"logit_bias: token {token} is not below the vocabulary {vocab_size}"
                )
        self.bias_ids = np.array([*params.logit_bias], np.int64)
        self.bias = np.array([*params.logit_bias.values()], np.float32)

    def __call__(self, logits: Floats) -> int:
        """The next token from f32[V], which stays as it is.

        Raises:
            QccError: NaN or infinite logits, which only damaged weights or a bug produce.
        """
        p = self.params
        if not np.isfinite(logits.max()):
            raise QccError(
                "the model computed logits that are not finite; the weights or the library are "
                "damaged: compile the model again with qcc compile --force"
            )
        logits = self._penalized(logits)
        token = int(logits.argmax()) if p.temperature == 0 else self._draw(logits)
        self.counts[token] += 1
        self.seen[token] = True
        return token

    def _penalized(self, logits: Floats) -> Floats:
        p = self.params
        if p.presence_penalty or p.frequency_penalty:
            said = np.flatnonzero(self.counts)
            logits = logits.copy()
            logits[said] -= p.presence_penalty + p.frequency_penalty * self.counts[said]
        if p.repetition_penalty != 1:
            seen = np.flatnonzero(self.seen)
            old = logits[seen]
            logits = logits.copy()
            logits[seen] = np.where(old < 0, old * p.repetition_penalty, old / p.repetition_penalty)
        if self.bias_ids.size:
            logits = logits.copy()
            logits[self.bias_ids] += self.bias
        return logits

    def _draw(self, logits: Floats) -> int:
        p = self.params
        ids, probs = candidates(logits, p.temperature, p.top_k, p.top_p, p.min_p)
        return int(ids[pick(probs, self.rng.random())])


def candidates(
    logits: Floats, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[npt.NDArray[np.intp], Floats]:
    """(token ids, their probabilities up to a common factor), both [c], c >= 1.

    As Hugging Face's warpers in their order: what ties with the k-th stays; top-p keeps the fewest
    of the likeliest that together reach p; min-p keeps what has at least that share of the best.
    """
    ids: npt.NDArray[np.intp] = np.arange(len(logits))
    if 0 < top_k < len(logits):
        ids = np.flatnonzero(logits >= np.partition(logits, -top_k)[-top_k])
        logits = logits[ids]
    # A tiny temperature makes -inf of all but the best, which is right.
    with np.errstate(over="ignore"):
        scaled = (logits - logits.max()) / np.float32(max(temperature, 1e-30))
    probs = np.exp(scaled)
    if top_p < 1:
        order = _nucleus(probs, top_p)
        ids, probs = ids[order], probs[order]
    if min_p > 0:
        keep = probs >= min_p * probs.max()
        ids, probs = ids[keep], probs[keep]
    return ids, probs


def _nucleus(probs: Floats, top_p: float) -> npt.NDArray[np.intp]:
    """Indices of the fewest likeliest whose sum reaches top_p of the whole; of equals the first.

    Sorting values is an order faster than sorting indices, and vocabularies are large.
    """
    values = np.sort(probs)[::-1]
    whole = top_p * float(probs.sum(dtype=np.float64))
    for size in (BLOCK, 32 * BLOCK, len(values)):
        sums = values[:size].cumsum(dtype=np.float64)
        if sums[-1] >= whole:
            break
    count = min(int(np.searchsorted(sums, whole, side="left")), len(probs) - 1) + 1
    least = values[count - 1]
    above = np.flatnonzero(probs > least)
    equal = np.flatnonzero(probs == least)[: count - len(above)]
    return np.sort(np.concatenate([above, equal]))


def pick(probs: Floats, uniform: float) -> int:
    """The index at which the running sum of f32[c] exceeds `uniform` (0 to 1) times the whole.

    Sums of blocks first: a running sum of all would take longer than all the rest.
    """
    starts = np.arange(0, len(probs), BLOCK)
    ends = np.add.reduceat(probs, starts, dtype=np.float64).cumsum()
    goal = uniform * float(ends[-1])
    # Rounding may make the goal the whole: then the last block that is not zero.
    block = int(min(np.searchsorted(ends, goal, side="right"), np.searchsorted(ends, ends[-1])))
    part = probs[starts[block] : starts[block] + BLOCK]
    left = goal - (float(ends[block - 1]) if block else 0.0)
    at = int(np.searchsorted(part.cumsum(dtype=np.float64), left, side="right"))
    # Rounding may lead past the block's end, to where nothing is likely.
    return int(starts[block]) + min(at, int(np.flatnonzero(part)[-1]))
