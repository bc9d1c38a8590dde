"""stories260K tells, greedily, the story that its author published: 256 tokens after BOS."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def story(shared: Path) -> str:
    """The published text."""
    return (shared / "models/stories260K/golden_greedy.txt").read_text(encoding="utf-8")


def test_greedy_text(compiled: Any, shared: Path, story: str) -> None:
    from qcc.runtime import SamplingParams

    llm = compiled(shared / "models/stories260K", "q0f32")
    (result,) = llm.generate([""], SamplingParams(temperature=0, max_tokens=256))
    assert result.prompt_token_ids == [1], "an empty prompt is BOS alone"
    assert result.text == story.rstrip("\n")
    assert len(result.token_ids) == 256 and result.finish_reason == "length"


def test_greedy_text_of_the_command_line(compiled: Any, cli: Any, shared: Path, story: str) -> None:
    llm = compiled(shared / "models/stories260K", "q0f32")
    words = ("generate", llm.artifact.folder, "", "--n-predict", 256, "--temperature", 0, "--json")
    ran = cli(*words)
    assert ran.status == 0, ran.err
    assert json.loads(ran.out.splitlines()[-1])["text"] == story.rstrip("\n")
