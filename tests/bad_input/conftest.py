"""A checkpoint to break, and what must be true after a refusal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def broken(checkpoint: Any, tmp_path: Path) -> Path:
    """A copy of a small Llama, to be spoilt."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("llama"), folder)
    return folder


@pytest.fixture
def set_config(broken: Path) -> Callable[..., None]:
    """set_config(key=value): change config.json; a value of ... removes the key."""

    def change(**fields: Any) -> None:
        path = broken / "config.json"
        config = json.loads(path.read_text(encoding="utf-8")) | fields
        kept = {key: value for key, value in config.items() if value is not ...}
        path.write_text(json.dumps(kept), encoding="utf-8")

    return change


@pytest.fixture
def change_tensors(broken: Path) -> Callable[[Callable[[dict[str, Any]], object]], None]:
    """change_tensors(function): it may change the dict of the checkpoint's tensors."""
    from safetensors.numpy import load_file, save_file

    def change(function: Callable[[dict[str, Any]], object]) -> None:
        tensors = load_file(broken / "model.safetensors")
        function(tensors)
        save_file(tensors, broken / "model.safetensors", {"format": "pt"})

    return change


@pytest.fixture
def refused(broken: Path, tmp_path: Path, cli: Any) -> Callable[..., str]:
    """refused(*flags): the error of `qcc convert`; it leaves no folder behind."""

    def run(*flags: object, verb: str = "convert") -> str:
        ran = cli(verb, broken, "-o", tmp_path / "out", *flags)
        assert not (tmp_path / "out").exists(), sorted((tmp_path / "out").iterdir())
        return str(ran.error())

    return run
