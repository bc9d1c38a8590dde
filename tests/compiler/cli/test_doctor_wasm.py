"""qcc doctor about libraries for browsers: what is missing, and nothing is built to find out."""

from pathlib import Path

import pytest

from qcc.compiler.cli import doctor


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH; the cache is empty."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("QCC_CACHE", str(tmp_path / "cache"))
    return folder


def add(folder: Path, name: str, version: str) -> None:
    """A program that tells a version and can do no more."""
    path = folder / name
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "Program (stand-in) {version} ()"\n')
    path.chmod(0o755)


def test_missing_programs_are_named(programs: Path) -> None:
    """One after the other, with Debian's package; a C compiler is not among them."""
    assert doctor.check_wasm() == {"emcc": None, "wasm-ld": None, "wasm-opt": None}
    answer = doctor.try_target("webgpu", None)
    assert answer == (False, False, "no emcc; get it: apt-get install emscripten")
    add(programs, "emcc", "3.1.6")
    answer = doctor.try_target("webgpu", None)
    assert answer == (False, False, "no wasm-ld; get it: apt-get install lld")


def test_nothing_is_built_to_find_out(programs: Path, tmp_path: Path) -> None:
    """The versions are told; the runtime's two minutes are left to the first compile."""
    for name, version in {"emcc": "3.1.6", "wasm-ld-15": "15.0.7", "wasm-opt": "108"}.items():
        add(programs, name, version)
    assert doctor.check_wasm() == {"emcc": "3.1.6", "wasm-ld": "15.0.7", "wasm-opt": "108"}
    builds, runs, note = doctor.try_target("webgpu", None)
    assert not builds and not runs
    assert note == "the first compile builds the wasm runtime, in about 2 minutes"
    assert not list((tmp_path / "cache").rglob("*.o"))
