"""qcc bench on a compiled mixture: its rows, its profile, its errors. No time is asserted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcc.runtime.bench import run as bench_run
from qcc.runtime.bench.bandwidth import measured_apart
from qcc.runtime.bench.measure import Contexts
from qcc.runtime.bench.report import Sizes
from qcc.runtime.bench.step import Watch

HIDDEN, MLP, VOCABULARY, LAYERS, EXPERTS, USED = 64, 96, 384, 2, 4, 2
SHAPE = {
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": USED,
    "tie_word_embeddings": False,
    "sliding_window": None,
}


@pytest.fixture(scope="module")
def llm(checkpoint: Callable[..., Path], compiled: Callable[..., Any]) -> Any:
    """4 bits, groups of 32, of which every row is a multiple."""
    return compiled(checkpoint("mixtral", whole=True, **SHAPE), "q4f16_1", context_window=64)


def test_a_step_reads_what_its_names_say(llm: Any) -> None:
    """Rows of the embedding, the experts in use, all else; a step is none the wiser."""
    model, watch = llm.model, Watch(llm.artifact, llm.model)
    meta = model.library.metadata
    contexts = Contexts(model)
    (seq,) = contexts.hold(1, 9)
    before = model.decode([seq], np.array([5], np.int32)).copy()
    model.pop(seq, 1)
    step = watch.step(contexts, 1, 9)
    model.pop(seq, 1)
    assert np.array_equal(before, model.decode([seq], np.array([5], np.int32)))
    model.pop(seq, 1)

    def share(name: str) -> float:
        if "embed" in name:
            return 1 / VOCABULARY
        return USED / EXPERTS if ".experts." in name else 1.0

    expected = {i: share(slot.type.name) for i, slot in enumerate(meta.slots) if slot.stored}
    assert step.shares() == pytest.approx(expected)
    heads = HIDDEN * 16 * (4 + 2 * 2) + 4 * 16 * HIDDEN
    layer = heads + EXPERTS * HIDDEN + USED * 3 * HIDDEN * MLP
    sizes = Sizes(llm.artifact, meta)
    assert sizes.multiplied(step) == (LAYERS * layer, VOCABULARY * HIDDEN)
    # With two sequences the experts of both, of the table two rows.
    both = watch.step(contexts, 2, 9).shares()
    table = next(i for i, slot in enumerate(meta.slots) if "embed" in slot.type.name)
    assert both[table] == pytest.approx(2 / VOCABULARY)
    contexts.close()


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bandwidth is measured on 4 MiB."""

    def apart(threads: int, cpus: Any, _: int) -> Any:
        return measured_apart(threads, cpus, 1 << 22)

    monkeypatch.setattr(bench_run, "measured_apart", apart)


@pytest.mark.usefixtures("little_memory")
def test_rows_and_profile_as_json(llm: Any, cli: Callable[..., Any]) -> None:
    """Every row is there with its figures; the profile's bytes are all that a step reads."""
    folder = llm.artifact.folder
    flags = ("-p", "8,70", "-n", "4", "-d", "0,20", "-b", "1,2", "-r", "2", "-t", "1")
    assert "prefill 70 at depth 0 needs 70 tokens" in cli("bench", folder, *flags).error()
    ran = cli("bench", folder, "-p", "8", *flags[2:], "--json", "--profile", "--kv", "f16")
    assert ran.status == 0, ran.err
    found = json.loads(ran.out.splitlines()[-1])
    keys = ("kind", "tokens", "depth", "batch", "threads")
    assert [tuple(item[key] for key in keys) for item in found["rows"]] == [
        (kind, tokens, depth, batch, 1)
        for depth in (0, 20)
        for kind, tokens, batch in (("prefill", 8, 1), ("decode", 4, 1), ("decode", 4, 2))
    ]
    assert all(item["tok_s"] > 0 and len(item["seconds"]) == 2 for item in found["rows"])
    assert [item["threads"] for item in found["memory"]] == [1]
    alone = found["rows"][1]
    profile = found["profile"]
    assert (profile["depth"], profile["attention_calls"]) == (0, LAYERS)
    read = {item["kernel"]: item["bytes"] for item in profile["kernels"]}
    cached = sum(size for name, size in read.items() if "attention" in name)
    assert cached == LAYERS * 2 * 2 * 16 * 2  # keys and values of 2 heads of 16 numbers of 2 bytes
    assert sum(read.values()) - cached == pytest.approx(alone["weight_bytes"], abs=len(read))
    calls = sum(item["calls"] for item in profile["kernels"])
    assert calls == profile["launches"] + LAYERS


@pytest.mark.usefixtures("little_memory")
def test_table(llm: Any, cli: Callable[..., Any]) -> None:
    """A line a row, what memory reads, and the kernels."""
    flags = ("-p", "16", "-n", "4", "-r", "1", "-t", "1", "--profile")
    lines = cli("bench", llm.artifact.folder, *flags).out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("test "))
    assert [line.split()[:5] for line in lines[head + 1 : head + 3]] == [
        ["prefill", "16", "0", "1", "1"],
        ["decode", "4", "0", "1", "1"],
    ]
    assert any(line.startswith("memory reads ") for line in lines)
    assert any(line.startswith("attention_kv_cache") for line in lines)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("-p", "12,x"), "argument -p/--prompt: '12,x': give whole numbers, as 128,512"),
        (("-d", "-1"), "argument -d/--depth: '-1': no number may be negative"),
        (("-t", "0"), "-t 0: must be 1 or more"),
        (("-r", "0"), "-r 0: must be 1 or more"),
        (("-b", "99"), "99: the library was compiled for 1 to"),
    ],
    ids=str,
)
def test_errors(llm: Any, cli: Callable[..., Any], flags: tuple[str, str], text: str) -> None:
    """One line each, before anything is measured."""
    assert text in cli("bench", llm.artifact.folder, *flags).error()
