"""Divergence: how far a model with replaced weights is from the original on a text. Not a verb."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qcc.compiler.cli._swap import Floats, SwappableModel
from qcc.runtime.errors import QccError
from qcc.runtime.eval.figures import kl_divergence, log_softmax

MAX_BYTES = 512 << 20  # of the original's log probabilities


def part_of(windows: Sequence[Sequence[int]], tokens: int) -> list[Sequence[int]]:
    """The first windows, about so many tokens, one window at least."""
    found: list[Sequence[int]] = []
    for ids in windows:
        if found and sum(map(len, found)) + len(ids) > tokens:
            break
        found.append(ids)
    return found


class Divergence:
    """A SwappableModel and the log probabilities of the original on windows of text."""

    def __init__(self, model: SwappableModel, windows: Sequence[Sequence[int]], tokens: int):
        """Run the original on the first windows, about `tokens` tokens, one window at least."""
        self.model = model
        self.windows: list[Sequence[int]] = []
        self._theirs: list[Floats] = []
        for ids in part_of(windows, tokens):
            self.windows.append(ids)
            self._theirs.append(log_softmax(model.logits(ids)[:-1]).astype(np.float32))
            if sum(part.nbytes for part in self._theirs) > MAX_BYTES:
                break

    @property
    def tokens(self) -> int:
        """Tokens of the windows that are run."""
        return sum(map(len, self.windows))

    def replace(self, name: str, weights: Floats) -> None:
        """See SwappableModel."""
        self.model.replace(name, weights)

    def restore(self, name: str) -> None:
        """See SwappableModel."""
        self.model.restore(name)

    def divergence(self) -> float:
        """Mean KL divergence from the original in nats, with the weights as they are now.

        Raises:
            QccError: logits that are no numbers.
        """
        found = [
            kl_divergence(p.astype(np.float64), log_softmax(self.model.logits(ids)[:-1]))
            for ids, p in zip(self.windows, self._theirs, strict=True)
        ]
        mean = float(np.concatenate(found).mean())
        if not np.isfinite(mean):
            raise QccError("the model's logits are no numbers on this text")
        return mean
