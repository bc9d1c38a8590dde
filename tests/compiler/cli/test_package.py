"""qcc package web: what is in the site, whose folder it may replace, and how it is served."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qcc.runtime.artifact import Artifact, library_entry, write_manifest
from qcc.runtime.errors import QccError
from qcc.runtime.manifest import read_manifest

METADATA = {
    "model_type": "llama",
    "context_window_size": 512,
    "sliding_window_size": -1,
    "params": [{"name": "w", "shape": [1024, 1024], "dtype": "float32"}],
    "kv_cache": {"num_hidden_layers": 2},
    "memory_usage": {"embed": 1000, "prefill": 2 * 2**20, "decode": 4000, "batch_decode": 2**30},
    "qcc": {
        "page_size": 16,
        "compute_dtype": "float32",
        "kv_storages": {"f32": {"query_heads": 4, "token_values": 256}},
    },
}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, bundled: Path) -> Path:
    """The bundled model, quantized, with a library that is one in name only."""
    from qcc.compiler.cli import main

    source = tmp_path_factory.mktemp("source")
    shutil.copytree(bundled, source / "tiny")
    (source / "tiny" / "LICENSE.txt").write_text("You may.", encoding="utf-8")
    out = source / "artifact"
    assert main(["convert", str(source / "tiny"), "--quant", "q4f16_1", "-o", str(out)]) == 0
    library = out / "lib" / "webgpu.wasm"
    library.parent.mkdir()
    library.write_bytes(b"\0asm\1\0\0\0" + json.dumps(METADATA).encode() + b"\0rest")
    requires = {"machine": "wasm32", "flags": [], "features": ["shader-f16"]}
    manifest = {k: v for k, v in read_manifest(out).items() if k not in ("format", "qcc", "tvm")}
    entry = library_entry(out, library, requires)
    write_manifest(out, {**manifest, "libraries": {"webgpu": entry}})
    return out


@pytest.fixture(scope="module")
def npm(cache: Path) -> None:
    """The npm packages in the tests' cache; skip without node, npm or a network."""
    from qcc.targets.webgpu.bundle import bundle

    try:
        bundle()
    except QccError as err:
        if not any(text in str(err) for text in ("apt-get install", "needs the network")):
            raise
        pytest.skip(str(err))


