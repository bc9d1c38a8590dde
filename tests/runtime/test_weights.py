"""Slots: repacked once, mapped from then on, kept in memory where the cache cannot be written."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qcc.runtime.engine import tvm_runtime, weights
from qcc.runtime.engine.device import HOST
from qcc.runtime.engine.memory import budget, choose_total_tokens
from qcc.runtime.engine.metadata import KVStorage, Metadata, Slot, TensorType
from qcc.runtime.errors import QccError

# name -> (array, offset in the shard); the second tensor lies askew, bf16 is stored as its bits.
RNG = np.random.default_rng(0)
STORED = {
    "a.q_weight": (RNG.integers(0, 2**32, (6, 8), np.uint32), 0),
    "a.q_scale": (RNG.random((3, 5), np.float32).astype(np.float16), 192),
    "norm.weight": (RNG.random(16, np.float32), 256),
    "odd.weight": (RNG.random(7, np.float32), 330),
    "b.weight": (RNG.integers(0, 2**16, (4, 4), np.uint16), 384),
}
DTYPES = {"b.weight": "bfloat16"}


def kind(name: str) -> TensorType:
    array = STORED[name][0]
    return TensorType(name, array.shape, DTYPES.get(name, str(array.dtype)))


class FakeLibrary:
    """Has two repacks in NumPy and counts what it made."""

    def __init__(self, folder: Path) -> None:
        self.path, self.device = folder / "lib.so", HOST
        self.path.write_bytes(b"code")
        transposed = TensorType("a", (8, 6), "uint32")
        both = TensorType("c", (15,), "float16")
        slots = (
            Slot(transposed, ("a.q_weight",), "transpose"),
            Slot(both, ("a.q_scale",), "negate"),
            *(Slot(kind(n), (n,), None) for n in ("norm.weight", "odd.weight", "b.weight")),
        )
        self.metadata: Any = SimpleNamespace(params=tuple(map(kind, STORED)), slots=slots)
        self.made: list[str] = []

    def repack(self, name: str, stored: Any) -> Any:
        self.made.append(name)
        array: Any = np.from_dlpack(stored[0])
        result = array.T.copy() if name == "transpose" else -array.reshape(-1)
        return tvm_runtime.load().from_dlpack(result)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("QCC_CACHE", str(tmp_path / "cache"))
    return FakeLibrary(tmp_path)


@pytest.fixture
def artifact(tmp_path: Path) -> Any:
    shard = bytearray(512)
    records = {}
    for name, (array, offset) in STORED.items():
        shard[offset : offset + array.nbytes] = array.tobytes()
        records[name] = SimpleNamespace(
            shape=array.shape,
            dtype=DTYPES.get(name, str(array.dtype)),
            shard="params_shard_0.bin",
            offset=offset,
            nbytes=array.nbytes,
            encoding="raw",
        )
    (tmp_path / "params_shard_0.bin").write_bytes(shard)
    (tmp_path / "tensor-cache.json").write_text("{}", encoding="utf-8")
    return SimpleNamespace(
        folder=tmp_path,
        records=records,
        manifest=SimpleNamespace(libraries={}),
        read=lambda name: STORED[name][0],
    )


def check(slots: list[Any]) -> None:
    a, c, norm, odd, b = (weights.as_bytes(slot) for slot in slots)
    expected = [
        STORED["a.q_weight"][0].T,
        -STORED["a.q_scale"][0],
        *(STORED[name][0] for name in ("norm.weight", "odd.weight", "b.weight")),
    ]
    for got, wanted in zip((a, c, norm, odd, b), expected, strict=True):
        assert got.tobytes() == wanted.tobytes()
    assert str(slots[4].dtype) == "bfloat16"
    assert [tuple(slot.shape) for slot in slots] == [(8, 6), (15,), (16,), (7,), (4, 4)]


def cache_files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "repacked").iterdir())


def test_repacked_once_then_mapped(artifact: Any, library: Any, tmp_path: Path) -> None:
    check(weights.load_slots(artifact, library))
    assert library.made == ["transpose", "negate"]
    (file,) = cache_files(tmp_path)
    assert file.stat().st_size == 192 + 64 + 64  # a, c, and `odd`, which lies askew in its shard
    check(weights.load_slots(artifact, library))
    assert library.made == ["transpose", "negate"]


def test_mapped_slots_are_aligned(artifact: Any, library: Any) -> None:
    weights.load_slots(artifact, library)
    for slot in weights.load_slots(artifact, library):
        assert weights.as_bytes(slot).ctypes.data % weights.ALIGNMENT == 0


def test_a_truncated_cache_is_made_again(artifact: Any, library: Any, tmp_path: Path) -> None:
    weights.load_slots(artifact, library)
    (file,) = cache_files(tmp_path)
    os.truncate(file, 100)
    check(weights.load_slots(artifact, library))
    assert len(library.made) == 4


def test_another_library_or_other_weights_replace_the_cache(
    artifact: Any, library: Any, tmp_path: Path
) -> None:
    weights.load_slots(artifact, library)
    (first,) = cache_files(tmp_path)
    (tmp_path / "tensor-cache.json").write_text("{ }", encoding="utf-8")
    weights.load_slots(artifact, library)
    (second,) = cache_files(tmp_path)
    library.path.write_bytes(b"other code")
    weights.load_slots(artifact, library)
    (third,) = cache_files(tmp_path)
    assert len({first, second, third}) == 3
    assert len(library.made) == 6


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EROFS])
def test_what_cannot_be_written_stays_in_memory(
    artifact: Any, library: Any, tmp_path: Path, monkeypatch: Any, reason: int
) -> None:
    def refuse(file: int) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.warns(UserWarning, match="every start repacks them"):
        check(weights.load_slots(artifact, library))
    assert cache_files(tmp_path) == []


def test_a_full_disk_takes_the_caches_used_longest_ago(
    artifact: Any, library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache" / "repacked"
    folder.mkdir(parents=True)
    _, size = weights.cache_layout(artifact, library.metadata.slots)
    for age, name in enumerate(["new", "used", "old", "older"]):
        (folder / f"{name}-0.bin").write_bytes(bytes(size))
        os.utime(folder / f"{name}-0.bin", (0, 1e9 - age))
    room = 4 * size + size // 2  # for five there is none

    def usage(path: Any) -> Any:
        return SimpleNamespace(free=room - sum(f.stat().st_size for f in Path(path).glob("*.bin")))

    monkeypatch.setattr("shutil.disk_usage", usage)
    weights._make_room(folder / "huge-0.bin", room + 1)
    assert len(list(folder.glob("*.bin"))) == 4, "all of them would not be enough"
    weights.load_slots(artifact, library)
    left = {path.name.split("-")[0] for path in folder.glob("*.bin")}
    own = weights.cache_path(artifact, library)
    assert left == {"new", "used", "old", own.name.split("-")[0]}
    os.utime(own, (0, 0))
    weights.load_slots(artifact, library)
    assert own.stat().st_mtime > 1e9, "used last now"


def test_a_cache_folder_that_cannot_be(artifact: Any, library: Any, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file", encoding="utf-8")
    with pytest.warns(UserWarning, match="not cached"):
        check(weights.load_slots(artifact, library))


def test_progress_ends_at_the_whole(artifact: Any, library: Any) -> None:
    told: list[tuple[int, int]] = []
    weights.load_slots(artifact, library, lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] > 0
    assert told == sorted(told)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dtype": "float32"}, r"'a.q_scale' is float32\[3, 5\], but lib.so needs float16\[3, 5\]"),
        ({"shape": (5, 3)}, r"'a.q_scale' is float16\[5, 3\]"),
    ],
)
def test_other_tensors_than_compiled_for_are_refused(
    artifact: Any, library: Any, change: dict[str, Any], text: str
) -> None:
    vars(artifact.records["a.q_scale"]).update(change)
    with pytest.raises(QccError, match=text):
        weights.load_slots(artifact, library)
    del artifact.records["a.q_scale"]
    with pytest.raises(QccError, match=r"needs a tensor 'a\.q_scale'"):
        weights.load_slots(artifact, library)


def metadata(**changes: Any) -> Metadata:
    fields: dict[str, Any] = {
        "target": "cpu",
        "task": "chat",
        "context_window_size": 1024,
        "sliding_window_size": -1,
        "attention_sink_size": -1,
        "prefill_chunk_size": 128,
        "max_batch_size": 4,
        "vocab_size": 100,
        "hidden_size": 256,
        "page_size": 16,
        "compute_dtype": "float32",
        "kv_storages": (KVStorage("f32", 256, 256), KVStorage("f16", 384, 128)),
        "kv": "f32",
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "rope_table_bytes": 1000,
        "memory_usage": {"prefill": 5000, "decode": 100, "batch_verify": 9_000_000},
        "params": (),
        "slots": (Slot(TensorType("w", (1000, 1000), "float32"), ("w",), None),),
    }
    return Metadata(**{**fields, **changes})


def test_the_budget_is_the_sum_of_its_parts() -> None:
    found = budget(metadata(), 1, 1024)
    # 2 layers, K and V, 2 heads of 64 f32: 2048 bytes a token; TVM keeps one page more.
    assert (found.weights, found.temporaries) == (4_000_000, 5000)
    # Of a chunk of 128: q, k, v and output, 12 heads of 64 f32; two f32 for each of 4 heads.
    workspace = 128 * (12 * 64 * 4 + 2 * 4 * 4)
    assert found.kv_cache == (1024 + 16) * 2048 + 1000 + workspace
    assert found.total == 4_000_000 + 5000 + found.kv_cache


def test_one_sequence_needs_no_temporaries_of_a_batch() -> None:
    meta = metadata(memory_usage={"prefill": 5000, "decode": 100, "batch_decode": 8_000_000})
    assert [budget(meta, batch, 1024).temporaries for batch in (1, 2, 4)] == [5000, 8e6, 8e6]
    fits = budget(meta, 1, 1024).total
    assert choose_total_tokens(meta, 1024, 1, fits) == 1024
    with pytest.raises(QccError, match=r"needs 15 MB .* temporaries 8 MB\), available are 7 MB"):
        choose_total_tokens(meta, 1024, 2, fits)


def test_the_cache_shrinks_to_what_fits_down_to_one_sequence() -> None:
    meta = metadata()
    whole = budget(meta, 4, 4096).total
    assert choose_total_tokens(meta, 1024, 4, whole) == 4096
    less = choose_total_tokens(meta, 1024, 4, whole - 1_000_000)
    assert less % 16 == 0
    assert 0 <= whole - 1_000_000 - budget(meta, 4, less).total < 2 * 16 * 2048
    one = budget(meta, 4, 1024).total
    assert choose_total_tokens(meta, 1024, 4, one) == 1024
    with pytest.raises(QccError, match=r"needs 7 MB \(weights 4 \+ KV cache 3 \+ temporaries 0 MB"):
        choose_total_tokens(meta, 1024, 4, one - 100_000)
    with pytest.raises(QccError, match="lower --context-window from 1024 to 960"):
        choose_total_tokens(meta, 1024, 4, one - 100_000)
    with pytest.raises(QccError, match="fewer bits"):
        choose_total_tokens(meta, 1024, 4, 1_000_000)
