"""Calibration text: a file's windows, what a model samples, and what is refused."""

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qcc.compiler.calibrate import libraries, text
from qcc.compiler.calibrate.sample import sample
from qcc.compiler.calibrate.text import Tokens, text_of_file, text_of_model
from qcc.runtime.errors import QccError


@pytest.fixture
def model(checkpoint: Callable[..., Path]) -> Path:
    """Byte tokens; BOS 1, EOS 2."""
    return checkpoint("llama")


def test_windows_of_a_file(model: Path, tmp_path: Path) -> None:
    """BOS and context - 1 tokens, documents apart, no more tokens than asked for."""
    from tokenizers import Tokenizer

    path = tmp_path / "text.txt"
    long, short = "a quick brown fox " * 20, "short"
    path.write_text(f"{long}<|endoftext|>{short}</s>{long}", encoding="utf-8")
    found = text_of_file(model, path, context=50, tokens=200)
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(long.strip()).ids
    expected = [(1, *ids[start : start + 49]) for start in range(0, 147, 49)]
    assert list(found.windows[:3]) == expected
    assert all(window[0] == 1 and 2 not in window for window in found.windows)
    assert found.tokens == 200 and found.name == "text.txt"
    assert found.warning and "only 200 tokens" in found.warning
    assert text_of_file(model, path, context=20, tokens=200).warning is None


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", "the file is empty"),
        (b" \n\t", "the file is empty"),
        (b"a few words of text, but not enough", "too short: 36 tokens .* at least 128"),
        (b"<|endoftext|>hi" * 100, "too short: 0 tokens"),
        (b"caf\xe9 " * 100, "not UTF-8 text"),
    ],
)
def test_files_that_are_refused(model: Path, tmp_path: Path, content: bytes, error: str) -> None:
    """One line that says what to give."""
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(QccError, match=error) as raised:
        text_of_file(model, path, context=64)
    assert "\n" not in str(raised.value) and "text.txt" in str(raised.value)


def test_missing_file(model: Path, tmp_path: Path) -> None:
    """The name and the reason."""
    with pytest.raises(QccError, match=r"none\.txt: cannot read: No such file"):
        text_of_file(model, tmp_path / "none.txt", context=64)


@pytest.mark.parametrize("arch", ["llama", "qwen3_5_text"])
def test_samples_have_the_models_distribution(
    arch: str, checkpoint: Callable[..., Path], hugging_face: Callable[[Path], Any]
) -> None:
    """The mean surprise of sampled tokens is the mean entropy of transformers' predictions.

    Ids 2..19 end a document, and count as one: the batch gets smaller all the time.
    """
    model = checkpoint(arch)
    special = replace(Tokens.read(model), eos=tuple(range(2, 20)))
    documents = sample(model, special, 4000, 64, seed=3, device="cpu")
    assert len({len(document) for document in documents}) > 20
    excess = []
    for document in documents:
        ids = [1, *document]
        with torch.no_grad():
            logits = hugging_face(model)(torch.tensor([ids])).logits[0, :, : special.size]
        p = logits.double().softmax(-1)
        p = torch.cat([p[:, :2], p[:, 2:20].sum(-1, keepdim=True), p[:, 20:]], dim=-1)
        drawn = [token if token < 2 else token - 17 for token in document]
        if len(document) < 63:
            drawn.append(2)
        log_p = p.log()[: len(drawn)]
        surprise = -log_p.gather(1, torch.tensor(drawn)[:, None])[:, 0]
        excess.append(surprise + (log_p.exp() * log_p).sum(-1))
    found = torch.cat(excess).numpy()
    assert len(found) > 3500
    assert abs(found.mean()) < 4 * found.std() / np.sqrt(len(found))
    assert not {token for document in documents for token in document} & set(special.eos)


def test_sampled_text_is_kept(model: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """The same seed gives the same windows, from the cache the second time; damage is no harm."""
    first = text_of_model(model, "c" * 64, 64, 500, seed=5, device="cpu")
    assert 400 < first.tokens <= 500 and all(w[0] == 1 and len(w) <= 64 for w in first.windows)
    assert text_of_model(model, "c" * 64, 64, 500, seed=6, device="cpu").sha256 != first.sha256
    path = cache / "calibration" / f"{'c' * 32}-64-500-5.json"
    path.write_text(json.dumps([[1, "x"]]))
    assert text_of_model(model, "c" * 64, 64, 500, seed=5, device="cpu") == first
    monkeypatch.setattr(text, "_cut", None)  # nothing is sampled again
    assert text_of_model(model, "c" * 64, 64, 500, seed=5) == first


def test_a_sampler_of_the_callers(model: Path) -> None:
    """Long documents become several windows; each has its BOS."""
    asked: list[int] = []

    def sampler(tokens: int) -> list[list[int]]:
        asked.append(tokens)
        return [list(range(3, 103)), [7] * 5, list(range(3, 303))]

    found = text_of_model(model, "d" * 64, 64, 250, sampler=sampler)
    assert asked == [250]
    assert found.windows[:2] == ((1, *range(3, 66)), (1, *range(66, 103)))
    assert found.tokens == 250


def test_a_model_too_large_to_sample(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asks for a file instead of swapping."""
    free = SimpleNamespace(available=1000)
    monkeypatch.setattr("qcc.compiler.calibrate.sample.psutil.virtual_memory", lambda: free)
    with pytest.raises(QccError, match=r"needs 0\.0 GB of memory.*--calib FILE"):
        text_of_model(model, "e" * 64, 64, 500, device="cpu")


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without transformers: what to install."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    spec = importlib.util.spec_from_file_location("again", str(libraries.__file__))
    assert spec is not None and spec.loader is not None
    with pytest.raises(QccError, match=r"transformers is missing.*pip install 'qcc\[calibrate\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
