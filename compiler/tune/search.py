"""search: allocations at many sizes, each measured whole, and the best for a target.

Effects do not quite add, so what counts is the divergence with all weights replaced at once. The
uniform schemes of the same formats are measured beside: where one of them is better at no more
bits, it is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qcc.compiler.tune.allocate import allocate
from qcc.compiler.tune.effects import Effect, Model, Progress, Unit, stored_bits
from qcc.quant_schemes.format import WeightFormat
from qcc.quant_schemes.format_text import text_of
from qcc.quant_schemes.packing import Array, Quantized, dequantize_codes
from qcc.runtime.errors import QccError

STEP = 0.25  # bits a weight between the sizes of a curve


@dataclass(frozen=True)
class Point:
    """An allocation: a format's index for each unit, its bits and its measured divergence.

    `label` is "uniform 4/32k" or "tuned"; `predicted` is the sum of the effects.
    """

    label: str
    picks: tuple[int, ...]
    bits: int
    predicted: float
    divergence: float


@dataclass(frozen=True)
class Tuning:
    """All points, fewest bits first; `weights` is how many numbers the units have."""

    units: tuple[Unit, ...]
    formats: tuple[WeightFormat, ...]
    effects: tuple[tuple[Effect, ...], ...]
    points: tuple[Point, ...]
    chosen: Point

    @property
    def weights(self) -> int:
        """Numbers in all units."""
        return sum(unit.shape[0] * unit.shape[1] for unit in self.units)

    def bits_per_weight(self, point: Point) -> float:
        """Stored bits a weight of a point."""
        return point.bits / self.weights

    def frontier(self) -> list[Point]:
        """Points that no other beats at as many bits or fewer."""
        found: list[Point] = []
        for point in self.points:
            if not found or point.divergence < found[-1].divergence:
                found.append(point)
        return found


def least_bits(units: Sequence[Unit], formats: Sequence[WeightFormat], budget: int) -> int:
    """Stored bits of the smallest allocation.

    Raises:
        QccError: they are more than the budget.
    """
    weights = sum(unit.shape[0] * unit.shape[1] for unit in units)
    least = sum(min(stored_bits(fmt, unit.shape) for fmt in formats) for unit in units)
    if budget < least:
        raise QccError(
            f"the target is {budget / weights:.2f} bits a weight; with these formats the least is "
            f"{least / weights:.2f}"
        )
    return least


def tune(
    units: Sequence[Unit],
    formats: Sequence[WeightFormat],
    effects: Sequence[Sequence[Effect]],
    budget: int,
    rounding: Callable[[Array, WeightFormat], Quantized],
    model: Model,
    progress: Progress,
    curve: bool = True,
) -> Tuning:
    """Allocate within `budget` bits and, for the curve, at every STEP bits a weight.

    Args:
        units: the weights.
        formats: candidates, fewest bits first.
        effects: of measure_effects, [unit][format].
        budget: stored bits of all units.
        rounding: chooses codes.
        model: the original.
        progress: is told after each measurement.
        curve: measure the other sizes and the uniform schemes too.

    Raises:
        QccError: the budget is below the smallest allocation.
    """
    choices = [[(effect.bits, effect.divergence) for effect in each] for each in effects]
    weights = sum(unit.shape[0] * unit.shape[1] for unit in units)
    least = least_bits(units, formats, budget)
    most = sum(max(bits for bits, _ in each) for each in choices)
    wanted = {budget}
    if curve:
        at = STEP * -(-least // round(STEP * weights))
        while at * weights < most:
            wanted.add(int(at * weights))
            at += STEP
        wanted |= {least, most}
    plans: dict[tuple[int, ...], str] = {}
    for index, fmt in enumerate(formats):
        picks = (index,) * len(units)
        if curve or sum(stored_bits(fmt, unit.shape) for unit in units) <= budget:
            plans[picks] = f"uniform {text_of(fmt)}"
    for size in sorted(wanted):
        picked = allocate(choices, size)
        if picked is not None:
            plans.setdefault(tuple(picked), "tuned")
    points = []
    for done, (picks, label) in enumerate(plans.items()):
        bits = sum(each[i].bits for each, i in zip(effects, picks, strict=True))
        predicted = sum(each[i].divergence for each, i in zip(effects, picks, strict=True))
        for unit, i in zip(units, picks, strict=True):
            weight = unit.read()
            model.replace(unit.name, dequantize_codes(rounding(weight, formats[i]), formats[i]))
        points.append(Point(label, picks, bits, predicted, model.divergence()))
        progress(done + 1, len(plans))
    for unit in units:
        model.restore(unit.name)
    points.sort(key=lambda point: (point.bits, point.divergence))
    chosen = min(
        (point for point in points if point.bits <= budget), key=lambda point: point.divergence
    )
    return Tuning(tuple(units), tuple(formats), tuple(map(tuple, effects)), tuple(points), chosen)
