"""Tutorial 4: the file that it writes is found, computes what torch computes, and is gone again."""

from __future__ import annotations

import ast
import math
import sys
from pathlib import Path

import pytest

from qcc.compiler import models
from qcc.tutorials import add_an_architecture as tutorial


def test_the_architecture_is_right(
    tmp_path: Path, tolerance: float, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    most = tutorial.tutorial(tmp_path)
    told = capsys.readouterr().out
    assert 0 < most < tolerance == tutorial.TOLERANCE
    assert tutorial.FILE in told
    assert "before: config.json: architecture 'WrenForCausalLM' is not supported" in told
    assert "after:  wren: Wren (of tutorial 4)" in told
    assert "of model.layers.0.attn.q_proj.weight, model.layers.0.attn.k_proj.weight" in told
    assert "logits of 120 tokens, up to" in told and "NOT THE SAME" not in told
    assert "12 tokens decoded one by one: the same" in told
    assert "unknown key 'residual_multipler'" in told and "'residual_multiplier'?" in told
    assert tutorial.NAME not in models.architectures()
    assert f"{models.__name__}.{tutorial.NAME}" not in sys.modules


def test_a_mistake_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an engine that computes something else."""
    pytest.importorskip("torch")
    np = pytest.importorskip("numpy")

    class Wrong:
        def __init__(self, folder: Path, precision: str) -> None:
            self.token_ids = [1] * tutorial.TOKENS

        def logits(self, ids: list[int]) -> object:
            return np.zeros((len(ids), 4096), np.float32)

        def generate(self, prompts: object, params: object) -> list[Wrong]:
            return [self]

    monkeypatch.setattr(tutorial, "LLM", Wrong)
    monkeypatch.setattr(tutorial, "compile_model", lambda *_: tmp_path)
    assert tutorial.tutorial(tmp_path) == math.inf
    assert capsys.readouterr().out.count("NOT THE SAME") == 2


def test_the_file_is_small_and_documented() -> None:
    """It is a model for others: shorter than a screen or two, every part with its docstring."""
    tree = ast.parse(tutorial.FILE)
    parts = [tree, *(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef))]
    assert all(ast.get_docstring(part) for part in parts)
    lines = tutorial.FILE.splitlines()
    assert len(lines) < 70 and max(map(len, lines)) <= 100
