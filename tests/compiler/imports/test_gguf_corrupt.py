"""Corrupt .gguf files: each is an error of one line or reads as something, in bounded memory."""

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcc.compiler.imports.gguf_header import read_header
from qcc.compiler.source import locate
from qcc.compiler.weights.checkpoint import Checkpoint
from qcc.runtime.errors import QccError

FLIPS, CUTS = 600, 200


@pytest.fixture(scope="module")
def good(
    checkpoint: Callable[..., Path],
    write_gguf: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> bytes:
    """A small file."""
    path = tmp_path_factory.mktemp("good") / "m.gguf"
    write_gguf(checkpoint("llama"), path, lambda name, tensor: "F16" if "down" in name else "Q8_0")
    return path.read_bytes()


def outcome(path: Path) -> str:
    """Import a file and read all of it: "" or the error."""
    try:
        with Checkpoint.open(locate(str(path))) as found:
            for name in found.names:
                found.check(name)
                found.read(name)
                if found.format(name) is not None:
                    found.quantized(name)
    except QccError as err:
        assert "\n" not in str(err)
        return str(err)
    return ""


def test_every_bit_of_the_head_may_be_wrong(good: bytes, tmp_path: Path) -> None:
    """Bytes changed all over the head, its counts and sizes first."""
    path = tmp_path / "m.gguf"
    path.write_bytes(good)
    head = min(info.begin for info in read_header(path).tensors.values())
    rng = np.random.default_rng(0)
    places = np.concatenate([np.arange(120), np.arange(head - 200, head)])
    places = np.concatenate([places, rng.integers(120, head, FLIPS - len(places))])
    outcomes = []
    for place in places:
        data = bytearray(good)
        data[place] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
        outcomes.append(outcome(path))
    assert sum(map(bool, outcomes)) > FLIPS / 10  # many are found
    assert len(set(outcomes)) > 30  # and told apart
    assert outcomes.count("") > 10  # a letter of a token more or less


def test_a_truncated_file_is_an_error(good: bytes, tmp_path: Path) -> None:
    """Wherever it ends."""
    path = tmp_path / "m.gguf"
    places = np.random.default_rng(1).integers(0, len(good) - 64, CUTS)
    for place in (0, 3, 4, 8, 15, 24, 31, *places):
        path.write_bytes(good[:place])
        assert outcome(path)


def text(value: str) -> bytes:
    """A string as GGUF has it."""
    return struct.pack("<Q", len(value)) + value.encode()


def head(entries: bytes = b"", count: int = 0, tensors: bytes = b"", number: int = 0) -> bytes:
    """A head of metadata and a table of tensors."""
    return b"GGUF" + struct.pack("<IQQ", 3, number, count) + entries + tensors


def tensor(shape: tuple[int, ...], kind: int = 0, offset: int = 0, name: str = "t") -> bytes:
    """A line of the table."""
    dimensions = b"".join(struct.pack("<Q", size) for size in shape)
    return (
        text(name) + struct.pack("<I", len(shape)) + dimensions + struct.pack("<IQ", kind, offset)
    )


HUGE = 2**62
ARRAY = text("k") + struct.pack("<II", 9, 4)
CASES: dict[str, tuple[bytes, str]] = {
    "mark": (b"GGML" + bytes(60), "no GGUF file"),
    "version": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1 is not supported"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648 is big endian"),
    "entries": (head(count=HUGE), f"0 tensors and {HUGE} entries do not fit"),
    "tensors": (head(number=HUGE), f"{HUGE} tensors and 0 entries do not fit"),
    "key": (head(struct.pack("<Q", HUGE) + bytes(64), 1), "key 0 of the metadata goes beyond"),
    "text": (head(text("k") + struct.pack("<IQ", 8, HUGE), 1), "'k' of the metadata goes beyond"),
    "array": (head(ARRAY + struct.pack("<Q", HUGE), 1), f"'k' .* would have {HUGE} items"),
    "items": (head(ARRAY + struct.pack("<Q", 1 << 23), 1), "'k' of the metadata goes beyond"),
    "kind": (head(text("k") + struct.pack("<IQ", 13, 0), 1), "'k' .* has the unknown type 13"),
    "nested": (
        head(text("k") + struct.pack("<IIQIQ", 9, 9, 1, 4, 0), 1),
        "'k' of the metadata has the unknown type 9",
    ),
    "twice": (head(2 * (text("k") + struct.pack("<IB", 0, 1)), 2), "key 'k' appears twice"),
    "letters": (head(struct.pack("<Q", 1) + b"\xff" + bytes(16), 1), "key 0 .* is not UTF-8"),
    "dimensions": (head(tensors=tensor((1,) * 9), number=1), "tensor 't' has 9 dimensions"),
    "shape": (head(tensors=tensor((HUGE, HUGE)), number=1), f"shape .{HUGE}, {HUGE}"),
    "zero": (head(tensors=tensor((32, 0)), number=1), r"the shape \[0, 32\]"),
    "type": (head(tensors=tensor((32,), 77), number=1), "'t' has the unknown ggml type 77"),
    "block": (head(tensors=tensor((33, 2), 8), number=1), r"of Q8_0 has the shape \[2, 33\]"),
    "end": (head(tensors=tensor((1 << 20,)), number=1), "'t' ends at byte .* the file has"),
    "offset": (head(tensors=tensor((8,), 0, 2**63), number=1) + bytes(64), "ends at byte"),
    "unaligned": (head(tensors=tensor((8,), 0, 8), number=1) + bytes(99), "'t' at 8 is not align"),
    "overlap": (
        head(tensors=tensor((32,)) + tensor((8,), 0, 32, "u"), number=2) + bytes(512),
        "tensor 'u' at 32 is not aligned or overlaps 't'",
    ),
    "same name": (
        head(tensors=tensor((8,)) + tensor((8,), 0, 32), number=2) + bytes(512),
        "tensor 't' appears twice",
    ),
    "alignment": (
        head(text("general.alignment") + struct.pack("<II", 4, 0), 1),
        "general.alignment is 0, not a power of 2",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_absurd_heads_are_named_before_memory_is_taken(case: str, tmp_path: Path) -> None:
    """Sizes that would take the machine down are held against the file first."""
    data, message = CASES[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(QccError, match=message):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 23
    finally:
        tracemalloc.stop()


def test_a_shrinking_file_is_an_error(good: bytes, tmp_path: Path) -> None:
    """Cut after it was opened: an error, no signal."""
    path = tmp_path / "m.gguf"
    path.write_bytes(good)
    with Checkpoint.open(locate(str(path))) as found:
        path.write_bytes(good[: len(good) // 2])
        with pytest.raises(QccError, match="ends within tensor"):
            for name in found.names:
                found.read(name)


def test_infinite_scales_are_named(good: bytes, tmp_path: Path) -> None:
    """They would be stored as they are."""
    path = tmp_path / "m.gguf"
    path.write_bytes(good)
    info = next(i for i in read_header(path).tensors.values() if i.kind == "Q8_0")
    data = bytearray(good)
    data[info.begin : info.begin + 2] = np.float16(np.inf).tobytes()
    path.write_bytes(data)
    assert f"tensor {info.name!r}: its scales hold NaN or infinite numbers" in outcome(path)
