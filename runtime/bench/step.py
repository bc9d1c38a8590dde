"""One decode step as TVM sees it: which kernels run, how long, and which weights each reads.

The virtual machine's instrument is called before and after every call that the compiled code makes,
with its arguments; a tensor at the address of a slot of the packed tuple is that weight. What runs
inside a call, as the kernels of the KV cache, is not seen apart. Watching costs some microseconds a
call, part of which the call's own time has; on a GPU a call's time is that of its kernels there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qcc.runtime.artifact import Artifact
from qcc.runtime.bench.measure import Contexts
from qcc.runtime.engine.model import CompiledModel

BUILTIN = "vm.builtin."
EXPERTS = ".experts."  # in the names of weights of which a token reads a part


@dataclass(frozen=True)
class Call:
    """A call of the compiled code: its seconds, and slot -> the share of it that was read.

    `is_kernel`: compiled for this model and more than arithmetic on extents.
    """

    name: str
    seconds: float
    slots: dict[int, float]
    is_kernel: bool

    @property
    def is_attention(self) -> bool:
        """Whether it runs the kernels of the KV cache."""
        return self.name.startswith(BUILTIN) and "attention" in self.name


@dataclass(frozen=True)
class Step:
    """A decode step of `batch` sequences: the calls of the embedding, then all others."""

    batch: int
    lookup: tuple[Call, ...]
    calls: tuple[Call, ...]

    @property
    def launches(self) -> int:
        """Kernels, those inside the calls of the KV cache not counted."""
        return sum(call.is_kernel for call in (*self.lookup, *self.calls))

    def shares(self) -> dict[int, float]:
        """Slot -> the share of it that the step reads; of the embedding table the rows alone."""
        found: dict[int, float] = {}
        for call in (*self.lookup, *self.calls):
            for slot, share in call.slots.items():
                found[slot] = max(share, found.get(slot, 0.0))
        return found


class Watch:
    """Records steps of one model."""

    def __init__(self, artifact: Artifact, model: CompiledModel) -> None:
        """Learn where the slots lie."""
        self.artifact, self.model = artifact, model
        self.slots = model.library.metadata.slots
        # Behind the slots the tuple has tensors whose extents alone count.
        tensors = zip(model.library.params, self.slots, strict=False)
        self._at = {tensor.data_ptr(): i for i, (tensor, _) in enumerate(tensors)}
        self._calls: list[Call] = []
        self._clock: Callable[[], float] = time.perf_counter
        self._started = 0.0

    def step(self, contexts: Contexts, batch: int, depth: int, repeats: int = 1) -> Step:
        """A step of `batch` sequences of `depth` tokens; each time is the median of the repeats."""
        library = self.model.library
        seqs = contexts.hold(batch, depth)
        tokens = contexts.tokens(batch)
        runs, lookups = [], 0
        with library.watched(self._instrument), library.device.clock() as self._clock:
            for _ in range(repeats + 1):
                contexts.hold(batch, depth)
                lookups = len(self._recorded(lambda: library.embed(tokens)))
                runs.append(self._recorded(lambda: contexts.step(seqs, tokens)))
        calls = _medians(runs[1:])
        rows = batch / library.metadata.vocab_size
        lookup = [replace(c, slots=dict.fromkeys(c.slots, rows)) for c in calls[:lookups]]
        return Step(batch, tuple(lookup), tuple(calls[lookups:]))

    def _recorded(self, run: Callable[[], Any]) -> list[Call]:
        self._calls = []
        run()
        return self._calls

    def _instrument(self, _: Any, name: str, before: bool, __: Any, *args: Any) -> int:
        if before:
            tensors = [arg for arg in args if hasattr(arg, "data_ptr")]
            # What the runtime itself offers has dots in its name.
            is_kernel = "." not in name and any(t.dtype != "int64" for t in tensors)
            found = [self._at[t.data_ptr()] for t in tensors if t.data_ptr() in self._at]
            # What has no stored tensors is no weight but a setting.
            slots = {slot: 1.0 for slot in found if self.slots[slot].stored}
            for slot in slots:
                if EXPERTS in self.slots[slot].type.name:
                    slots[slot] = self._experts_share(slot, tensors)
            self._calls.append(Call(str(name), 0.0, slots, is_kernel))
            self._started = self._clock()
        else:
            seconds = self._clock() - self._started
            self._calls[-1] = replace(self._calls[-1], seconds=seconds)
        return 0  # run it

    def _experts_share(self, slot: int, tensors: Sequence[Any]) -> float:
        """The share of the experts that a call names, of all that are stacked in a slot."""
        others = [t for t in tensors if t.data_ptr() not in self._at]
        ids = next((t for t in others if t.dtype == "int32"), None)
        if ids is None:
            return 1.0
        rows = self.artifact.records[self.slots[slot].stored[0]].shape[0]
        one = int(tensors[-1].shape[-1])  # rows of an expert: the width of the result
        return min(1.0, len(np.unique(np.from_dlpack(ids))) * one / rows)


def _medians(runs: Sequence[Sequence[Call]]) -> list[Call]:
    """The calls of several runs of one step, each with the median of its times."""
    assert len({tuple(call.name for call in run) for run in runs}) == 1, "steps differ"
    return [
        replace(same[0], seconds=statistics.median(call.seconds for call in same))
        for same in zip(*runs, strict=True)
    ]
