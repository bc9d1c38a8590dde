"""Checkpoint: what it reads, and one line for each way a folder can be wrong."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from qcc.compiler.weights.checkpoint import Checkpoint
from qcc.runtime.errors import QccError

SHARED = Path(__file__).resolve().parents[4] / "shared"
RNG = np.random.default_rng(0)
TENSORS: dict[str, Any] = {
    "a.weight": RNG.standard_normal((6, 10)).astype(np.float32),
    "b.weight": RNG.standard_normal((3, 5)).astype(np.float16),
    "c.weight": RNG.standard_normal((4, 4)).astype(ml_dtypes.bfloat16),
    "d.bias": RNG.standard_normal(7).astype(np.float32),
    "e.scalar": np.array(2.5, np.float32),
}


def error(folder: Path, **options: Any) -> str:
    """The text of the one-line error that opening and reading all of a folder gives."""
    with pytest.raises(QccError) as caught, Checkpoint.open(folder, **options) as checkpoint:
        for name in checkpoint.names:
            checkpoint.read(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def raw_file(path: Path, header: object, data: bytes = b"") -> None:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def sharded(folder: Path) -> dict[str, str]:
    """TENSORS in two shards; returns the weight map, which is not yet written."""
    names = list(TENSORS)
    weight_map = {}
    for i, part in enumerate((names[:2], names[2:])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: TENSORS[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    return weight_map


def write_index(folder: Path, weight_map: object, name: str = "model.safetensors") -> None:
    (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def assert_equals_tensors(checkpoint: Checkpoint) -> None:
    assert sorted(checkpoint.names) == sorted(TENSORS)
    for name, wanted in TENSORS.items():
        assert checkpoint.shape(name) == wanted.shape
        assert checkpoint.dtype(name) == wanted.dtype.name
        got = checkpoint.read(name)
        assert got.dtype == wanted.dtype and got.shape == wanted.shape
        np.testing.assert_array_equal(got, wanted)
        got.reshape(-1)[:1] = 0  # the caller's own memory
    part = checkpoint.read_flat("a.weight", 7, 13)
    np.testing.assert_array_equal(part, TENSORS["a.weight"].reshape(-1)[7:13])
    buffer = np.zeros(64, np.uint8)
    part = checkpoint.read_flat("c.weight", 2, 5, buffer)
    assert np.shares_memory(part, buffer)
    np.testing.assert_array_equal(part, TENSORS["c.weight"].reshape(-1)[2:5])


def test_one_file(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    with Checkpoint.open(tmp_path) as checkpoint:
        assert_equals_tensors(checkpoint)
        assert "a.weight" in checkpoint and "x" not in checkpoint


def test_shards(tmp_path: Path) -> None:
    write_index(tmp_path, sharded(tmp_path))
    with Checkpoint.open(str(tmp_path)) as checkpoint:
        assert_equals_tensors(checkpoint)


def test_a_hub_snapshot_of_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    save_file(TENSORS, blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../blobs/0123")
    with Checkpoint.open(snapshot) as checkpoint:
        assert_equals_tensors(checkpoint)
    (blobs / "0123").unlink()
    assert "model.safetensors: cannot read: No such file" in error(snapshot)


def test_pickled(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    data = {
        name: torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
        if value.dtype == ml_dtypes.bfloat16
        else torch.from_numpy(value)
        for name, value in TENSORS.items()
    }
    data["a.weight"] = data["a.weight"].t().contiguous().t()  # strides of a transpose
    torch.save(data, tmp_path / "pytorch_model.bin")
    text = error(tmp_path)
    assert "pytorch_model.bin: pickled weights; pass --allow-pickle" in text
    with Checkpoint.open(tmp_path, allow_pickle=True) as checkpoint:
        assert_equals_tensors(checkpoint)

    (tmp_path / "pytorch_model.bin").unlink()
    first, second = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
    torch.save({"a.weight": data.pop("a.weight")}, tmp_path / first)
    torch.save(data, tmp_path / second, _use_new_zipfile_serialization=False)  # cannot be mapped
    write_index(tmp_path, {"a.weight": first, **dict.fromkeys(data, second)}, "pytorch_model.bin")
    with Checkpoint.open(tmp_path, allow_pickle=True) as checkpoint:
        assert_equals_tensors(checkpoint)


class Evil:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_runs_no_code(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    mark = tmp_path / "mark"
    torch.save({"a": Evil(mark)}, tmp_path / "pytorch_model.bin")
    assert "it is no pickle of tensors alone" in error(tmp_path, allow_pickle=True)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(mark)))
    assert "it is no pickle of tensors alone" in error(tmp_path, allow_pickle=True)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not a pickle" * 100)
    assert "it is no pickle of tensors alone" in error(tmp_path, allow_pickle=True)
    for damaged in (b"", b"PK\x03\x04" + b"0" * 1000):
        (tmp_path / "pytorch_model.bin").write_bytes(damaged)
        assert "it is truncated or damaged; download" in error(tmp_path, allow_pickle=True)
    torch.save([1, 2], tmp_path / "pytorch_model.bin")
    assert "holds a list, not a dict of tensors" in error(tmp_path, allow_pickle=True)
    assert not mark.exists()


def test_no_folder_and_no_weights(tmp_path: Path) -> None:
    assert "none: no such folder; give a folder with a Hugging Face model" in error(
        tmp_path / "none"
    )
    assert "no weights: it has neither of model.safetensors," in error(tmp_path)


GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("header", "data", "text"),
    [
        (b"{", b"", "bad safetensors header"),
        (b"[" * 100_000, b"", "bad safetensors header"),
        (b"\xff\xfe", b"", "bad safetensors header"),
        ([1], b"", "bad safetensors header: it is no JSON object"),
        ({"a": 1}, b"", "tensor 'a' lacks dtype, shape or data_offsets"),
        ({"a": GOOD}, b"x" * 15, "truncated: tensor 'a' ends at byte"),
        ({"a": {**GOOD, "dtype": "F99"}}, b"x" * 16, "unknown dtype 'F99'"),
        ({"a": {**GOOD, "shape": [2, -2]}}, b"x" * 16, "'-2' is not a whole number >= 0"),
        ({"a": {**GOOD, "shape": [2, 2.0]}}, b"x" * 16, "'2.0' is not a whole number"),
        ({"a": {**GOOD, "shape": [2, 3]}}, b"x" * 16, "F32 [2, 3] has 24 bytes, its offsets span"),
        ({"a": {**GOOD, "shape": [2**62, 2**62]}}, b"x" * 16, "its offsets span 16"),
        ({"a": {**GOOD, "data_offsets": [16]}}, b"x" * 16, "not a list of whole numbers"),
        ({"a": {**GOOD, "data_offsets": [-16, 0]}}, b"x" * 16, "'-16' is not a whole number"),
        (
            {"a": GOOD, "b": {**GOOD, "data_offsets": [8, 24]}},
            b"x" * 24,
            "tensors 'a' and 'b' overlap",
        ),
        (
            b'{"a": 1, "a": 2}',
            b"",
            "bad safetensors header: a key appears twice",
        ),
        (
            {"a\nb": {**GOOD, "shape": [9]}},
            b"x" * 16,
            "tensor 'a\\nb': F32 [9] has 36 bytes",
        ),
        (
            {"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}},
            b"x" * 8,
            "tensor 'a' has dtype F64, allowed: float32, float16, bfloat16; convert the checkpoint",
        ),
        (
            {"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}},
            b"x" * 8,
            "tensor 'a' has dtype F8_E4M3, allowed",
        ),
    ],
)
def test_bad_headers(tmp_path: Path, header: object, data: bytes, text: str) -> None:
    raw_file(tmp_path / "model.safetensors", header, data)
    found = error(tmp_path)
    assert text in found
    assert found.startswith(str(tmp_path / "model.safetensors"))


def test_truncation_at_every_length(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    for size in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        text = error(tmp_path)
        assert "truncated" in text and "download it again" in text, text


def test_other_files_under_the_name(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x7fELF" * 1000)
    assert "no safetensors file: its header would have" in error(tmp_path)
    (tmp_path / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )
    assert "is a Git LFS pointer" in error(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    assert "model.safetensors: cannot read: Is a directory" in error(tmp_path)


def test_a_file_that_shrinks_while_open(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        with (tmp_path / "model.safetensors").open("r+b") as file:
            file.truncate(600)
        with pytest.raises(QccError, match="ends within tensor"):
            for name in checkpoint.names:
                checkpoint.read(name)


def test_bad_indexes(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path)
    last = "model-00002-of-00002.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text("{")
    assert "index.json: not readable as JSON" in error(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert "has no weight_map of tensor names to files" in error(tmp_path)
    for name in ("../x.safetensors", "/etc/x.safetensors", "a\\b.safetensors", 3, "x.bin", ""):
        write_index(tmp_path, {**weight_map, "e.scalar": name})
        text = error(tmp_path)
        assert f"weight_map['e.scalar'] is {name!r}, which is not the name of a .safeten" in text
    write_index(tmp_path, {**weight_map, "new.weight": last})
    text = error(tmp_path)
    assert (
        f"{last}: has no tensor 'new.weight', though model.safetensors.index.json says so" in text
    )
    write_index(tmp_path, weight_map)
    (tmp_path / last).unlink()
    assert f"index.json: its shard {last} is missing; download the model again" in error(tmp_path)


def test_a_tensor_that_is_not_what_is_wanted(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        checkpoint.check("a.weight", (6, 10))
        with pytest.raises(
            QccError, match=r"tensor 'a.weight' has shape \[6, 10\], config.json asks for \[6, 11\]"
        ):
            checkpoint.check("a.weight", (6, 11))
        with pytest.raises(QccError, match=r"the checkpoint has no tensor 'lm_head.weight'"):
            checkpoint.read("lm_head.weight")


def test_shared_models() -> None:
    folder = SHARED / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip("shared/models/stories260K is not here")
    from safetensors.numpy import load_file

    wanted = load_file(folder / "model.safetensors")
    with Checkpoint.open(folder) as checkpoint:
        assert sorted(checkpoint.names) == sorted(wanted)
        for name in checkpoint.names:
            np.testing.assert_array_equal(checkpoint.read(name), wanted[name])
