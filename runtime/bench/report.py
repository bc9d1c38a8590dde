"""Figures of a bench: what rows and a step's kernels come to, as plain data for tables and JSON.

GB/s counts what a decode step must read: the weights that its kernels take (of the embedding table
one row a token, unless it is the head too; of experts those in use), the keys and values of all
tokens before, and the states of recurrent layers. GFLOP/s of a prefill counts 2 for each weight
that a token is multiplied with, the head's once a prompt; attention is left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from qcc.runtime.artifact import Artifact
from qcc.runtime.bench.measure import Timing
from qcc.runtime.bench.step import Call, Step
from qcc.runtime.engine.metadata import Metadata

SPARSE = {"bits": 3, "group": 40}  # the one format whose words have unused bits: 10 codes in 32


class Sizes:
    """Bytes and weights of one artifact's library."""

    def __init__(self, artifact: Artifact, meta: Metadata) -> None:
        """Read shapes and formats; nothing of the weights themselves."""
        self.artifact, self.meta = artifact, meta

    def weight_bytes(self, slots: Mapping[int, float]) -> int:
        """Bytes of the shares of the slots."""
        return round(sum(self.meta.slots[i].type.nbytes * part for i, part in slots.items()))

    def kv_bytes(self, tokens: float) -> float:
        """Bytes of the keys and values of a sequence of so many tokens."""
        window = self.meta.sliding_window_size
        return self.meta.kv_token_bytes * (min(tokens, window) if window > 0 else tokens)

    def context_bytes(self, tokens: float) -> float:
        """Bytes of all that a sequence of so many tokens keeps."""
        return self.kv_bytes(tokens) + self.meta.state_bytes

    def multiplied(self, step: Step) -> tuple[int, int]:
        """Weights that a token is multiplied with: of the layers, and of the head."""
        layers = head = 0.0
        for call in step.calls:
            for slot, share in call.slots.items():
                for name in self.meta.slots[slot].stored:
                    count = share * self._weights(name)
                    if self.meta.vocab_size in self.artifact.records[name].shape:
                        head += count
                    else:
                        layers += count
        return round(layers), round(head)

    def _weights(self, stored: str) -> int:
        """Weights that a stored tensor holds, a row's tail counted as a whole group; of a vector
        and of scales none."""
        shape = self.artifact.records[stored].shape
        fields = self.artifact.manifest.tensors.get(stored, {})
        if len(shape) < 2:
            return 0
        if "group" not in fields:
            return math.prod(shape)
        if not stored.endswith("q_weight"):
            return 0
        words = math.prod(shape)
        if {key: fields[key] for key in SPARSE} == SPARSE:
            return words * 10
        return words * 32 // int(fields["bits"])


def row(timing: Timing, threads: int, step: Step, sizes: Sizes, read: float) -> dict[str, Any]:
    """One line of the table; `step` is one of the row's batch, `read` the bandwidth in bytes/s."""
    case = timing.case
    found: dict[str, Any] = {
        "kind": case.kind,
        "tokens": case.tokens,
        "depth": case.depth,
        "batch": case.batch,
        "threads": threads,
        "tok_s": round(timing.rate, 2),
        "spread": round(timing.spread, 4),
        "seconds": [round(s, 6) for s in timing.seconds],
    }
    if case.kind == "prefill":
        layers, head = sizes.multiplied(step)
        flop = 2 * (layers * case.tokens + head)
        return {**found, "gflop_s": round(flop / timing.median / 1e9, 1)}
    weights = sizes.weight_bytes(step.shares())
    # Step i reads depth + i tokens and the one that it has just written.
    context = case.batch * sizes.context_bytes(case.depth + (case.tokens + 1) / 2)
    rate = (weights + context) / timing.step_seconds
    return {
        **found,
        "weight_bytes": weights,
        "context_bytes": round(context),
        "read_GB_s": round(rate / 1e9, 2),
        "share_of_bandwidth": round(rate / read, 3),
    }


def profile(step: Step, step_seconds: float, depth: int, sizes: Sizes) -> dict[str, Any]:
    """A step of the profile: kernels by name, the longest first. `step_seconds`: unwatched."""
    groups: dict[str, list[Call]] = {}
    embedding = {id(call) for call in step.lookup}
    other = [0, 0.0]
    attention = sum(call.is_attention for call in step.calls)
    kv = step.batch * sizes.kv_bytes(depth + 1) / max(1, attention)
    for call in (*step.lookup, *step.calls):
        if call.is_kernel or call.is_attention:
            name = call.name.removeprefix("vm.builtin.")
            groups.setdefault(name, []).append(call)
        else:
            other[0] += 1
            other[1] += call.seconds
    kernels: list[dict[str, Any]] = []
    for name, calls in groups.items():
        seconds = sum(call.seconds for call in calls)
        size = sum(kv if c.is_attention else sizes.weight_bytes(c.slots) for c in calls)
        names = {_place(sizes.meta.slots[slot].type.name) for c in calls for slot in c.slots}
        kernels.append(
            {
                "kernel": name,
                "calls": len(calls),
                "ms": round(seconds * 1e3, 4),
                "share": round(seconds / step_seconds, 4),
                "bytes": round(size),
                "GB_s": round(size / seconds / 1e9, 2) if size else None,
                "weights": sorted(names) if id(calls[0]) not in embedding else ["embedding rows"],
            }
        )
    kernels.sort(key=lambda item: -item["ms"])
    return {
        "batch": step.batch,
        "depth": depth,
        "step_ms": round(step_seconds * 1e3, 4),
        "kernels_ms": round(sum(item["ms"] for item in kernels), 4),
        "launches": step.launches,
        "attention_calls": attention,
        "other_calls": other[0],
        "other_ms": round(other[1] * 1e3, 4),
        "kernels": kernels,
    }


def _place(slot: str) -> str:
    """A weight's name without the number of its layer and without its part."""
    return re.sub(r"^(.*\.)?layers\.\d+\.", "", slot).rsplit(".", 1)[0]
