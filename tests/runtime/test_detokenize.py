"""Streamed text is the decoded text, for the three kinds of tokenizer that models use."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from qcc.runtime.engine.detokenize import REPLACEMENT, Detokenizer

FOLDER = Path(__file__).parents[3] / "shared" / "tokenizers"
TEXTS = {
    "words": "Hello, world!  Two spaces, a tab\tand\n\nlines.",
    "emoji": "I ❤️ pizza 🍕🍕 and my family 👨‍👩‍👧‍👦!",
    "cjk": "你好，世界。日本語のテキスト、한국어 텍스트.",  # noqa: RUF001
    "rare": "𠜎𠜱𡿺 ꙮ ᚠᛇᚻ 𓀀𓂀",  # bytes in every tokenizer here
    "combining": "cafe\u0301 n\u0303 A\u030a\u0323 ẹ́",
    "flags": "🇫🇷🇯🇵🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "code": "def f(x):\n    return x  # 50% → ½\n",
    "spaces": "   leading and trailing   ",
    "newlines": "\n\n😀\n",
}


@pytest.fixture(scope="module", params=["llama-spm", "llama-bpe", "qwen2"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    path = FOLDER / request.param / "tokenizer.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    return Tokenizer.from_file(str(path))


def stream(tokenizer: Any, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt or [])
    return [*map(detokenizer.push, ids), detokenizer.finish()]


@pytest.mark.parametrize("name", TEXTS)
def test_pieces_joined_are_the_decoded_text(tokenizer: Any, name: str) -> None:
    ids = tokenizer.encode(TEXTS[name], add_special_tokens=False).ids
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any(REPLACEMENT in piece for piece in pieces)


@pytest.mark.parametrize("name", TEXTS)
def test_an_answer_continues_its_prompt(tokenizer: Any, name: str) -> None:
    ids = tokenizer.encode(TEXTS["words"] + " " + TEXTS[name], add_special_tokens=False).ids
    whole = tokenizer.decode(ids)
    for cut in range(1, len(ids)):
        before = tokenizer.decode(ids[:cut])
        if before.endswith(REPLACEMENT):
            continue  # the prompt ends within a character: the next test
        assert before + "".join(stream(tokenizer, ids[cut:], ids[:cut])) == whole


def test_a_prompt_that_ends_within_a_character_is_completed(tokenizer: Any) -> None:
    ids = tokenizer.encode("ab 𓀀 cd", add_special_tokens=False).ids
    cuts = [i for i in range(1, len(ids)) if tokenizer.decode(ids[:i]).endswith(REPLACEMENT)]
    assert cuts, "the character should take several tokens"
    for cut in cuts:
        assert "".join(stream(tokenizer, ids[cut:], ids[:cut])) == "𓀀 cd"


def test_text_comes_with_its_token(tokenizer: Any) -> None:
    """Nothing is held back longer than a character takes."""
    ids = tokenizer.encode("The cat sat on the mat, purring.", add_special_tokens=False).ids
    for token, piece in zip(ids, stream(tokenizer, ids), strict=False):
        assert piece.strip() == tokenizer.decode([token]).strip()


def test_special_tokens_are_skipped(tokenizer: Any) -> None:
    special = next(i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special)
    hello = tokenizer.encode("Hello", add_special_tokens=False).ids
    pieces = stream(tokenizer, [special, *hello, special])
    assert "".join(pieces) == "Hello"


def test_an_unfinished_character_shows_at_the_end_only(tokenizer: Any) -> None:
    ids = tokenizer.encode("ok 𓀀", add_special_tokens=False).ids[:-1]
    *before, last = stream(tokenizer, ids)
    assert not any(REPLACEMENT in piece for piece in before)
    assert REPLACEMENT in last
    assert "".join([*before, last]) == tokenizer.decode(ids)


def test_random_tokens(tokenizer: Any) -> None:
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(tokenizer.get_vocab_size()) for _ in range(12)]
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_invalid_bytes_do_not_spoil_what_was_shown() -> None:
    """Byte fallback: é, then a byte that is no UTF-8. Hugging Face's decoder spoils the é too."""
    path = FOLDER / "llama-spm" / "tokenizer.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    tokenizer = Tokenizer.from_file(str(path))
    text = ("<0xC3>", "<0xA9>", "<0xFF>", "a")
    ids = [tokenizer.token_to_id(piece) for piece in text]
    assert tokenizer.decode(ids) == 3 * REPLACEMENT + "a"
    assert "".join(stream(tokenizer, ids)) == "é" + REPLACEMENT + "a"
