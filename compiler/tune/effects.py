"""What each format does to each weight: the KL divergence of the logits with this weight rounded.

The model is known by three callables: replace a weight's numbers, restore them, and measure the KL
divergence from the original on the text. Where measuring every pair would take too long some
formats are probed, and the others follow from the weight's squared error: between two probes the
divergence is taken as a power of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qcc.quant_schemes.format import WeightFormat
from qcc.quant_schemes.packing import Array, Quantized, dequantize_codes

Progress = Callable[[int, int], None]  # measurements done, in all
LEAST = 1e-12  # of a divergence or a squared error: rounding of f32 is above it


class Model(Protocol):
    """The original model, whose weights can be replaced."""

    def replace(self, name: str, weights: Array) -> None:
        """Compute with other numbers f32[n, k] from now on."""

    def restore(self, name: str) -> None:
        """Compute with the original numbers again."""

    def divergence(self) -> float:
        """Mean KL divergence from the original on the text, in nats."""
        ...


@dataclass(frozen=True)
class Unit:
    """A weight that gets a format of its own: `read` gives its numbers f32[n, k]."""

    name: str
    shape: tuple[int, int]
    role: str
    read: Callable[[], Array]


@dataclass(frozen=True)
class Effect:
    """Of one format on one weight: stored bits, relative squared error, divergence in nats.

    `measured` is False where the divergence follows from probes of other formats.
    """

    bits: int
    error: float
    divergence: float
    measured: bool


def measure_effects(
    units: Sequence[Unit],
    formats: Sequence[WeightFormat],
    probed: Sequence[WeightFormat],
    rounding: Callable[[Array, WeightFormat], Quantized],
    model: Model,
    progress: Progress,
) -> list[list[Effect]]:
    """The effect of each format on each unit, [unit][format].

    Args:
        units: the weights.
        formats: candidates, fewest bits first.
        probed: those of them whose divergence is measured, one at least.
        rounding: chooses codes.
        model: the original.
        progress: is told after each measurement.
    """
    total, done, found = len(units) * len(probed), 0, []
    for unit in units:
        weights = unit.read()
        norm = max(float(np.vdot(weights, weights)), LEAST)
        errors, measured = [], {}
        for index, fmt in enumerate(formats):
            made = dequantize_codes(rounding(weights, fmt), fmt)
            off = made - weights
            errors.append(float(np.vdot(off, off)) / norm)
            if fmt in probed:
                model.replace(unit.name, made)
                measured[index] = model.divergence()
                done += 1
                progress(done, total)
        model.restore(unit.name)
        found.append(
            [
                Effect(
                    stored_bits(fmt, unit.shape),
                    errors[i],
                    measured.get(i, _between(errors, measured, i)),
                    i in measured,
                )
                for i, fmt in enumerate(formats)
            ]
        )
    return found


def _between(errors: Sequence[float], measured: dict[int, float], index: int) -> float:
    """The divergence of a format, a power of its squared error through the nearest probes."""
    points = sorted((math.log(max(errors[i], LEAST)), math.log(max(kl, LEAST)))
                    for i, kl in measured.items())  # fmt: skip
    x = math.log(max(errors[index], LEAST))
    if len(points) == 1:
        return math.exp(points[0][1] + x - points[0][0])
    right = next((i for i, p in enumerate(points) if p[0] >= x), len(points) - 1)
    (x0, y0), (x1, y1) = points[max(right - 1, 0)], points[max(right, 1)]
    # Divergence grows at most as the square of the squared error, and with it.
    slope = min(max((y1 - y0) / (x1 - x0), 0.5), 2.0) if x1 > x0 else 1.0
    return math.exp(y0 + slope * (x - x0))


def stored_bits(fmt: WeightFormat, shape: tuple[int, int]) -> int:
    """Bits of a weight [n, k] in a format, scales and padding included."""
    return 8 * sum(part.nbytes for part in fmt.stored(*shape))
