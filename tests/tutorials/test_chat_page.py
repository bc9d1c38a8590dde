"""Tutorial 5 makes a site of the bundled model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qcc.runtime.errors import QccError
from qcc.targets import find_target
from qcc.tutorials.chat_page import tutorial
from qcc.tutorials.tiny import MODEL_DIR


def test_a_site_with_all_that_its_record_names(tmp_path: Path, capsys: Any) -> None:
    if lacks := find_target("webgpu").lacks():
        pytest.skip(lacks)
    site = tmp_path / "site"
    try:
        record = tutorial(str(MODEL_DIR), tmp_path / "artifact", site, "q4f32_1")
    except QccError as err:
        if "apt-get install" not in str(err) and "needs the network" not in str(err):
            raise
        pytest.skip(str(err))
    assert record["required_features"] == []
    model = site / str(record["model"]) / "resolve" / "main"
    assert (site / str(record["model_lib"])).read_bytes()[:4] == b"\0asm"
    for name in ("tensor-cache.json", "mlc-chat-config.json", "tokenizer.json"):
        assert (model / name).is_file()
    for name in ("index.html", "qcc.js", "qcc.d.ts", "licences"):
        assert (site / name).exists()
    said = capsys.readouterr().out
    assert all(step in said for step in ("1. Compile", "2. Package", "3. What other clients load"))
