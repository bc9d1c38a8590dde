"""Runs an artifact in high and in low precision, through prefill and token by token. Not a verb."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qcc.compiler.steps import Steps
from qcc.runtime.engine.settings import default_kv
from qcc.runtime.eval.activations import (
    DECODE,
    FLOAT,
    INT8,
    PREFILL,
    TILES,
    ActivationFigures,
    Way,
)
from qcc.runtime.eval.figures import Collector
from qcc.runtime.machine import enable_tiles

if TYPE_CHECKING:
    from qcc.runtime.engine.llm import LLM

Floats = npt.NDArray[np.float32]


class Activations:
    """Measures one artifact's ways to run, window by window; its weights are in memory once."""

    def __init__(self, llm: LLM, kinds: Sequence[str], tokens: int, steps: Steps) -> None:
        """`kinds` of KV caches (none: the default one); `tokens` of all windows, for progress."""
        known = llm.model.library.metadata.kv_names
        usual = default_kv("low")
        self.llm, self.steps = llm, steps
        ways = ways_of(kinds or ([usual] if usual in known else known[:1]))
        name = str(llm.artifact.folder)
        self._ways = {way: Collector(f"{name}, {way.run}, {way.activations}") for way in ways}
        self._weights = Collector(f"{name}, high precision")
        self._compared = False
        self._done, self._total = 0, tokens * sum(way.run == DECODE for way in ways)

    def add(self, ids: Sequence[int], reference: Floats | None) -> None:
        """Run one window in every way; `reference`: the original's logits f32[n, V].

        The model is left in another precision and with another cache than it was.
        """
        self.llm.model.switch("high")
        high = self.llm.logits(ids)
        if reference is not None:
            self._weights.add(ids, high, reference)
            self._compared = True
        for way, collector in self._ways.items():
            precision = "high" if way.activations == FLOAT else "low"
            self.llm.model.switch(precision, way.kv, tiles=way.activations != INT8)
            logits = self._decoded(ids) if way.run == DECODE else self.llm.logits(ids)
            collector.add(ids, logits, high)

    def figures(self) -> ActivationFigures:
        """Of all windows so far."""
        ways = {way: collector.figures() for way, collector in self._ways.items()}
        return ActivationFigures.of(ways, self._weights.figures() if self._compared else None)

    def _decoded(self, ids: Sequence[int]) -> Floats:
        """f32[n, V], each token by a step of its own."""
        model, what = self.llm.model, f"Decode {self.llm.artifact.folder.name}"
        rows = []
        model.add_sequence(0)
        for token in ids:
            rows.append(model.decode([0], np.array([token], np.int32)).copy())
            self._done += 1
            self.steps.count(what, self._done, self._total, "tokens")
        model.remove_sequence(0)
        return np.concatenate(rows)


def ways_of(kinds: Sequence[str]) -> list[Way]:
    """What is measured on this machine for each kind of KV cache, what the cache alone costs last.

    Prefill as a processor without tile registers runs it is measured wherever it can be.
    """
    found = []
    for kv in kinds:
        found += [Way(PREFILL, TILES, kv)] if enable_tiles() else []
        found += [Way(PREFILL, INT8, kv), Way(DECODE, INT8, kv)]
    return found + [Way(PREFILL, FLOAT, kv) for kv in kinds if kv != "f32"]
