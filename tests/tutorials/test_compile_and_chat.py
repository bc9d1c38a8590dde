"""Tutorial 1 runs as it stands, as a program and from Python."""

import os
import subprocess
import sys


def test_the_program_tells_a_story_and_answers(tmp_path):
    """`python -m` on the bundled model: every step prints, and the chat knows its question."""
    environment = {**os.environ, "QCC_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "qcc.tutorials.compile_and_chat"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=True,
    )
    for step in ("1. Compile", "2. Load", "3. Generate", "4. Chat"):
        assert step in done.stdout
    story = done.stdout.split("3. Generate\n")[1]
    assert story.strip().startswith("Once upon a time, there was")
    chat = done.stdout.split("4. Chat\n")[1]
    assert "Mia" in chat.split("> Tell me a story about a fox named Mia.")[1]


def test_greedy_text_is_the_same_each_time(tmp_path, monkeypatch):
    """Temperature 0 depends on nothing but the model."""
    monkeypatch.setenv("QCC_CACHE", str(tmp_path / "cache"))
    from qcc.tutorials.compile_and_chat import tutorial
    from qcc.tutorials.tiny import MODEL_DIR

    first = tutorial(str(MODEL_DIR), tmp_path / "artifact")
    again = tutorial(str(MODEL_DIR), tmp_path / "artifact")  # the folder is reused
    assert first == again
    assert all(first)
