"""What sequences keep besides keys and values: tensors of fixed size, f32, zeros at first.

The library's functions write them in place. A sequence can go on, end, or be copied as it is; it
cannot go back, as nothing holds what its states were.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from qcc.runtime.engine import tvm_runtime
from qcc.runtime.engine.device import Device
from qcc.runtime.engine.metadata import TensorType
from qcc.runtime.errors import QccError


class RecurrentState:
    """The states of up to `places` sequences, each tensor f32[places, *shape]."""

    def __init__(self, device: Device, states: Sequence[TensorType], places: int) -> None:
        """Reserve the tensors; on the host memory is touched as sequences begin."""
        self._device = device
        self._zeros = [device.zeros(state.shape) for state in states]
        self._states = [device.zeros((places, *state.shape)) for state in states]
        self.tensors = tvm_runtime.load().convert(self._states)
        self._copy = tvm_runtime.global_function("runtime.TVMTensorCopyFromTo")
        self._free = list(reversed(range(places)))
        self._places: dict[int, int] = {}
        self._lengths: dict[int, int] = {}
        self._running: list[tuple[int, int]] = []
        self.segments: Any = None

    def add(self, seq: int) -> None:
        """Begin an empty sequence."""
        place = self._take(seq)
        for zeros, state in zip(self._zeros, self._states, strict=True):
            self._copy(zeros, _at(state, place))
        self._lengths[seq] = 0

    def remove(self, seq: int) -> None:
        """Forget a sequence."""
        self._free.append(self._places.pop(seq))
        del self._lengths[seq]

    def fork(self, parent: int, child: int, position: int = -1) -> None:
        """Begin `child` with all that `parent` has.

        Raises:
            QccError: `position` is neither -1 nor the parent's length.
        """
        length = self._lengths[parent]
        if position not in (-1, length):
            raise QccError(
                f"a model with recurrent layers cannot go on after the first {position} of "
                f"{length} tokens: what it kept of them is gone; compute them anew"
            )
        place = self._take(child)
        for state in self._states:
            self._copy(_at(state, self._places[parent]), _at(state, place))
        self._lengths[child] = length

    def pop(self, count: int) -> None:
        """Nothing, for no tokens.

        Raises:
            QccError: tokens would be forgotten.
        """
        if count:
            raise QccError(
                f"a model with recurrent layers cannot forget the last {count} tokens of a "
                "sequence; compute those before them anew"
            )

    def clear(self) -> None:
        """Forget all sequences."""
        for seq in list(self._places):
            self.remove(seq)

    def begin(self, seqs: Sequence[int], lengths: Sequence[int]) -> None:
        """A run appends `lengths[i]` tokens to sequence `seqs[i]`; makes `segments` int32[b, 3]."""
        self._running = list(zip(seqs, lengths, strict=True))
        firsts = np.cumsum([0, *lengths[:-1]])
        places = [self._places[seq] for seq in seqs]
        table = np.stack([places, firsts, lengths], axis=1).astype(np.int32)
        self.segments = self._device.tensor(table)

    def end(self) -> None:
        """The run that `begin` announced is over."""
        for seq, length in self._running:
            self._lengths[seq] += length
        self._running = []

    def _take(self, seq: int) -> int:
        assert seq not in self._places, f"sequence {seq} is there already"
        assert self._free, "more sequences than the library was asked to hold"
        self._places[seq] = place = self._free.pop()
        return place


def _at(state: Any, place: int) -> Any:
    """What one sequence has of a tensor."""
    shape = tuple(map(int, state.shape[1:]))
    offset = place * math.prod(shape) * np.dtype(np.float32).itemsize
    view = tvm_runtime.global_function("runtime.TVMTensorCreateView")
    return view(state, tvm_runtime.load().Shape(shape), state.dtype, offset)