@pytest.fixture(scope="module")
def site(artifact: Path, npm: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It, packaged."""
    from qcc.compiler.cli import main

    out = tmp_path_factory.mktemp("package") / "site"
    assert main(["package", "web", str(artifact), "-o", str(out)]) == 0
    return out


def test_what_is_in_a_site(site: Path, artifact: Path) -> None:
    """The page, the library, the model in WebLLM's layout, a record that finds it."""
    record = json.loads((site / "model-record.json").read_text(encoding="utf-8"))
    assert record["model_id"] == "tiny-q4f16_1"
    assert record["required_features"] == ["shader-f16"]
    # Weights 4 MiB, 528 tokens in 2 layers of 256 numbers, the largest of the functions.
    megabytes = (4 * 2**20 + 528 * 2 * 256 * 4 + 2 * 2**20) / 2**20
    assert record["vram_required_MB"] == round(megabytes, 1)
    folder = site / record["model"] / "resolve" / "main"
    assert (site / record["model_lib"]).read_bytes().startswith(b"\0asm")
    for shard in Artifact.open(artifact).shards:
        assert hashlib.md5((folder / shard.file).read_bytes()).hexdigest() == shard.md5
    listed = {*record["qcc"]["files"]}
    assert {"mlc-chat-config.json", "tensor-cache.json", "tokenizer.json"} <= listed
    assert all((folder / name).is_file() for name in listed)
    assert not (folder / "qcc.json").exists()
    page = (site / "index.html").read_text(encoding="utf-8")
    assert 'src="page.js"' in page and "http:" not in page.replace("http://www.w3.org/2000/svg", "")
    for name in ("page.js", "page.css", "qcc.js", "qcc.d.ts"):
        assert (site / name).stat().st_size > 500
    assert "./qcc.js" in (site / "page.js").read_text(encoding="utf-8")


def test_licences(site: Path) -> None:
    """Of every package in the bundle, of TVM, of ours, and the checkpoint's own."""
    folder = site / "licences"
    assert (folder / "model" / "LICENSE.txt").read_text(encoding="utf-8") == "You may."
    for name in ("qcc", "apache-tvm", "huggingface/jinja", "huggingface/tokenizers"):
        texts = [path.read_text(encoding="utf-8") for path in (folder / name).glob("LICENSE*")]
        assert any("opyright" in text for text in texts), name
    assert (folder / "apache-tvm" / "NOTICE").is_file()


def test_weights_are_not_copied(site: Path, artifact: Path) -> None:
    """On one disk a shard has two names."""
    shard = Artifact.open(artifact).shards[0].file
    found = next(site.glob(f"models/*/resolve/main/{shard}"))
    assert found.stat().st_ino == (artifact / shard).stat().st_ino


def test_again_and_without_npm(
    cli: Callable[..., Any], site: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site is replaced whole, and what is cached needs no npm."""
    (site / "stale.txt").write_text("x", encoding="utf-8")
    monkeypatch.setenv("PATH", "/nowhere")
    ran = cli("package", "web", artifact, "-o", site, "--name", "My model!", "--json")
    assert ran.status == 0, ran.err
    facts = json.loads(ran.out)
    assert facts["model_id"] == "My-model" and facts["path"] == str(site)
    assert facts["bytes"] == sum(p.stat().st_size for p in site.rglob("*") if p.is_file())
    assert not (site / "stale.txt").exists()
    assert [path.name for path in (site / "models").iterdir()] == ["My-model"]
    assert [path.name for path in site.parent.iterdir()] == [site.name]


@pytest.mark.parametrize("missing", ["node", "npm"])
def test_a_missing_program(
    cli: Callable[..., Any],
    artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
) -> None:
    """One line names Debian's packages, and nothing is left."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in {"node", "npm"} - {missing}:
        if found := shutil.which(name):
            (programs / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("QCC_CACHE", str(tmp_path / "cache"))
    if missing == "node":  # npm is a script for node: what it installed is there
        modules = tmp_path / "modules"
        modules.mkdir()
        monkeypatch.setattr("qcc.targets.webgpu.bundle.node_modules", lambda _: modules)
    ran = cli("package", "web", artifact, "-o", tmp_path / "site")
    assert f"needs {missing}, which is not installed: apt-get install nodejs npm" in ran.error()
    assert not (tmp_path / "site").exists()


def test_no_network(
    cli: Callable[..., Any],
    artifact: Path,
    npm: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first time npm needs it; one line, and nothing half installed is kept."""
    monkeypatch.setenv("QCC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NPM_CONFIG_CACHE", str(tmp_path / "npm"))
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "http://127.0.0.1:9/")
    ran = cli("package", "web", artifact, "-o", tmp_path / "site")
    assert "npm cannot install the page's packages" in ran.error()
    assert "needs the network" in ran.error()
    assert not (tmp_path / "site").exists()
    assert not any((tmp_path / "cache" / "web").iterdir())


def test_folders_that_are_not_ours(
    cli: Callable[..., Any], artifact: Path, npm: None, tmp_path: Path
) -> None:
    """They are left as they are, unless --force says otherwise; home and work never go."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("Dear", encoding="utf-8")
    assert "no site of qcc" in cli("package", "web", artifact, "-o", mine).error()
    assert (mine / "letter.txt").exists()
    assert cli("package", "web", artifact, "-o", mine, "--force").status == 0
    assert not (mine / "letter.txt").exists() and (mine / "index.html").exists()
    for folder in (artifact, artifact.parent, Path.cwd(), Path.home()):
        error = cli("package", "web", artifact, "-o", folder, "--force").error()
        assert "holds more than the site" in error
    file = tmp_path / "file"
    file.write_text("x", encoding="utf-8")
    assert "that is a file" in cli("package", "web", artifact, "-o", file).error()


def test_refusals(cli: Callable[..., Any], artifact: Path, tmp_path: Path, bundled: Path) -> None:
    """Other kinds, folders that are no artifact, artifacts without a library for browsers."""
    out = tmp_path / "site"
    assert "'webb' (did you mean 'web'?)" in cli("package", "webb", artifact, "-o", out).error()
    assert "not a qcc artifact" in cli("package", "web", bundled, "-o", out).error()
    assert "no such folder" in cli("package", "web", tmp_path / "none", "-o", out).error()
    bare = tmp_path / "bare"
    assert cli("convert", bundled, "-o", bare).status == 0
    error = cli("package", "web", bare, "-o", out).error()
    assert "no library for browsers" in error and "--target webgpu" in error
    assert "a port is 0 to 65535" in (
        cli("package", "web", artifact, "-o", out, "--serve", 70000).error()
    )
    assert not out.exists()


def test_a_damaged_shard(cli: Callable[..., Any], artifact: Path, tmp_path: Path) -> None:
    """It is found before anything is written."""
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    shard = copy / "params_shard_0.bin"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    assert "damaged" in cli("package", "web", copy, "-o", tmp_path / "site").error()
    assert not (tmp_path / "site").exists()


@pytest.fixture
def served(
    artifact: Path, npm: None, tmp_path: Path, environment: SimpleNamespace
) -> Iterator[str]:
    """The URL of `qcc package web --serve`, in a process of its own."""
    words = ["package", "web", artifact, "-o", tmp_path / "site", "--serve", "0", "--json"]
    command = [sys.executable, "-m", "qcc.compiler.cli", *map(str, words)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=environment.cwd, env=environment.env
    )
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())["url"]
    finally:
        process.send_signal(2)
        assert process.wait(timeout=20) == 0


def test_served(served: str) -> None:
    """Types, CORS, no second copy of weights in the browser's HTTP cache, no listings."""
    types = {"": "text/html", "qcc.js": "text/javascript", "page.css": "text/css"}
    types["model-record.json"] = "application/json"
    for name, kind in types.items():
        with urllib.request.urlopen(served + name) as answer:
            assert answer.headers.get_content_type() == kind
            assert answer.headers["Access-Control-Allow-Origin"] == "*"
            assert answer.headers["Cache-Control"] == "no-cache"
            data = answer.read()
    record = json.loads(data)
    with urllib.request.urlopen(served + record["model_lib"]) as answer:
        assert answer.headers["Content-Type"] == "application/wasm"
        since = {"If-Modified-Since": answer.headers["Last-Modified"]}
    again = urllib.request.Request(served + record["model_lib"], headers=since)
    shard = f"{served}{record['model']}/resolve/main/params_shard_0.bin"
    with urllib.request.urlopen(shard) as answer:
        assert answer.headers["Cache-Control"] == "no-store"
    statuses = []
    for request in (again, f"{served}models/", f"{served}../../etc/passwd"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request)
        statuses.append(caught.value.code)
    assert statuses == [304, 404, 404]


def test_a_port_that_is_taken(
    cli: Callable[..., Any], served: str, artifact: Path, tmp_path: Path
) -> None:
    """One line, before the work."""
    port = served.rsplit(":", 1)[1].rstrip("/")
    ran = cli("package", "web", artifact, "-o", tmp_path / "other", "--serve", port)
    assert "in use" in ran.error()
    assert not (tmp_path / "other").exists()


def test_hub_links_are_followed(
    cli: Callable[..., Any], artifact: Path, npm: None, tmp_path: Path
) -> None:
    """An artifact of symbolic links makes a site of files."""
    linked = tmp_path / "linked"
    for path in artifact.rglob("*"):
        if path.is_file():
            target = linked / path.relative_to(artifact)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(path, target)
    assert cli("package", "web", linked, "-o", tmp_path / "site").status == 0
    assert not any(path.is_symlink() for path in (tmp_path / "site").rglob("*"))
