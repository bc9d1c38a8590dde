"""Tokenizers rebuilt from GGUF metadata encode every text as the originals do."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from qcc.compiler.imports.gguf_tokenizer import tokenizer_of
from qcc.runtime.errors import QccError

PRE = {"llama-bpe": "llama-bpe", "qwen2": "qwen2"}
TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces\tand\ttabs \n\n\n newlines\r\n",
    "I'll they're WE'VE can't 'S",
    "1234567890 3.14159 -42 1,000,000",
    "Größe, naïve café, ÀÉÎÕÜ, ﬁ ligature, e\u0301 combined",
    "中文字符和日本語のテキスト、한국어",
    "Привет мир, Ωμέγα, مرحبا, שלום, नमस्ते",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 \u200b\u00a0\u3000x",
    "def f(x):\n    return {k: v**2 for k, v in x.items()}  # comment\n",
    "<s>[INST] hi [/INST] </s>",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>",
    "<|im_start|>user\nhi<|im_end|>\n",
    "\x00\x01\x7f\ud7ff\ufffd",
    "a" * 300 + " " * 40 + "\u2581\u2581x",
]


def sentencepiece_scores(path: Path) -> list[tuple[str, float, int]]:
    """(token, score, type) of every piece of a tokenizer.model, a protobuf, read by hand."""
    data, pieces = path.read_bytes(), []

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = data[at]
            value |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                return value, at

    def message(at: int, end: int) -> list[tuple[int, Any]]:
        fields = []
        while at < end:
            tag, at = varint(at)
            if tag & 7 == 0:
                value, at = varint(at)
            elif tag & 7 == 5:
                value, at = struct.unpack_from("<f", data, at)[0], at + 4
            else:
                size, at = varint(at)
                value, at = (at, at + size), at + size
            fields.append((tag >> 3, value))
        return fields

    for number, value in message(0, len(data)):
        if number == 1:
            piece = dict(message(*value))
            begin, end = piece[1]
            pieces.append((data[begin:end].decode(), piece.get(2, 0.0), piece.get(3, 1)))
    return pieces


def metadata_of(folder: Path) -> dict[str, Any]:
    """What llama.cpp's converter writes of a tokenizer."""
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    ids = dict(raw["model"]["vocab"])
    ids.update({item["content"]: item["id"] for item in raw["added_tokens"]})
    tokens = sorted(ids, key=lambda text: ids[text])
    found: dict[str, Any] = {"bos_token_id": ids[settings["bos_token"]]}
    found |= {"eos_token_id": ids[settings["eos_token"]]}
    if folder.name == "llama-spm":
        pieces = sentencepiece_scores(folder / "tokenizer.model")
        assert [piece for piece, _, _ in pieces] == tokens
        found |= {"model": "llama", "scores": [score for _, score, _ in pieces]}
        found |= {"tokens": tokens, "token_type": [kind for _, _, kind in pieces]}
        found |= {"unknown_token_id": 0, "add_bos_token": True}
    else:
        special = {item["content"]: item["special"] for item in raw["added_tokens"]}
        merges = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
        kinds = [1 if t not in special else 3 if special[t] else 4 for t in tokens]
        found |= {"model": "gpt2", "pre": PRE[folder.name], "tokens": tokens}
        found |= {"token_type": kinds, "merges": merges}
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()}


@pytest.mark.parametrize("name", ["llama-spm", "llama-bpe", "qwen2"])
def test_encodings_are_those_of_the_original(name: str, shared: Path, tmp_path: Path) -> None:
    """Every text, and ten thousand words of prose, there and back."""
    folder = shared / "tokenizers" / name
    tokenizer, config = tokenizer_of(metadata_of(folder), tmp_path, 1 << 20)
    ours = Tokenizer.from_str(json.dumps(tokenizer))
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prose = (shared / "text" / "wikitext2_valid_detok.txt").read_text(encoding="utf-8")[:60_000]
    for text in [*TEXTS, *prose.split("\n"), prose[:5000]]:
        expected = theirs.encode(text, add_special_tokens=False).ids
        found = ours.encode(text, add_special_tokens=False).ids
        assert found == expected, repr(text)
        assert ours.decode(found, skip_special_tokens=False) == theirs.decode(
            expected, skip_special_tokens=False
        )
    original = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert {key: config[key] for key in ("bos_token", "eos_token")} == {
        key: original[key] for key in ("bos_token", "eos_token")
    }


def small(**changes: Any) -> dict[str, Any]:
    """A byte-level tokenizer of a few tokens."""
    base: dict[str, Any] = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab", "<x>"]}
    base |= {"token_type": [1, 1, 1, 3], "merges": ["a b"], "eos_token_id": 3}
    raw = {f"tokenizer.ggml.{key}": value for key, value in {**base, **changes}.items()}
    return {key: value for key, value in raw.items() if value is not None}


def test_fields_of_the_config(tmp_path: Path) -> None:
    """Special tokens, whether a text begins with BOS, and the chat template."""
    raw = {**small(bos_token_id=3, add_bos_token=True), "tokenizer.chat_template": "{{ x }}"}
    tokenizer, config = tokenizer_of(raw, tmp_path, 4)
    assert [item["content"] for item in tokenizer["added_tokens"]] == ["<x>"]
    assert config["bos_token"] == config["eos_token"] == "<x>"
    assert config["add_bos_token"] is True and config["chat_template"] == "{{ x }}"
    assert tokenizer_of(small(), tmp_path, 4)[1]["add_bos_token"] is False
    # llama.cpp begins texts with BOS where a Llama 3 file does not say.
    assert tokenizer_of(small(pre="llama-bpe"), tmp_path, 4)[1]["add_bos_token"] is True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "model: 'bert' is not supported; supported: llama, gpt2"),
        ({"pre": "tekken"}, "pre: 'tekken' is not supported; supported: llama-bpe"),
        ({"tokens": None}, "tokens: None is not a list of str"),
        ({"tokens": ["a", "b", "a", "<x>"]}, "the token 'a' appears twice"),
        ({"tokens": list("abcde")}, "5 texts; the model has 4 rows"),
        ({"token_type": [1]}, "token_type: 1 items for 4 tokens"),
        ({"merges": ["a c"]}, "merges: 'a c' is not two tokens that make a third"),
        ({"merges": ["ab"]}, "merges: 'ab' is not two tokens"),
        ({"eos_token_id": 4}, "eos_token_id: 4 is no id of 4 tokens"),
        ({"add_bos_token": 1}, "add_bos_token: 1 must be true or false"),
        ({"model": "llama"}, "scores: None is not a list of float"),
        ({"model": "llama", "scores": [0.0, float("nan"), 0.0, 0.0]}, "scores: they hold NaN"),
    ],
)
def test_bad_metadata_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """One line that names the key."""
    with pytest.raises(QccError, match=message) as caught:
        tokenizer_of(small(**changes), tmp_path, 4)
    assert "\n" not in str(caught.value)
