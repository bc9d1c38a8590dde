"""Prompts into token ids: BOS, EOS, empty prompts, the tokenizer files that there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors

from qcc.runtime.engine.tokenizer import Tokenizer
from qcc.runtime.errors import QccError

WORDS = {"<s>": 0, "</s>": 1, "<eot>": 2, "hello": 3, "world": 4, "Ġ": 5}


def tokenizer(
    folder: Path,
    chat: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
    adds_bos: bool = False,
) -> Tokenizer:
    backend = Backend(models.WordLevel(WORDS, unk_token="hello"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>", "<eot>"])
    backend.enable_truncation(3)
    backend.enable_padding(length=3)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    backend.save(str(folder / "tokenizer.json"))
    for name, data in (("tokenizer_config", config), ("generation_config", generation)):
        if data is not None:
            (folder / f"{name}.json").write_text(json.dumps(data), encoding="utf-8")
    return Tokenizer(folder, chat or {})


BOS = {"bos_token": "<s>"}


@pytest.mark.parametrize(
    ("config", "adds_bos", "expected"),
    [
        ({**BOS, "add_bos_token": True}, False, [0, 3, 4]),
        ({**BOS, "add_bos_token": True}, True, [0, 3, 4]),  # once, not twice
        ({**BOS, "add_bos_token": False}, False, [3, 4]),
        ({**BOS, "add_bos_token": False}, True, [0, 3, 4]),  # the post-processor decides
        (BOS, False, [3, 4]),
        ({"bos_token": {"content": "<s>"}, "add_bos_token": True}, False, [0, 3, 4]),
        (None, False, [3, 4]),
    ],
)
def test_bos(tmp_path: Path, config: Any, adds_bos: bool, expected: list[int]) -> None:
    made = tokenizer(tmp_path, config=config, adds_bos=adds_bos)
    assert made.encode("hello world") == expected
    assert made.encode_rendered("<s>hello world") == [0, 3, 4]


def test_an_empty_prompt_is_the_bos_alone(tmp_path: Path) -> None:
    assert tokenizer(tmp_path, config={**BOS, "add_bos_token": False}).encode("") == [0]
    assert tokenizer(tmp_path, config=BOS, adds_bos=True).encode("") == [0]
    (tmp_path / "tokenizer_config.json").unlink()
    assert tokenizer(tmp_path, chat={"bos_token_id": 2}).encode("") == [2]
    with pytest.raises(QccError, match="the prompt is empty, and the model has no BOS"):
        tokenizer(tmp_path).encode("")


def test_a_long_prompt_is_neither_cut_nor_padded(tmp_path: Path) -> None:
    made = tokenizer(tmp_path)
    assert made.encode("hello " * 9) == [3] * 9
    assert made.encode("hello") == [3]


@pytest.mark.parametrize(
    ("chat", "generation", "config", "expected"),
    [
        ({"eos_token_id": 1}, None, None, {1}),
        ({"eos_token_id": [1, 2]}, None, None, {1, 2}),
        ({"eos_token_id": 1}, {"eos_token_id": [2]}, None, {1, 2}),
        ({"eos_token_id": None}, {}, {"eos_token": "</s>"}, {1}),
        ({"eos_token_id": -1}, None, None, set()),
    ],
)
def test_eos(tmp_path: Path, chat: Any, generation: Any, config: Any, expected: set[int]) -> None:
    assert tokenizer(tmp_path, chat, config, generation).eos_ids == expected


def test_only_special_tokens_stand_for_stop_strings(tmp_path: Path) -> None:
    made = tokenizer(tmp_path)
    assert made.special_ids == {"<s>": 0, "</s>": 1, "<eot>": 2}


def test_files_that_are_not_readable(tmp_path: Path) -> None:
    with pytest.raises(QccError, match=r"tokenizer\.json is missing"):
        Tokenizer(tmp_path, {})
    tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(QccError, match=r"generation_config\.json: holds no JSON object"):
        Tokenizer(tmp_path, {})
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(QccError, match=r"tokenizer\.json: the tokenizers library cannot read it"):
        Tokenizer(tmp_path, {})


def test_a_panic_of_the_tokenizers_library_is_an_error(tmp_path: Path) -> None:
    """Its Rust code panics on these; Python sees a BaseException that is no Exception."""
    tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    good = json.loads(path.read_text(encoding="utf-8"))
    charsmap = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    path.write_text(json.dumps({**good, "normalizer": charsmap}), encoding="utf-8")
    with pytest.raises(QccError, match=r"tokenizer\.json: the tokenizers library cannot read it"):
        Tokenizer(tmp_path, {})
    unknown = {"SpecialToken": {"id": "<q>", "type_id": 0}}
    post = {"type": "TemplateProcessing", "single": [unknown], "pair": [], "special_tokens": {}}
    path.write_text(json.dumps({**good, "post_processor": post}), encoding="utf-8")
    with pytest.raises(QccError, match=r"tokenizer\.json: the tokenizers library cannot encode"):
        Tokenizer(tmp_path, {}).encode("hello")
