"""The artifact folder: what opens, what is refused and in which words, checksums, whole files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qcc.runtime import artifact as module
from qcc.runtime import files
from qcc.runtime.artifact import Artifact
from qcc.runtime.errors import QccError

TENSORS: dict[str, tuple[str, Any]] = {
    "a.q_weight": ("uint32", np.arange(12, dtype=np.uint32).reshape(3, 4)),
    "a.q_scale": ("float16", np.arange(3, dtype=np.float16).reshape(3, 1)),
    "b.weight": ("float32", np.linspace(-1, 1, 5, dtype=np.float32)),
    "c.weight": ("bfloat16", np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)),
}


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def shard(folder: Path, index: int, names: list[str]) -> dict[str, Any]:
    """Write a shard; returns its entry."""
    records, data = [], b""
    for name in names:
        dtype, array = TENSORS[name]
        record = {"name": name, "shape": list(array.shape), "dtype": dtype, "format": "raw"}
        records.append({**record, "nbytes": array.nbytes, "byteOffset": len(data)})
        data += array.tobytes()
    path = folder / f"params_shard_{index}.bin"
    path.write_bytes(data)
    entry = {"dataPath": path.name, "format": "raw-shard", "nbytes": len(data)}
    return {**entry, "md5sum": md5(data), "records": records}


FIELDS: dict[str, Any] = {
    "source": {"name": "tiny", "sha256": "00"},
    "scheme": "q4f16_1",
    "method": "rtn",
    "tensors": {"a.q_weight": {"bits": 4, "group": 32, "dtype": "float16", "layout": "NK"}},
    "sizes": {"context_window_size": 512},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A good artifact with two shards and two libraries."""
    monkeypatch.setenv("QCC_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "artifact"
    (folder / "lib").mkdir(parents=True)
    names = list(TENSORS)
    entries = [shard(folder, 0, names[:2]), shard(folder, 1, names[2:])]
    (folder / "tensor-cache.json").write_text(json.dumps({"metadata": {}, "records": entries}))
    (folder / "mlc-chat-config.json").write_text('{"version": "0.1.0"}')
    libraries = {}
    for name in ("cpu-sapphirerapids", "webgpu"):
        path = folder / "lib" / f"{name}.so"
        path.write_bytes(name.encode() * 10)
        libraries[name] = module.library_entry(folder, path)
    module.write_manifest(folder, {**FIELDS, "libraries": libraries})
    return folder


def error(folder: Path, **options: Any) -> str:
    """The text of the one-line error that opening a folder gives."""
    with pytest.raises(QccError) as caught:
        Artifact.open(folder, **options)
    assert "\n" not in str(caught.value)
    assert "compile the model again with qcc compile" in str(caught.value) or not folder.is_dir()
    return str(caught.value)


def edit(path: Path, change: Any) -> None:
    """Rewrite a JSON file after `change(data)`."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_a_good_folder(folder: Path) -> None:
    artifact = Artifact.open(str(folder))
    assert artifact.manifest.scheme == "q4f16_1"
    assert artifact.manifest.sizes == {"context_window_size": 512}
    assert artifact.chat_config == {"version": "0.1.0"}
    assert list(artifact.records) == list(TENSORS)
    record = artifact.records["a.q_scale"]
    assert (record.shard, record.offset, record.nbytes) == ("params_shard_0.bin", 48, 6)
    for name, (dtype, wanted) in TENSORS.items():
        got = artifact.read(name)
        assert got.dtype.name == dtype and got.shape == wanted.shape
        np.testing.assert_array_equal(got, wanted)
    with pytest.raises(QccError, match=r"tensor-cache.json: no tensor 'x'"):
        artifact.read("x")


def test_bfloat16_without_ml_dtypes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    got = Artifact.open(folder).read("c.weight")
    np.testing.assert_array_equal(got, TENSORS["c.weight"][1].view(np.uint16))


def test_a_float32_stored_as_bfloat16(folder: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        record = data["records"][1]["records"][1]
        record.update(dtype="float32", format="f32-to-bf16")

    edit(folder / "tensor-cache.json", change)
    got = Artifact.open(folder).read("c.weight")
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, TENSORS["c.weight"][1].astype(np.float32))


def test_libraries(folder: Path) -> None:
    artifact = Artifact.open(folder)
    assert artifact.library("cpu") == folder / "lib" / "cpu-sapphirerapids.so"
    assert artifact.library("cpu-sapphirerapids") == artifact.library("cpu")
    assert artifact.library("webgpu") == folder / "lib" / "webgpu.so"
    with pytest.raises(QccError, match="no library for 'cuda'; it has: cpu-sapphirerapids, webgpu"):
        artifact.library("cuda")
    with pytest.raises(QccError, match=r"'cpu-znver4'; .* --target cpu --mcpu znver4 -o "):
        artifact.library("cpu-znver4")


def test_the_library_that_fits_this_machine_is_chosen(folder: Path, monkeypatch: Any) -> None:
    """Of several libraries for a target: runnable here, of the widest instructions; or as named."""

    def change(data: dict[str, Any]) -> None:
        entry = data["libraries"].pop("cpu-sapphirerapids")
        for name, machine, flags, rank in (
            ("cpu-old", "x86_64", ["avx2", "fma"], 1),
            ("cpu-new", "x86_64", ["avx512f"], 3),
            ("cpu-same", "x86_64", ["avx512f", "avx2"], 3),
            ("cpu-newest", "x86_64", ["avx2", "avx512f", "amx_tile"], 5),
            ("cpu-arm", "aarch64", [], 9),
        ):
            requires = {"machine": machine, "flags": flags}
            facts = {"file": f"lib/{name}.so", "requires": requires, "isa": "x", "rank": rank}
            data["libraries"][name] = {**entry, **facts}
            shutil.copy(folder / entry["file"], folder / "lib" / f"{name}.so")

    edit(folder / "qcc.json", change)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("qcc.runtime.machine.cpu_flags", lambda: {"avx2", "avx512f", "fma"})
    artifact = Artifact.open(folder)
    assert artifact.library("cpu").name == "cpu-same.so"
    assert artifact.library("cpu-new").name == "cpu-new.so"
    assert artifact.library("cpu-old").name == "cpu-old.so"
    with pytest.raises(QccError, match="cpu-newest needs amx_tile; add one with qcc compile"):
        artifact.library("cpu-newest")
    with pytest.raises(QccError, match="cpu-arm needs an aarch64 processor"):
        artifact.library("cpu-arm")
    monkeypatch.setattr("qcc.runtime.machine.cpu_flags", lambda: {"sse2"})
    with pytest.raises(QccError, match="this machine can run: cpu-old needs avx2, fma; cpu-new"):
        artifact.library("cpu")
    monkeypatch.setattr("qcc.runtime.machine.cpu_flags", lambda: {"avx2", "fma"})
    assert artifact.library("cpu").name == "cpu-old.so"


def test_what_is_no_artifact(folder: Path, tmp_path: Path) -> None:
    assert "none: no such folder" in error(tmp_path / "none")
    for name in ("mlc-chat-config.json", "tensor-cache.json"):
        (folder / name).rename(folder / "away")
        assert f"{name} is missing" in error(folder)
        (folder / name).write_text("{")
        assert f"{name}: not readable as JSON" in error(folder)
        (folder / name).write_text("[1]")
        assert f"{name}: holds no JSON object" in error(folder)
        (folder / "away").rename(folder / name)
    (folder / "qcc.json").write_bytes(b"\xff\xff")
    assert "qcc.json: not readable as JSON" in error(folder)
    (folder / "qcc.json").unlink()
    assert "not a qcc artifact (or an interrupted compile): it has no qcc.json" in error(folder)


def test_versions(folder: Path) -> None:
    running = module.running_versions()
    assert set(running) == {"qcc", "tvm"}
    text = error(folder, versions={**running, "tvm": "9.9"})
    assert f"compiled with tvm {running['tvm']!r}, but '9.9' is installed" in text
    text = error(folder, versions={**running, "qcc": "9.9"})
    assert f"compiled with qcc {running['qcc']!r}, but '9.9' is installed" in text
    edit(folder / "qcc.json", lambda data: data.update(format=2))
    assert "format 2, this qcc reads format 1" in error(folder)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d.pop("libraries"), "key 'libraries' is missing"),
        (lambda d: d.pop("scheme"), "key 'scheme' is missing"),
        (lambda d: d.update(extra=1), "unknown keys ['extra']"),
        (lambda d: d.update(sizes=3), "sizes is no object"),
        (lambda d: d.update(sizes={"a": 1.5}), "sizes[a] is 1.5, no whole number"),
        (lambda d: d.update(scheme=3), "scheme is no string"),
        (lambda d: d.update(libraries=[]), "items"),
        (lambda d: d.update(libraries={"cpu": {"file": "x"}}), "sha256"),
        (lambda d: d["libraries"]["webgpu"].update(bytes="9"), "libraries[webgpu] has no size"),
        (lambda d: d["libraries"]["webgpu"].update(file=None), "libraries[webgpu] has no file"),
        (lambda d: d["libraries"]["webgpu"].update(rank="1"), "libraries[webgpu] has an isa or a"),
        (lambda d: d["libraries"]["webgpu"].update(file="../x.so"), "'../x.so' is not the name of"),
        (lambda d: d["libraries"]["webgpu"].update(file="/x.so"), "'/x.so' is not the name of"),
        (lambda d: d["libraries"]["webgpu"].update(file="lib/y.so"), "lib/y.so: is missing"),
        (lambda d: d["libraries"]["webgpu"].update(bytes=61), "has 60 bytes, recorded are 61"),
    ],
)
def test_a_bad_qcc_json(folder: Path, change: Any, text: str) -> None:
    edit(folder / "qcc.json", change)
    assert text in error(folder)


def first(data: dict[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = data["records"][0]["records"][0]
    return record


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d.pop("records"), "key 'records' is missing"),
        (lambda d: d.update(records={"a": 1}), "tensor-cache.json"),
        (lambda d: d["records"][0].update(nbytes=53), "has 54 bytes, recorded are 53"),
        (lambda d: d["records"][0].update(nbytes=1e999), "tensor-cache.json"),
        (lambda d: d["records"][0].update(format="zip"), "format 'zip' is not raw-shard"),
        (lambda d: d["records"][0].update(dataPath="../x"), "'../x' is not the name of a file"),
        (lambda d: d["records"][0].update(dataPath="/x"), "'/x' is not the name of a file"),
        (lambda d: d["records"][0].update(dataPath="a\nb"), "'a\\nb' is not the name of a file"),
        (lambda d: d["records"][0].update(dataPath=""), "'' is not the name of a file"),
        (lambda d: d["records"][0].update(dataPath="x.bin"), "x.bin: is missing; copy it again"),
        (lambda d: first(d).update(dtype="int4"), "dtype 'int4', allowed: uint32, float32"),
        (lambda d: first(d).update(format="f32-to-bf16"), "f32-to-bf16 with dtype uint32"),
        (lambda d: first(d).update(format="zip"), "format 'zip', allowed: raw, f32-to-bf16"),
        (lambda d: first(d).update(shape=[3, 5]), "shape [3, 5] is not 48 bytes"),
        (lambda d: first(d).update(shape=[-3, -4]), "shape [-3, -4] is not 48 bytes"),
        (lambda d: first(d).update(byteOffset=7), "lies outside of params_shard_0.bin"),
        (lambda d: first(d).update(byteOffset=-1), "lies outside of params_shard_0.bin"),
        (lambda d: first(d).update(name="b.weight"), "tensor 'b.weight' appears twice"),
        (lambda d: first(d).pop("shape"), "key 'shape' is missing"),
    ],
)
def test_a_bad_tensor_cache(folder: Path, change: Any, text: str) -> None:
    edit(folder / "tensor-cache.json", change)
    assert text in error(folder)


def test_a_truncated_shard(folder: Path) -> None:
    artifact = Artifact.open(folder)
    path = folder / "params_shard_1.bin"
    path.write_bytes(path.read_bytes()[:-1])
    assert "params_shard_1.bin: has 31 bytes, recorded are 32" in error(folder)
    with pytest.raises(QccError, match=r"params_shard_1.bin: truncated within 'c.weight'"):
        artifact.read("c.weight")


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["params_shard_0.bin", "params_shard_1.bin", "lib/webgpu.so"])
def test_a_flipped_bit(folder: Path, name: str) -> None:
    flip(folder / name, 77)
    with pytest.raises(QccError) as caught:
        Artifact.open(folder).verify()
    text = str(caught.value)
    assert text.startswith(f"{folder / name}: damaged: its ") and "copy it again or compile" in text
    assert "\n" not in text


def test_a_flipped_bit_after_a_good_check(folder: Path) -> None:
    Artifact.open(folder).verify()
    flip(folder / "params_shard_0.bin", 3)
    stat = (folder / "params_shard_0.bin").stat()
    os.utime(folder / "params_shard_0.bin", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(QccError, match=r"params_shard_0\.bin: damaged"):
        Artifact.open(folder).verify()


def test_a_check_is_remembered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, str]] = []
    Artifact.open(folder).verify(lambda *call: seen.append(call))
    assert len(seen) == 4 and seen[-1][0] == seen[-1][1] == 54 + 32 + 180 + 60

    def fail(*_: object) -> str:
        raise AssertionError("read again")

    monkeypatch.setattr(module, "checksum", fail)
    Artifact.open(folder).verify()
    os.utime(folder / "params_shard_0.bin", ns=(0, 0))
    with pytest.raises(AssertionError, match="read again"):
        Artifact.open(folder).verify()


def test_a_cache_that_is_rubbish_or_cannot_be_written(folder: Path) -> None:
    Artifact.open(folder).verify()
    (memory,) = (files.cache_dir() / "verified").iterdir()
    for rubbish in ("[", "[]", '{"params_shard_0.bin": 3}'):
        memory.write_text(rubbish)
        Artifact.open(folder).verify()
    memory.unlink()
    (files.cache_dir() / "verified").rmdir()
    (files.cache_dir() / "verified").write_text("in the way")
    Artifact.open(folder).verify()


def test_cache_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCC_CACHE", "/x/y")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert module.cache_dir() == Path("/x/y")
    monkeypatch.delenv("QCC_CACHE")
    assert module.cache_dir() == Path("/xdg/qcc")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert module.cache_dir() == Path("/home/me/.cache/qcc")


def test_write_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    module.write_file(path, "text é")
    assert path.read_bytes() == "text é".encode()
    module.write_file(path, b"bytes")
    module.write_file(path, lambda file: file.write(b"written"))
    assert path.read_bytes() == b"written"

    def fail(file: Any) -> None:
        file.write(b"half")
        raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        module.write_file(path, fail)
    assert path.read_bytes() == b"written"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(QccError, match="cannot write: No such file or directory"):
        module.write_file(tmp_path / "none" / "file", b"")


def test_kill_9_midway(folder: Path) -> None:
    """The old file stays; the temporary one goes at the next sweep, that of a live process not."""
    code = (
        "import sys, time; from pathlib import Path; from qcc.runtime.artifact import write_file\n"
        "def stall(file):\n"
        "    file.write(b'half'); file.flush(); print('x', flush=True); time.sleep(60)\n"
        "write_file(Path(sys.argv[1]), stall)"
    )
    command = [sys.executable, "-c", code, str(folder / "qcc.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=folder) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"x\n"
        files.remove_stale(folder)
        assert len(list(folder.glob(".qcc.json.tmp-*"))) == 1
        os.kill(child.pid, signal.SIGKILL)
    Artifact.open(folder).verify()
    files.remove_stale(folder)
    assert not list(folder.glob(".*"))


def test_importing_it_is_cheap() -> None:
    code = (
        "import sys; import qcc.runtime.artifact\n"
        "print([m for m in ('tvm', 'torch', 'ml_dtypes', 'qcc.compiler') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
