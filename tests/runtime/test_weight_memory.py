"""Weights read into memory and weights mapped: the same bytes, and what goes wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcc.runtime.engine.metadata import TensorType
from qcc.runtime.engine.weight_memory import (
    HUGE_PAGE,
    PIECE,
    Part,
    check_weights,
    huge_memory,
    place,
)
from qcc.runtime.errors import QccError


@pytest.fixture
def parts(tmp_path: Path) -> tuple[list[Part], list[Any]]:
    """Tensors in two files, one of several pieces, and their numbers."""
    random = np.random.default_rng(0)
    arrays = [
        random.integers(0, 2**32, (PIECE // 4 + 7, 1), dtype=np.uint32),
        random.normal(size=(3, 5)).astype("float32"),
        random.normal(size=(2, 2)).astype("float16"),
    ]
    found, offset = [], 0
    with (tmp_path / "a").open("wb") as file:
        for i, array in enumerate(arrays[:2]):
            offset = -(-file.tell() // 64) * 64
            file.seek(offset)
            file.write(array.tobytes())
            found.append(Part(tmp_path / "a", offset, _type(f"t{i}", array)))
    (tmp_path / "b").write_bytes(arrays[2].tobytes())
    return [*found, Part(tmp_path / "b", 0, _type("t2", arrays[2]))], arrays


def _type(name: str, array: Any) -> TensorType:
    return TensorType(name, array.shape, str(array.dtype))


@pytest.mark.parametrize("weights", ["ram", "mmap"])
def test_both_hold_the_bytes_of_the_files(weights: str, parts: Any) -> None:
    given, arrays = parts
    for tensor, array in zip(place(given, weights), arrays, strict=True):
        np.testing.assert_array_equal(np.from_dlpack(tensor), array)
        assert np.from_dlpack(tensor).ctypes.data % 64 == 0


def test_memory_does_not_follow_the_file(parts: Any) -> None:
    """What was read stays when the file changes; progress ends with all bytes."""
    given, arrays = parts
    told: list[tuple[int, int]] = []
    tensors = place(given, "ram", lambda done, total: told.append((done, total)))
    given[2].file.write_bytes(bytes(8))
    np.testing.assert_array_equal(np.from_dlpack(tensors[2]), arrays[2])
    total = sum(array.nbytes for array in arrays)
    assert told[-1] == (total, total) and len(told) == 4


def test_a_file_that_ends_early_is_an_error(parts: Any) -> None:
    given, _ = parts
    with given[0].file.open("r+b") as file:
        file.truncate(given[0].type.nbytes - 1)
    with pytest.raises(QccError, match=r"a: ends at byte \d+, within a tensor"):
        place(given, "ram")


def test_memory_begins_a_huge_page_and_is_zero() -> None:
    memory = huge_memory(3 * HUGE_PAGE + 5)
    assert memory.ctypes.data % HUGE_PAGE == 0 and len(memory) == 3 * HUGE_PAGE + 5
    assert not memory.any()
    with pytest.raises(QccError, match="no memory for"):
        huge_memory(1 << 62)


def test_names_of_the_choices() -> None:
    assert check_weights(None) == "ram" and check_weights("mmap") == "mmap"
    with pytest.raises(QccError, match="--weights disk: must be one of ram, mmap"):
        check_weights("disk")
