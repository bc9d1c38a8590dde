"""What each weight of an artifact is off by, and what that alone does to the logits. Not a verb."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from qcc.compiler.cli._divergence import Divergence
from qcc.compiler.cli._swap import SwappableModel
from qcc.compiler.steps import Steps
from qcc.compiler.stored_weights import StoredWeights
from qcc.compiler.weights.spec import WeightSpec
from qcc.quant_schemes.format_text import text_of
from qcc.runtime.artifact import tensor_bytes
from qcc.runtime.eval.protocol import Windows
from qcc.runtime.eval.report import TensorFigures

PART_TOKENS = 2048  # of the text, for each weight


def tensor_figures(stored: StoredWeights, steps: Steps) -> list[TensorFigures]:
    """The relative error of every quantized weight."""

    def progress(done: int, total: int, _name: str) -> None:
        steps.count("Compare the weights", done, total, "numbers")

    return [
        TensorFigures(
            spec.name, text_of(spec.format), spec.shape, spec.format.bits_per_weight(*spec.shape), e
        )
        for spec, e in stored.errors(progress)
    ]


def linear_bits(specs: Iterable[WeightSpec]) -> float | None:
    """Stored bits a weight, scales included, of all matrices but the embedding."""
    matrices = [spec for spec in specs if spec.role in ("linear", "lm_head")]
    nbytes = sum(tensor_bytes(part.shape, part.dtype) for s in matrices for part in s.stored)
    return 8 * nbytes / sum(math.prod(spec.shape) for spec in matrices) if matrices else None


def measured(
    stored: Sequence[StoredWeights],
    figures: Sequence[Sequence[TensorFigures]],
    swappable: SwappableModel,
    windows: Windows,
    steps: Steps,
) -> list[list[TensorFigures]]:
    """The figures with `kl` and `share`: the original with one weight at a time replaced by ours.

    Args:
        stored: the weights of each artifact.
        figures: of its quantized weights, in their order.
        swappable: the original.
        windows: the text, of which a part is run for each weight.
        steps: is told how far it is.
    """
    divergence = Divergence(swappable, windows.ids, PART_TOKENS)
    total, done = sum(map(len, figures)), 0
    found = []
    for weights, each in zip(stored, figures, strict=True):
        kls = []
        for spec in weights.quantized():
            steps.count("Measure each weight", done, total, "weights")
            divergence.replace(spec.name, weights.dequantized(spec))
            kls.append(divergence.divergence())
            divergence.restore(spec.name)
            done += 1
        whole = sum(kls)
        found.append(
            [
                replace(item, kl=kl, share=kl / whole if whole else 0.0)
                for item, kl in zip(each, kls, strict=True)
            ]
        )
    return found
