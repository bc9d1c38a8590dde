"""Building and loading the Vulkan add-on: what is missing is said in one line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from qcc.runtime.errors import QccError
from qcc.runtime.native import build
from qcc.runtime.native.vulkan import choose, load_vulkan


def refused(fresh: Path) -> str:
    """The message with which loading ends, where nothing was built before and nothing is left."""
    with pytest.raises(QccError) as caught:
        load_vulkan.__wrapped__()
    assert not [path for path in fresh.rglob("*") if path.is_file()]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that holds nothing."""
    monkeypatch.setenv("QCC_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "cache"


def test_without_a_compiler(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of the package is in the message."""
    pytest.importorskip("wgpu", reason="PyPI's wgpu is not installed")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt install g++" in refused(fresh)


def test_without_wgpu(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Likewise."""
    monkeypatch.setitem(sys.modules, "wgpu", None)
    assert "pip install 'qcc[vulkan]'" in refused(fresh)


def test_a_compiler_that_fails(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error is quoted, and nothing of what it wrote is left."""
    pytest.importorskip("wgpu", reason="PyPI's wgpu is not installed")
    compiler = tmp_path / "broken-c++"
    compiler.write_text(
        '#!/bin/sh\neval "out=\\${$#}"\necho half >"$out"\necho "x: error: no" >&2\nexit 1\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert "x: error: no" in refused(fresh)


def test_the_sources_are_all_listed() -> None:
    """A file that is not compiled would lack at load time."""
    assert {path.name for path in build.FOLDER.glob("*.cc")} == set(build.SOURCES)


def test_an_adapter_by_name(vulkan: Any) -> None:
    """`vulkan` is the first; a number too high lists those that there are."""
    adapters = load_vulkan()
    assert choose("vulkan") == choose("vulkan:0") == adapters[0]
    with pytest.raises(QccError, match=f"no adapter {len(adapters)}.*0 = "):
        choose(f"vulkan:{len(adapters)}")
    with pytest.raises(QccError, match="vulkan or vulkan:i"):
        choose("vulkan:x")
