"""Artifacts that are damaged, of other versions or too large, and prompts that do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def artifact(compiled: Any, checkpoint: Any, tmp_path: Path) -> Path:
    """A copy of a good artifact, to be spoilt."""
    folder = tmp_path / "artifact"
    shutil.copytree(compiled(checkpoint("llama"), "q4f16_1").artifact.folder, folder)
    return folder


@pytest.fixture
def generate(cli: Any, artifact: Path) -> Callable[..., Any]:
    """generate(*flags): `qcc generate` of one token."""
    return lambda *words: cli("generate", artifact, *(words or ("a",)), "--n-predict", 1)


def flip(path: Path, position: float) -> None:
    """Flip one bit, `position` of the way through a file; its size and time stay."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * position)] ^= 0x10
    path.write_bytes(data)


def test_the_good_one_runs(generate: Any) -> None:
    """Else the refusals below would prove nothing."""
    assert generate().status == 0


@pytest.mark.parametrize("package", ["qcc", "tvm"])
def test_another_version(artifact: Path, generate: Any, package: str) -> None:
    path = artifact / "qcc.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**data, package: "0.0.9"}), encoding="utf-8")
    text = generate().error()
    assert f"qcc.json: compiled with {package} '0.0.9', but {data[package]!r} is installed" in text
    assert "compile the model again" in text


def test_a_format_of_the_future(artifact: Path, generate: Any) -> None:
    path = artifact / "qcc.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**data, "format": 99}), encoding="utf-8")
    assert "qcc.json: format 99, this qcc reads format 1" in generate().error()


@pytest.mark.parametrize("pattern", ["params_shard_0.bin", "lib/*.so"])
@pytest.mark.parametrize("position", [0.0, 0.5, 0.999])
def test_a_flipped_bit(artifact: Path, generate: Any, pattern: str, position: float) -> None:
    (path,) = artifact.glob(pattern)
    flip(path, position)
    text = generate().error()
    assert f"{path.name}: damaged" in text and "recorded is" in text


def test_a_flipped_bit_once_the_file_was_found_right(artifact: Path, generate: Any) -> None:
    """Checks are remembered; a file that changed since is checked again."""
    assert generate().status == 0
    flip(artifact / "params_shard_0.bin", 0.3)
    assert "damaged" in generate().error()


@pytest.mark.parametrize("pattern", ["params_shard_0.bin", "lib/*.so"])
def test_a_truncated_or_missing_file(artifact: Path, generate: Any, pattern: str) -> None:
    (path,) = artifact.glob(pattern)
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path.name}: has" in generate().error()
    path.unlink()
    assert f"{path.name}: is missing" in generate().error()


@pytest.mark.parametrize(
    "name", ["qcc.json", "mlc-chat-config.json", "tensor-cache.json", "tokenizer.json"]
)
@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", "[" * 50000])
def test_json_files(artifact: Path, generate: Any, name: str, content: str | None) -> None:
    path = artifact / name
    path.unlink()
    if content is not None:
        path.write_text(content, encoding="utf-8")
    if name == "mlc-chat-config.json" and content == "{}":
        assert generate().status == 0  # the engine needs nothing of it; clients do
        return
    text = generate().error()
    assert name in text or (name == "qcc.json" and content is None)


def test_what_is_no_artifact(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "nowhere"):
        text = cli("generate", folder, "a").error()
        assert folder.name in text


def test_no_library_for_the_device(generate: Any) -> None:
    text = generate("a", "--device", "cuda").error()
    assert "cuda" in text and "cpu" in text


def test_a_prompt_longer_than_the_context(generate: Any) -> None:
    """The tokenizer makes a token of each byte; the context holds 256."""
    text = generate("x" * 300).error()
    assert "301" in text and "256" in text and "context" in text


def test_a_context_window_beyond_the_library(generate: Any) -> None:
    text = generate("a", "--context-window", 257).error()
    assert "--context-window 257" in text and "256" in text


def test_a_context_larger_than_memory(
    artifact: Path, generate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message says the budget, and a context that does fit; that one runs."""
    from qcc.runtime.engine import model

    metadata = model.Library(next(artifact.glob("lib/*.so"))).metadata
    from qcc.runtime.engine.memory import budget

    short = budget(metadata, 1, 100).total
    monkeypatch.setattr("qcc.runtime.engine.device.available_bytes", lambda: short)
    text = generate("a").error()
    assert "the model needs" in text and "KV cache" in text and "available are" in text
    assert "--context-window from 256 to " in text
    fits = int(text.split("--context-window from 256 to ")[1].split()[0])
    assert 64 <= fits <= 112, "whole pages of 16 tokens"
    assert generate("a", "--context-window", fits).status == 0


def test_weights_larger_than_memory(generate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcc.runtime.engine.device.available_bytes", lambda: 1000)
    text = generate("a").error()
    assert "available are 0 MB" in text and "a scheme of fewer bits" in text


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "1.5"], "top_p"),
        (["--threads", "0"], "--threads 0"),
        (["--n-predict", "-2"], "--n-predict -2"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_flags_of_generate(cli: Any, artifact: Path, flags: list[str], text: str) -> None:
    prompt = [] if "--prompt-file" in flags else ["a"]
    assert text in cli("generate", artifact, *prompt, *flags).error()
