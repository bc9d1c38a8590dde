"""Rows of a bench, their times and figures: on a model that only counts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qcc.runtime.bench.bandwidth import read_bandwidth
from qcc.runtime.bench.cases import Case, Grid, check_cases
from qcc.runtime.bench.measure import Contexts, Timing, measure
from qcc.runtime.bench.report import Sizes, profile, row
from qcc.runtime.bench.step import Call, Step
from qcc.runtime.engine.metadata import Slot, TensorType
from qcc.runtime.engine.model import Limits
from qcc.runtime.errors import QccError


def limits(**changes: Any) -> Limits:
    fields: dict[str, Any] = {
        "vocab_size": 50,
        "prefill_chunk_size": 8,
        "max_batch_size": 3,
        "max_length": 64,
        "window": None,
        "page_size": 4,
        "pages": 49,
    }
    return Limits(**{**fields, **changes})


class CountingModel:
    """Knows the length of each sequence and what ran; after token t it wants t + 1."""

    def __init__(self, **changes: Any) -> None:
        self.limits = limits(**changes)
        self.lengths: dict[int, int] = {}
        self.runs: list[tuple[str, dict[int, int], list[int]]] = []  # kind, lengths before, tokens

    def add_sequence(self, seq: int) -> None:
        assert seq not in self.lengths
        self.lengths[seq] = 0

    def remove_sequence(self, seq: int) -> None:
        del self.lengths[seq]

    def pop(self, seq: int, count: int) -> None:
        assert 0 < count < self.lengths[seq]
        assert self.limits.forgets
        assert self.limits.window is None or self.lengths[seq] <= self.limits.window
        self.lengths[seq] -= count

    def prefill(self, seqs: Sequence[int], tokens: Sequence[Any]) -> Any:
        assert len(tokens[0]) <= self.limits.prefill_chunk_size
        return self._run("prefill", seqs, tokens)

    def decode(self, seqs: Sequence[int], tokens: Any) -> Any:
        return self._run("decode", seqs, [[token] for token in tokens])

    def verify(self, seq: int, tokens: Any) -> Any:
        raise AssertionError("no bench wants it")

    def _run(self, kind: str, seqs: Sequence[int], tokens: Sequence[Any]) -> Any:
        before = {seq: self.lengths[seq] for seq in seqs}
        self.runs.append((kind, before, [int(part[-1]) for part in tokens]))
        for seq, part in zip(seqs, tokens, strict=True):
            self.lengths[seq] += len(part)
        return np.eye(self.limits.vocab_size)[[(int(part[-1]) + 1) % 50 for part in tokens]]


def test_the_grid() -> None:
    """Every depth has the prompts, and the answers with every batch; 0 leaves a kind out."""
    grid = Grid((8, 16), (4,), (10, 0), (1, 3))
    shallow = [Case("prefill", 8, 0), Case("prefill", 16, 0), Case("decode", 4, 0, 1)]
    assert grid.cases()[:4] == [*shallow, Case("decode", 4, 0, 3)]
    assert [case.depth for case in grid.cases()] == [0] * 4 + [10] * 4
    assert Grid((0,), (4,)).cases() == [Case("decode", 4, 0)]


@pytest.mark.parametrize(
    ("grid", "text"),
    [
        (Grid((0,), (0,)), "nothing to measure"),
        (Grid((60,), (0,), (5,)), "prefill 60 at depth 5 needs 65 tokens, the context window has"),
        (Grid((0,), (4,), (61,)), "decode 4 at depth 61 needs 65 tokens"),
        (Grid((0,), (4,), (0,), (4,)), "-b 4: the library was compiled for 1 to 3 sequences"),
        (Grid((0,), (4,), (60,), (1, 3)), "3 sequences of this depth need 48 pages"),
    ],
)
def test_what_the_library_cannot_hold(grid: Grid, text: str) -> None:
    """It is refused before anything runs."""
    check_cases(Grid((60,), (4,), (4,), (1,)).cases(), limits(pages=47))
    with pytest.raises(QccError, match=text):
        check_cases(grid.cases(), limits(pages=47))


@pytest.mark.parametrize(
    "changes", [{}, {"forgets": False}, {"max_length": None, "window": 20}], ids=str
)
def test_every_run_begins_at_its_depth(changes: dict[str, Any]) -> None:
    """Also where a model cannot forget tokens; a warm-up, then the repeats; chunks; tokens fed."""
    model = CountingModel(**changes)
    contexts = Contexts(model)
    ran = []
    cases = Grid((20,), (5,), (0, 13), (1, 2)).cases()
    for case in [*cases, *reversed(cases)]:
        contexts.hold(case.batch, case.depth)
        model.runs.clear()
        timing = measure(contexts, case, 2, lambda: ran.append(1))
        assert len(timing.seconds) == 2 and timing.case is case
        if case.kind == "prefill":
            starts = [lengths[0] for kind, lengths, _ in model.runs if lengths[0] >= case.depth]
            assert starts == [case.depth + at for _ in range(3) for at in (0, 8, 16)]
            continue
        steps = [(lengths, fed) for kind, lengths, fed in model.runs if kind == "decode"]
        assert [lengths for lengths, _ in steps] == [
            dict.fromkeys(range(case.batch), case.depth + i) for _ in range(3) for i in range(5)
        ]
        for (_, now), (_, after) in itertools.pairwise(steps[:5]):
            assert after == [(token + 1) % 50 for token in now]
    assert len(ran) == 3 * 2 * len(cases)
    contexts.close()
    assert not model.lengths


def test_contexts_that_can_forget_are_not_filled_again() -> None:
    """Depths that grow, and then shrink, cost one prefill of the deepest."""
    model = CountingModel()
    contexts = Contexts(model)
    for depth in (8, 16, 16, 8, 4):
        contexts.hold(2, depth)
        assert model.lengths == {0: depth, 1: depth}
    assert len(model.runs) == 4


def test_median_rate_and_spread() -> None:
    """Of the times of three runs: 2 sequences of 4 tokens."""
    timing = Timing(Case("decode", 4, 0, 2), (2.0, 1.0, 4.0))
    assert (timing.median, timing.step_seconds, timing.rate) == (2.0, 0.5, 4.0)
    assert timing.spread == 0.75


# A model of 2 slots in a layer, an embedding and a head of 50 rows; 100 bytes of KV a token.
SLOTS = {
    "model.embed_tokens.q_weight": ((50, 4), "uint32", {"bits": 4, "group": 32}),
    "model.layers.0.mlp.q_weight": ((64, 4), "uint32", {"bits": 4, "group": 32}),
    "model.layers.0.mlp.q_scale": ((64, 1), "float16", {"bits": 4, "group": 32}),
    "model.layers.0.norm.weight": ((32,), "float32", {"bits": 32}),
    "lm_head.weight": ((50, 32), "float32", {"bits": 32}),
}


def sizes(**changes: Any) -> Sizes:
    slots = [
        Slot(TensorType(name, shape, dtype), (name,), None)
        for name, (shape, dtype, _) in SLOTS.items()
    ]
    fields = {"slots": slots, "vocab_size": 50, "kv_token_bytes": 100, "sliding_window_size": -1}
    fields["state_bytes"] = 0
    records = {name: SimpleNamespace(shape=shape) for name, (shape, *_) in SLOTS.items()}
    tensors = {name: formats for name, (*_, formats) in SLOTS.items()}
    artifact = SimpleNamespace(records=records, manifest=SimpleNamespace(tensors=tensors))
    return Sizes(artifact, SimpleNamespace(**{**fields, **changes}))  # type: ignore[arg-type]


LOOKUP = (Call("table_rows", 1e-6, {0: 1 / 50}, True),)
CALLS = (
    Call("vm.builtin.alloc_tensor", 1e-6, {}, False),
    Call("gemv", 2e-3, {1: 1.0, 2: 1.0}, True),
    Call("vm.builtin.attention_kv_cache_attention_with_fused_qkv", 1e-3, {}, False),
    Call("gemv", 1e-3, {4: 1.0}, True),
    Call("norm", 1e-4, {3: 1.0}, True),
)
STEP = Step(1, LOOKUP, CALLS)
# One row of the embedding, codes and scales, a norm, the head.
WEIGHTS = 16 + 1024 + 128 + 128 + 6400


def test_figures_of_a_decode() -> None:
    """GB/s: weights once a step, keys and values of each sequence at the mean depth."""
    timing = Timing(Case("decode", 3, 10, 2), (6e-3,))
    found = row(timing, 2, STEP, sizes(), 10e6)
    assert found["tok_s"] == 1000
    assert (found["weight_bytes"], found["context_bytes"]) == (WEIGHTS, 2 * 100 * 12)
    assert found["share_of_bandwidth"] == pytest.approx((WEIGHTS + 2400) / 2e-3 / 10e6, abs=5e-4)
    windowed = row(timing, 2, STEP, sizes(sliding_window_size=5), 10e6)
    assert windowed["context_bytes"] == 2 * 100 * 5
    recurrent = row(timing, 2, STEP, sizes(state_bytes=7), 10e6)
    assert recurrent["context_bytes"] == 2 * (100 * 12 + 7)


def test_figures_of_a_prefill() -> None:
    """GFLOP/s: each token with the layers' 64 x 32 weights, the last one with the head's too."""
    timing = Timing(Case("prefill", 100, 0), (1e-6,))
    found = row(timing, 2, STEP, sizes(), 1e9)
    flop = 2 * (100 * 64 * 32 + 50 * 32)
    assert found["gflop_s"] == pytest.approx(flop / 1e-6 / 1e9, abs=0.05)


def test_words_with_unused_bits() -> None:
    """3 bits in groups of 40: 10 codes a word; 3 bits in others: a stream."""
    found = sizes()
    tensors: Any = found.artifact.manifest.tensors
    tensors["model.layers.0.mlp.q_weight"] = {"bits": 3, "group": 40}
    assert found.multiplied(STEP)[0] == 64 * 4 * 10
    tensors["model.layers.0.mlp.q_weight"] = {"bits": 3, "group": 32}
    assert found.multiplied(STEP)[0] == 64 * 4 * 32 // 3


def test_a_profile_groups_kernels() -> None:
    """By name, the longest first, with the bytes that its calls read; other calls are summed."""
    found = profile(STEP, 5e-3, 7, sizes())
    assert [item["kernel"] for item in found["kernels"]] == [
        *("gemv", "attention_kv_cache_attention_with_fused_qkv", "norm", "table_rows")
    ]
    gemv, attention, norm, rows = found["kernels"]
    assert (gemv["calls"], gemv["ms"], gemv["bytes"]) == (2, 3.0, 1024 + 128 + 6400)
    assert gemv["GB_s"] == pytest.approx(gemv["bytes"] / 3e-3 / 1e9, abs=5e-3)
    assert gemv["weights"] == ["lm_head", "mlp"]
    assert gemv["share"] == 0.6
    assert attention["bytes"] == 800  # the 7 tokens before and the one that it appends
    assert (norm["weights"], rows["weights"]) == (["norm"], ["embedding rows"])
    assert rows["bytes"] == 16
    assert (found["launches"], found["attention_calls"], found["other_calls"]) == (4, 1, 1)


def test_bandwidth_reads_what_it_says() -> None:
    """Equal parts; pages of 2 MiB where the system has them; a figure above zero."""
    found = read_bandwidth(2, (), passes=1, total=1 << 23)
    assert (found.threads, found.bytes_read) == (2, 1 << 23)
    assert 0 <= found.huge_bytes <= 2 * found.bytes_read
    assert found.bytes_per_second > 0
