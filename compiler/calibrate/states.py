"""Hidden: the hidden states of all windows between two layers, in batches of like length.

Windows of one batch are padded at their ends. Where attention is causal the padding changes
nothing before it, so no mask is needed; `valid` tells the positions that count.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcc.compiler.calibrate.libraries import torch

BATCH_TOKENS = 4096  # of a batch, its padding included: enough to keep the cores busy
STEP = 32  # lengths of batches are multiples: few shapes, so that masks are made once
MEMORY_BYTES = 6 << 30  # above it hidden states lie in a file


@dataclass(frozen=True)
class Batch:
    """Indices of windows, and the length to which they are padded."""

    windows: tuple[int, ...]
    length: int

    @property
    def size(self) -> int:
        """Positions, padding included."""
        return len(self.windows) * self.length


def batches_of(lengths: Sequence[int]) -> list[Batch]:
    """Windows in batches of at most BATCH_TOKENS positions, the longest first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    found: list[Batch] = []
    while order:
        length = min(-(-lengths[order[0]] // STEP) * STEP, max(lengths))
        count = max(1, BATCH_TOKENS // length)
        found.append(Batch(tuple(order[:count]), length))
        order = order[count:]
    return found


class Hidden:
    """f32[b, t, h] for each batch; in memory, or in an unnamed file where that is large."""

    def __init__(self, lengths: Sequence[int], width: int, folder: Path | None = None) -> None:
        """Make room for windows of `lengths` tokens; `folder` is where a file may lie."""
        self.lengths = list(lengths)
        self.width = width
        self.batches = batches_of(self.lengths)
        self._folder = folder
        count = sum(batch.size for batch in self.batches) * width
        self._file: Any = None
        if 4 * count <= MEMORY_BYTES:
            flat = torch.empty(count)
        else:
            self._file = tempfile.NamedTemporaryFile(dir=folder, prefix=".hidden-")
            flat = torch.from_file(self._file.name, shared=True, size=count)
        self.blocks, at = [], 0
        for batch in self.batches:
            block = flat[at : at + batch.size * width]
            self.blocks.append(block.view(len(batch.windows), batch.length, width))
            at += batch.size * width

    @property
    def tokens(self) -> int:
        """Positions that count."""
        return sum(self.lengths)

    def copy(self) -> Hidden:
        """The same states, apart."""
        other = Hidden(self.lengths, self.width, self._folder)
        for mine, its in zip(self.blocks, other.blocks, strict=True):
            its.copy_(mine)
        return other

    def valid(self, index: int) -> Any:
        """bool[b, t]: the positions of batch `index` that are no padding."""
        batch = self.batches[index]
        lengths = torch.tensor([self.lengths[i] for i in batch.windows])
        return torch.arange(batch.length) < lengths[:, None]

    def by_window(self) -> Iterator[Any]:
        """f32[n, h] of each window, in the windows' own order."""
        places = {
            window: (index, row)
            for index, batch in enumerate(self.batches)
            for row, window in enumerate(batch.windows)
        }
        for window, length in enumerate(self.lengths):
            index, row = places[window]
            yield self.blocks[index][row, :length]
