"""qcc show: checksums first, libraries of other machines, folders that are not there."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def artifact(tmp_path: Path, checkpoint: Any, compiled: Any) -> Path:
    """A copy that may be spoilt."""
    folder = tmp_path / "artifact"
    shutil.copytree(compiled(checkpoint("llama")).artifact.folder, folder)
    return folder


def add_library(folder: Path, code: bytes, **requires: Any) -> None:
    """Write a library lib/cpu-other.so that qcc.json knows, with the right checksum."""
    (folder / "lib/cpu-other.so").write_bytes(code)
    path = folder / "qcc.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    first = next(iter(data["libraries"].values()))
    data["libraries"]["cpu-other"] = {
        **first,
        "file": "lib/cpu-other.so",
        "bytes": len(code),
        "sha256": hashlib.sha256(code).hexdigest(),
        "requires": requires,
    }
    path.write_text(json.dumps(data), encoding="utf-8")


def test_a_damaged_library_is_refused(artifact: Path, cli: Any) -> None:
    path = next(artifact.glob("lib/*.so"))
    code = bytearray(path.read_bytes())
    code[len(code) // 2] ^= 1
    path.write_bytes(code)
    text = cli("show", artifact).error()
    assert f"{path}: damaged: its sha256 is" in text


def test_a_library_of_another_machine_is_noted(artifact: Path, cli: Any) -> None:
    add_library(artifact, b"other code", machine="sparc")
    ran = cli("show", artifact)
    assert ran.status == 0, ran.err
    blocks = ran.out.split("\nlibrary ")
    assert len(blocks) == 3
    assert "note: this machine lacks an sparc processor" in blocks[2]
    assert "total" in blocks[1] and "note" not in blocks[1] and "total" not in blocks[2]
    libraries = json.loads(cli("show", "--json", artifact).out)["libraries"]
    assert libraries["cpu-other"]["note"] == "this machine lacks an sparc processor"
    assert [entry["default"] for entry in libraries.values()] == [True, False]
    first, _ = libraries.values()
    assert f"{first['isa']}, the one taken here)" in blocks[1] and "taken here" not in blocks[2]
    assert "budget" not in libraries["cpu-other"]


def test_the_cache_of_each_storage(artifact: Path, cli: Any) -> None:
    """2 layers, K and V, 2 heads of 16 numbers: in f32, f16, and int8 with a scale of 4 bytes."""
    (library,) = json.loads(cli("show", "--json", artifact).out)["libraries"].values()
    caches, tokens = library["kv_caches"], library["kv_tokens"]
    assert library["budget"]["kv_cache"] == caches["f32"]
    # A page more, and of a chunk of 256 tokens what it works on.
    kept = tokens + 16 + 256 / 2
    assert caches["f32"] - caches["f16"] == kept * 2 * 2 * 2 * 16 * 2
    assert caches["f32"] - caches["int8"] == kept * 2 * 2 * 2 * (16 * 4 - (16 + 4))
    assert f"with --kv int8 {caches['int8'] / 1e6:14,.1f} MB" in cli("show", artifact).out


def test_a_library_without_metadata_is_noted(artifact: Path, cli: Any) -> None:
    add_library(artifact, b"no code")
    ran = cli("show", artifact)
    assert ran.status == 0, ran.err
    assert f"note: {artifact}/lib/cpu-other.so: has no metadata; " in ran.out


def test_a_library_of_another_machine_tells_what_it_needs(artifact: Path, cli: Any) -> None:
    """Of a browser's here; it is read, not run."""
    (cpu,) = (artifact / "lib").glob("*.so")
    add_library(artifact, cpu.read_bytes(), machine="wasm32", features=["shader-f16"])
    other = json.loads(cli("show", "--json", artifact).out)["libraries"]["cpu-other"]
    assert other["note"].startswith("for browsers with WebGPU, shader-f16: qcc package web")
    assert other["budget"]["weights"] > 0


def test_what_is_no_folder_is_taken_for_a_checkpoint(cli: Any, tmp_path: Path) -> None:
    assert "not a hub id of the form organization/name" in cli("show", tmp_path / "none").error()
    assert "qcc.json" in cli("show", tmp_path).error()
