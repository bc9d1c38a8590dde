"""A whole model on Vulkan: transformers' logits, several sequences, memory that does not grow."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qcc.compiler.driver import compile_model
from qcc.compiler.options import CompileOptions
from qcc.compiler.sizes import SizeFlags
from qcc.runtime.artifact import Artifact
from qcc.runtime.engine.model import CompiledModel
from qcc.runtime.native.vulkan import counters

GENERATIONS = 100


@pytest.fixture(scope="module")
def folder(checkpoint: Callable[..., Path]) -> Path:
    """A tiny random llama."""
    return checkpoint("llama")


@pytest.fixture(scope="module")
def artifact(vulkan: Any, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """It, in f32, compiled for Vulkan and for four sequences at once."""
    out = tmp_path_factory.mktemp("vulkan") / "artifact"
    sizes = SizeFlags(context_window=256, prefill_chunk=64, max_batch=4)
    options = CompileOptions(quant="q0f32", sizes=sizes, targets=("vulkan",))
    return Artifact.open(compile_model(str(folder), out, options))


@pytest.fixture(scope="module")
def model(artifact: Artifact) -> CompiledModel:
    """It, loaded."""
    return CompiledModel(artifact, "vulkan")


def tokens(ids: list[int]) -> np.ndarray:
    return np.array(ids, np.int32)


def test_logits(
    model: CompiledModel,
    folder: Path,
    hugging_face: Callable[..., Any],
    logits_of: Callable[..., Any],
    some_ids: Callable[..., list[int]],
    tolerance: float,
) -> None:
    """Two sequences together: prefill, decode, a chunk behind a history."""
    texts = {0: some_ids(90), 1: some_ids(70, seed=1)}
    wanted = {seq: logits_of(hugging_face(folder), ids) for seq, ids in texts.items()}

    def check(found: np.ndarray, seqs: list[int], ends: list[int]) -> None:
        for row, seq, end in zip(found, seqs, ends, strict=True):
            assert np.abs(row - wanted[seq][end - 1]).max() < tolerance

    for seq in texts:
        model.add_sequence(seq)
    check(model.prefill([0], [tokens(texts[0][:37])]), [0], [37])
    check(model.prefill([1], [tokens(texts[1][:5])]), [1], [5])
    for step in range(12):
        ends = [38 + step, 6 + step]
        new = tokens([texts[seq][end - 1] for seq, end in enumerate(ends)])
        check(model.decode([0, 1], new), [0, 1], ends)
    chunks = [tokens(texts[0][49:89]), tokens(texts[1][17:40])]
    check(model.prefill([0, 1], chunks), [0, 1], [89, 40])
    check(model.decode([0], tokens(texts[0][89:])), [0], [90])
    found = model.verify(1, tokens(texts[1][40:70]))
    assert np.abs(found - wanted[1][40:]).max() < tolerance
    for seq in texts:
        model.remove_sequence(seq)


def test_generations_do_not_add_up(
    model: CompiledModel, some_ids: Callable[..., list[int]]
) -> None:
    """The same tokens each time, and the same memory."""
    prompt = tokens(some_ids(9))

    def generate() -> list[int]:
        model.add_sequence(0)
        found = [int(model.prefill([0], [prompt])[0].argmax())]
        for _ in range(3):
            found.append(int(model.decode([0], tokens(found[-1:]))[0].argmax()))
        model.remove_sequence(0)
        return found

    first = [generate() for _ in range(3)]
    before = counters()
    again = [generate() for _ in range(GENERATIONS)]
    after = counters()
    assert {tuple(text) for text in first + again} == {tuple(first[0])}
    for name in ("buffers", "bytes", "pooled_bytes", "bind_groups"):
        assert after[name] == before[name], name


AFTER_A_LOSS = """
import sys
import tvm_ffi
from qcc.runtime import LLM, QccError, SamplingParams

how = SamplingParams(max_tokens=4, temperature=0)
model = LLM(sys.argv[1], device="vulkan")
first = model.generate("ab", how)[0].token_ids
tvm_ffi.get_global_func("qcc.vulkan.close")(0)
for _ in range(2):
    try:
        model.generate("ab", how)
    except QccError as err:
        assert "device is lost" in str(err) and "\\n" not in str(err), err
    else:
        raise AssertionError("nothing refused")
del model
assert LLM(sys.argv[1], device="vulkan").generate("ab", how)[0].token_ids == first
"""


def test_a_new_model_after_a_loss(artifact: Artifact, environment: SimpleNamespace) -> None:
    """The lost one's calls are errors of one line; TVM's pools hand out nothing of it."""
    command = [sys.executable, "-c", AFTER_A_LOSS, str(artifact.folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **vars(environment))
    assert done.returncode == 0, done.stderr
