"""The protocol: marks, windows, what is dropped, and texts that are none."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from qcc.runtime.errors import QccError
from qcc.runtime.eval.protocol import Text, cut_windows, read_text

BOS = 1


def letters(document: str) -> list[int]:
    """A token a letter; its code is its id."""
    return [ord(letter) for letter in document]


def windows(content: str, context: int = 12, bos: int | None = BOS, **more: Any) -> Any:
    return cut_windows(Text("t.txt", "0" * 64, content), letters, bos, context, **more)


def test_windows_are_bos_and_the_rest_without_overlap() -> None:
    """25 letters in windows of BOS + 11: 11, 11, and 3 that are too few."""
    found = windows("abcdefghijklmnopqrstuvwxy")
    assert found.ids == (
        (BOS, *letters("abcdefghijk")),
        (BOS, *letters("lmnopqrstuv")),
    )
    assert (found.tokens, found.positions, found.dropped) == (24, 22, 1)


@pytest.mark.parametrize(("length", "kept"), [(7, False), (8, True)])
def test_bos_counts_in_the_length_of_a_window(length: int, kept: bool) -> None:
    """8 tokens are too few, BOS being one of them; 9 are enough."""
    content = "x" * length + "</s>" + "y" * 9
    assert ((BOS, *letters("x" * length)) in windows(content).ids) == kept


def test_a_model_without_bos_has_windows_without_it() -> None:
    found = windows("abcdefghijklmnopqrstu", bos=None)
    assert found.ids == (tuple(letters("abcdefghijkl")), tuple(letters("mnopqrstu")))
    assert "the model has no BOS" in " ".join(found.describe())


def test_documents_end_at_every_mark_and_empty_ones_go() -> None:
    """Both usual marks and the tokenizer's own; white space at the ends goes too."""
    content = "<|endoftext|>first document \n<|endoftext|>\n second one...</s> </s>third text<eos>"
    found = windows(content, context=64, end_mark="<eos>")
    documents = ["first document", "second one...", "third text"]
    assert [ids[1:] for ids in found.ids] == [tuple(letters(text)) for text in documents]
    assert found.documents == 3
    assert found.marks == ("<|endoftext|>", "</s>", "<eos>")


def test_max_tokens_cuts_the_last_window() -> None:
    found = windows("abcdefghijk" * 9, max_tokens=34)
    assert [len(ids) for ids in found.ids] == [12, 12, 10]
    assert "the first 34 tokens" in " ".join(found.describe())
    assert [len(ids) for ids in windows("abcdefghijk" * 9, max_tokens=31).ids] == [12, 12]


def test_a_text_without_a_window_is_refused() -> None:
    with pytest.raises(QccError, match=r"t\.txt: too short: none of its 2 documents has more than"):
        windows("short</s>text")
    with pytest.raises(QccError, match="too short"):
        windows("")
    with pytest.raises(QccError, match="--context 8: must be more than 8 tokens"):
        windows("a long enough text", context=8)
    with pytest.raises(QccError, match="--max-tokens 4"):
        windows("a long enough text", max_tokens=4)


def test_reading_a_text(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes("grün".encode())
    found = read_text(path)
    assert (found.name, found.content) == ("t.txt", "grün")
    assert found.sha256 == hashlib.sha256(b"gr\xc3\xbcn").hexdigest()
    path.write_bytes("grün".encode("latin-1"))
    with pytest.raises(QccError, match=r"not UTF-8 text: .* at byte 2"):
        read_text(path)
    with pytest.raises(QccError, match=r"none\.txt: cannot read: No such file"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(QccError, match="cannot read"):
        read_text(tmp_path)
