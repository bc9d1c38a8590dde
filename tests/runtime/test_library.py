"""A library is the file that is on the disk now; one that does not load says why."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcc.runtime import LLM
from qcc.runtime.engine.library import Library
from qcc.runtime.errors import QccError


def test_a_library_that_was_replaced_runs_its_new_code(
    tmp_path: Path, checkpoint: Any, compiled: Any, some_ids: Any
) -> None:
    """dlopen gives out again what this process loaded under a name: the old rotation."""
    rope = {"rope_type": "default", "rope_theta": 100.0}
    before, after = (
        compiled(checkpoint("llama")),
        compiled(checkpoint("llama", rope_parameters=rope)),
    )
    ids, folder = some_ids(20), tmp_path / "artifact"
    shutil.copytree(before.artifact.folder, folder)
    old = LLM(folder, precision="high")
    np.testing.assert_array_equal(old.logits(ids), before.logits(ids))
    new = tmp_path / "new"
    shutil.copytree(after.artifact.folder, new)
    for path in filter(Path.is_file, new.rglob("*")):
        os.replace(path, folder / path.relative_to(new))  # as a compile publishes
    found = LLM(folder, precision="high").logits(ids)
    np.testing.assert_array_equal(found, after.logits(ids))
    assert np.abs(found - before.logits(ids)).max() > 0.1
    np.testing.assert_array_equal(old.logits(ids), before.logits(ids))


def test_what_does_not_load_is_named_by_its_own_path(tmp_path: Path) -> None:
    path = tmp_path / "cpu.so"
    path.write_bytes(b"no code")
    with pytest.raises(QccError, match=f"^{path}: does not load \\(.*{path}: ") as caught:
        Library(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(QccError, match=f"^{path}x: does not load .*No such file"):
        Library(Path(f"{path}x"))
