"""What low precision costs: KL(high || low) of one artifact, for each way to run it.

High precision, float32 activations and an f32 KV cache, is the reference, so that the weights' own
error is not in it; what the weights cost stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qcc.runtime.eval.figures import Figures

# What many rows, or few, are multiplied as. Floating weights take float32 activations for few rows.
FLOAT, INT8, TILES = "float32", "int8", "bf16 tiles"
PREFILL, DECODE = "prefill", "decode"
HEAD = ("run", "activations", "KV cache", "KL mean", "se", "p99", "top-1", "of the weights'")
WORDS = 3  # columns that are no numbers


@dataclass(frozen=True)
class Way:
    """`run`: prefill (chunks, as the runtime makes them) or decode (token by token)."""

    run: str
    activations: str
    kv: str


@dataclass(frozen=True)
class WayFigures:
    """KL(high || way); `share` of what the weights cost, None where that is unknown."""

    way: Way
    figures: Figures
    share: float | None = None

    def __post_init__(self) -> None:
        """Figures have a reference here."""
        assert self.figures.kl is not None and self.figures.top1 is not None, self.way

    @property
    def kl(self) -> dict[str, float]:
        """Mean, standard error, median and 99th percentile, in nats."""
        assert self.figures.kl is not None
        return self.figures.kl

    def cells(self) -> list[str]:
        """The texts of a row under HEAD."""
        mean, se, p99, top1, share = self.values()
        whole = "-" if self.share is None else f"{share:.2%}"
        words = [self.way.run, self.way.activations, self.way.kv]
        return [*words, f"{mean:.3g}", f"{se:.3g}", f"{p99:.3g}", f"{top1:.2%}", whole]

    def values(self) -> list[float]:
        """The numbers of a row, behind its first WORDS texts."""
        kl, top1 = self.kl, self.figures.top1
        return [kl["mean"], kl["se"], kl["p99"], top1 or 0.0, self.share or 0.0]


@dataclass(frozen=True)
class ActivationFigures:
    """All ways, and `weights`: KL(original || high), None without the original."""

    ways: tuple[WayFigures, ...]
    weights: Figures | None = None

    @classmethod
    def of(cls, ways: Mapping[Way, Figures], weights: Figures | None) -> ActivationFigures:
        """Put the shares to the figures.

        Where bf16 tiles gave the very numbers of int8 the library has none: that row says nothing.
        """
        cost = weights.kl["mean"] if weights is not None and weights.kl is not None else 0.0
        return cls(
            tuple(
                WayFigures(way, found, _mean(found) / cost if cost else None)
                for way, found in ways.items()
                if way.activations != TILES or found != ways[Way(way.run, INT8, way.kv)]
            ),
            weights,
        )

    def as_dict(self) -> dict[str, Any]:
        """The object of `qcc eval --json`."""
        found: dict[str, Any] = {
            "ways": [
                {
                    "run": item.way.run,
                    "activations": item.way.activations,
                    "kv": item.way.kv,
                    "kl_divergence": item.kl,
                    "top1": item.figures.top1,
                    "share": item.share,
                }
                for item in self.ways
            ]
        }
        if self.weights is not None:
            found["weights"] = {"kl_divergence": self.weights.kl, "top1": self.weights.top1}
        return found

    def rows(self) -> list[WayFigures]:
        """The rows of a table: the ways, and as the last one what the weights cost."""
        if self.weights is None:
            return list(self.ways)
        return [*self.ways, WayFigures(Way("weights", FLOAT, "f32"), self.weights)]

    def notes(self) -> Iterator[str]:
        """What the rows are."""
        yield "KL(high || way) in nats; high: float32 activations, f32 KV cache, the same weights"
        if self.weights is not None:
            yield "weights: KL(original || high), which the last column is a share of"


def _mean(figures: Figures) -> float:
    assert figures.kl is not None
    return figures.kl["mean"]
