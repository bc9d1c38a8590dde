"""ShardWriter: the bytes of CONTRACTS section 2, and disks that are full."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qcc.compiler.weights import shards
from qcc.compiler.weights.shards import ShardWriter
from qcc.compiler.weights.spec import StoredTensor
from qcc.runtime import artifact
from qcc.runtime.errors import QccError


def tensor(name: str, array: Any) -> tuple[StoredTensor, Any]:
    return StoredTensor(name, array.shape, array.dtype.name), array


def write(folder: Path, tensors: list[tuple[StoredTensor, Any]], shard_bytes: int) -> Any:
    """Write tensors in chunks of rows; returns tensor-cache.json."""
    with ShardWriter(folder, 0, shard_bytes) as writer:
        for stored, array in tensors:
            writer.add(stored, np.array_split(array, 3))
        writer.finish(num_weights=1000)
    return json.loads((folder / "tensor-cache.json").read_text())


TENSORS = [
    tensor("a", np.arange(30, dtype=np.uint32).reshape(5, 6)),  # 120 bytes
    tensor("b", np.arange(7, dtype=np.float16)),  # 14
    tensor("big", np.arange(100, dtype=np.float32).reshape(4, 25)),  # 400
    tensor("c", np.arange(9).astype(ml_dtypes.bfloat16)),  # 18
    tensor("d", np.arange(40, dtype=np.uint32).reshape(2, 20)),  # 160
    tensor("e", np.arange(10, dtype=np.float32)),  # 40
]


def test_the_files_are_the_contracts(tmp_path: Path) -> None:
    cache = write(tmp_path, TENSORS, 200)
    assert cache["metadata"] == {
        "ParamSize": 6,
        "ParamBytes": 752.0,
        "BitsPerParam": 752 * 8 / 1000,
    }
    assert list(cache) == ["metadata", "records"]
    layout = [[record["name"] for record in shard["records"]] for shard in cache["records"]]
    assert layout == [["a", "b"], ["big"], ["c", "d"], ["e"]]
    arrays = {stored.name: array for stored, array in TENSORS}
    for i, shard in enumerate(cache["records"]):
        assert list(shard) == ["dataPath", "format", "nbytes", "md5sum", "records"]
        assert shard["dataPath"] == f"params_shard_{i}.bin" and shard["format"] == "raw-shard"
        data = (tmp_path / shard["dataPath"]).read_bytes()
        assert shard["nbytes"] == len(data)
        assert shard["md5sum"] == hashlib.md5(data).hexdigest()
        assert data == b"".join(arrays[record["name"]].tobytes() for record in shard["records"])
        at = 0
        for record in shard["records"]:
            array = arrays[record["name"]]
            assert record == {
                "name": record["name"],
                "shape": list(array.shape),
                "dtype": array.dtype.name,
                "format": "raw",
                "nbytes": array.nbytes,
                "byteOffset": at,
            }
            at += array.nbytes


def test_tvm_reads_them(tmp_path: Path) -> None:
    """TVM's own loader of the format, an outside checker."""
    tvm = pytest.importorskip("tvm")
    wanted = [item for item in TENSORS if item[0].dtype != "bfloat16"]
    write(tmp_path, wanted, 200)
    load = tvm.get_global_func("vm.builtin.tensor_cache.load", allow_missing=True)
    get = tvm.get_global_func("vm.builtin.tensor_cache.get", allow_missing=True)
    if load is None or get is None:
        pytest.skip("this TVM has no tensor cache")
    load(str(tmp_path), int(tvm.cpu().dlpack_device_type()), 0)
    for stored, array in wanted:
        np.testing.assert_array_equal(get(stored.name).numpy(), array)


def test_default_shards_are_32_mib(tmp_path: Path) -> None:
    mega = np.zeros(1 << 20, np.uint32)  # 4 MiB
    with ShardWriter(tmp_path, 0) as writer:
        for i in range(9):
            writer.add(StoredTensor(f"t{i}", mega.shape, "uint32"), [mega])
        writer.finish(1)
    sizes = [(tmp_path / f"params_shard_{i}.bin").stat().st_size for i in range(2)]
    assert sizes == [32 << 20, 4 << 20]


def test_old_shards_go(tmp_path: Path) -> None:
    write(tmp_path, TENSORS, 200)
    (tmp_path / "qcc.json").write_text("{}")
    (tmp_path / "README").write_text("kept")
    write(tmp_path, TENSORS[:1], 200)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["README", "params_shard_0.bin", "tensor-cache.json"]


def test_too_little_space_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=5_000_000)
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(QccError) as caught:
        ShardWriter(tmp_path / "out", 7_500_000)
    assert "the weights need 8 MB, the disk has 5 MB free; free some" in str(caught.value)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(QccError, match="cannot make: Not a directory"):
        ShardWriter(tmp_path / "file" / "out", 0)


class FullFile:
    """A file that takes some bytes and then meets a full disk."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: Any) -> None:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.file.write(data)

    def close(self) -> None:
        self.file.close()


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, TENSORS[:1], 200)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real = Path.open

    def limited(self: Path, *args: Any, **kwargs: Any) -> Any:
        file = real(self, *args, **kwargs)
        return FullFile(file, 300) if "params_shard_1" in self.name else file

    monkeypatch.setattr(Path, "open", limited)
    with pytest.raises(QccError) as caught:
        write(tmp_path, TENSORS, 200)
    assert "params_shard_1.bin: cannot write: no space left (" in str(caught.value)
    assert "MB are free); free some or choose another folder" in str(caught.value)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs root and the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    big = np.zeros(2 << 20, np.uint8).view(np.uint32)
    with (
        pytest.raises(QccError, match=r"cannot write: no space left \(\d MB are free\)"),
        ShardWriter(small_disk, 0) as writer,
    ):
        writer.add(StoredTensor("big", big.shape, "uint32"), np.array_split(big, 64))
        writer.finish(1)
    assert list(small_disk.iterdir()) == []
    with pytest.raises(QccError, match=r"cannot write: no space left"):
        artifact.write_file(small_disk / "lib.so", b"x" * (2 << 20))
    assert list(small_disk.iterdir()) == []
