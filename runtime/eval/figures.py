"""Figures of quality from logits: KL divergence, perplexity, same top-1. All in f64.

Windows come one at a time and only one number a position is kept of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcc.runtime.errors import QccError

Array = npt.NDArray[Any]
Doubles = npt.NDArray[np.float64]
BLOCK = 1 << 21  # logits that are f64 at a time: 16 MiB


class NotFiniteError(QccError):
    """A model's logits are no numbers."""


@dataclass(frozen=True)
class Figures:
    """What the positions of a text say of a model; the KL fields are None without a reference.

    `perplexity` and `reference_perplexity` are over the same positions. `kl` in nats: mean, its
    standard error over positions, median, 99th percentile. `top1`: share of positions whose
    likeliest token is the reference's.
    """

    positions: int
    perplexity: float
    reference_perplexity: float | None = None
    kl: dict[str, float] | None = None
    top1: float | None = None
    histogram: dict[str, list[float]] | None = None  # of log10(KL): edges, counts

    def as_dict(self) -> dict[str, Any]:
        """The figures under the names of `qcc eval --json`."""
        found: dict[str, Any] = {"perplexity": self.perplexity}
        if self.kl is not None:
            found |= {
                "kl_divergence": dict(self.kl),
                "top1": self.top1,
                "reference_perplexity": self.reference_perplexity,
                "histogram": self.histogram,
            }
        return {**found, "positions": self.positions}


class Collector:
    """Takes windows of logits, yields Figures."""

    def __init__(self, what: str) -> None:
        """`what` names the model in errors."""
        self.what = what
        self._ours: list[Doubles] = []
        self._theirs: list[Doubles] = []
        self._kl: list[Doubles] = []
        self._same = 0

    def add(self, ids: Sequence[int], ours: Array, reference: Array | None = None) -> None:
        """Take one window.

        Args:
            ids: its tokens, int[n].
            ours: f32[n, V], row i the logits after token i.
            reference: f32[n, V'] of the original. Where V and V' differ one of them is padded:
                the common width counts.

        Raises:
            NotFiniteError: a logit that is no number.
        """
        targets = np.asarray(ids[1:], np.int64)
        width = ours.shape[1] if reference is None else min(ours.shape[1], reference.shape[1])
        assert targets.max() < width, f"token {targets.max()} beyond {width} logits"
        for rows in _blocks(len(targets), width):
            q = log_softmax(self._finite(ours[rows, :width], self.what))
            wanted = targets[rows, None]
            self._ours.append(-np.take_along_axis(q, wanted, 1)[:, 0])
            if reference is None:
                continue
            p = log_softmax(self._finite(reference[rows, :width], "the reference"))
            self._theirs.append(-np.take_along_axis(p, wanted, 1)[:, 0])
            self._kl.append(kl_divergence(p, q))
            self._same += int((p.argmax(1) == q.argmax(1)).sum())

    @property
    def kl(self) -> Doubles:
        """KL divergence of every position, f64[positions]."""
        return np.concatenate(self._kl)

    def figures(self) -> Figures:
        """The figures of all windows so far."""
        ours = np.concatenate(self._ours)
        if not self._kl:
            return Figures(len(ours), perplexity(ours))
        kl = self.kl
        return Figures(
            len(ours),
            perplexity(ours),
            perplexity(np.concatenate(self._theirs)),
            summary(kl),
            self._same / len(kl),
            histogram(kl),
        )

    @staticmethod
    def _finite(logits: Array, what: str) -> Array:
        if not np.isfinite(logits).all():
            raise NotFiniteError(f"{what}: NaN or infinite logits")
        return logits


def log_softmax(logits: Array) -> Doubles:
    """f32[n, V] -> log probabilities f64[n, V]."""
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    return x


def kl_divergence(p: Doubles, q: Doubles) -> Doubles:
    """KL(p || q) in nats of rows of log probabilities f64[n, V] -> f64[n]."""
    found: Doubles = (np.exp(p) * (p - q)).sum(axis=1)
    return found


def perplexity(losses: Doubles) -> float:
    """exp of the mean negative log likelihood (nats)."""
    return math.exp(min(float(losses.mean()), 700.0))


def summary(kl: Doubles) -> dict[str, float]:
    """Mean, its standard error (positions taken as independent), median, 99th percentile."""
    spread = float(kl.std(ddof=1)) if len(kl) > 1 else 0.0
    return {
        "mean": float(kl.mean()),
        "se": spread / math.sqrt(len(kl)),
        "median": float(np.median(kl)),
        "p99": float(np.quantile(kl, 0.99)),
    }


def histogram(kl: Doubles, bins: int = 40) -> dict[str, list[float]]:
    """Counts of log10(KL) in equal bins from 1e-8 to 1e2; what lies outside is in the end bins."""
    edges = np.linspace(-8, 2, bins + 1)
    logs = np.log10(np.clip(kl, 1e-8, 99.0))
    counts, _ = np.histogram(logs, edges)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def _blocks(n: int, width: int) -> Iterator[slice]:
    """Rows 0..n in blocks of at most BLOCK numbers."""
    step = max(1, BLOCK // width)
    for row in range(0, n, step):
        yield slice(row, min(row + step, n))
