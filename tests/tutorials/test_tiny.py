"""The bundled model: its shapes and size, its text, its tokenizer, and that it has learnt."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import jinja2
import pytest
from tokenizers import Tokenizer

from qcc.tutorials.tiny import HELDOUT, MODEL_DIR
from qcc.tutorials.tiny import words as w
from qcc.tutorials.tiny.chat import Turn, render
from qcc.tutorials.tiny.make_text import (
    HELDOUT_SEED,
    TRAIN_SEED,
    chats,
    read,
    stories,
    story,
    write,
)

MAX_BYTES = 8_000_000


def load(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((MODEL_DIR / name).read_text(encoding="utf-8"))
    return data


def header() -> dict[str, Any]:
    """The JSON header of the safetensors file: u64 length, then that many bytes."""
    with (MODEL_DIR / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        data: dict[str, Any] = json.loads(file.read(length))
    return data


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))


def test_sizes_suit_every_block_format() -> None:
    config = load("config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    assert config["torch_dtype"] == "bfloat16"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["hidden_size"] % 256 == 0 and config["intermediate_size"] % 256 == 0
    assert config["num_attention_heads"] * config["head_dim"] == config["hidden_size"]
    assert config["vocab_size"] == 1024


def test_embedding_is_tied_and_parameters_are_counted() -> None:
    tensors = header()
    assert tensors.pop("__metadata__") == {"format": "pt"}
    assert load("config.json")["tie_word_embeddings"] is True
    assert "lm_head.weight" not in tensors
    assert {t["dtype"] for t in tensors.values()} == {"BF16"}
    assert sum(math.prod(t["shape"]) for t in tensors.values()) == 3_214_080


def test_folder_stays_small() -> None:
    files = [f for f in MODEL_DIR.parent.rglob("*") if f.is_file() and f.suffix != ".pyc"]
    assert sum(f.stat().st_size for f in files) <= MAX_BYTES
    assert 20_000 <= HELDOUT.stat().st_size <= 60_000


@pytest.mark.parametrize(
    "text",
    [
        "Once upon a time, there was a fox.",
        "  two  spaces\tand\r\nlines\n\n",
        "Grüße, naïve café: 狐と凧, 🦊🪁 \u200d\u0301 — \x00\x7f",
        story(TRAIN_SEED, 0),
    ],
)
def test_tokenizer_gives_any_text_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert ids[0] == 0 and max(ids) < 1024
    assert tokenizer.decode(ids) == text


def test_special_tokens_are_single_tokens_at_the_ids_that_the_configs_name(
    tokenizer: Tokenizer,
) -> None:
    names = ["<|startoftext|>", "<|endoftext|>", "<|end|>", "<|system|>", "<|user|>",
             "<|assistant|>"]  # fmt: skip
    assert [tokenizer.encode(n, add_special_tokens=False).ids for n in names] == [
        [i] for i in range(6)
    ]
    assert load("config.json")["bos_token_id"] == 0
    assert load("generation_config.json")["eos_token_id"] == [1, 2]
    assert load("special_tokens_map.json")["eos_token"] == names[1]


def test_chat_template_writes_what_the_model_was_trained_on() -> None:
    config = load("tokenizer_config.json")
    turns = [Turn("system", "Be kind."), Turn("user", "Hi!"), Turn("assistant", "Hello!")]
    template = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(
        config["chat_template"]
    )
    messages = [{"role": t.role, "content": t.text} for t in turns]
    told = {"messages": messages, "bos_token": config["bos_token"]}
    text = template.render(**told, add_generation_prompt=False)
    assert text == "<|startoftext|>" + render(turns)
    assert text.endswith("<|assistant|>Hello!<|end|>")
    assert template.render(**told, add_generation_prompt=True) == text + "<|assistant|>"


def test_text_depends_on_the_seed_alone() -> None:
    first = list(stories(7, 20))
    assert first == list(stories(7, 30))[:20]
    assert first != list(stories(8, 20))
    assert list(chats(7, 5)) == list(chats(7, 5))
    assert all(80 <= len(s.split()) <= 250 for s in first)


def test_numbers_in_words() -> None:
    assert [w.number(n) for n in (0, 7, 13, 20, 42, 100, 135)] == [
        "zero", "seven", "thirteen", "twenty", "forty-two", "one hundred",
        "one hundred and thirty-five",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"200 is outside 0\.\.199"):
        w.number(200)
    assert w.count(1, ("leaf", "leaves")) == "one leaf"
    assert w.a("owl") == "an owl" and w.a("fox") == "a fox"


def test_sums_in_the_stories_are_right() -> None:
    value = {w.number(n): n for n in range(200)}
    seen = 0
    for text in stories(TRAIN_SEED, 600):
        for words in text.replace('"', "").split("."):
            left, minus, rest = words.strip().lower().partition(" minus ")
            if minus:
                right, _, result = rest.partition(" is ")
                assert value[left] - value[right] == value[result.split(",")[0].split(" ")[0]]
                seen += 1
    assert seen > 20


def test_heldout_is_not_in_the_training_text(tmp_path: Path) -> None:
    heldout = read(HELDOUT)
    assert len(heldout) >= 20
    assert heldout[0] == story(HELDOUT_SEED, 0)
    assert not set(heldout) & set(stories(TRAIN_SEED, 5000))
    copy = tmp_path / "copy.txt"
    assert write(copy, iter(heldout)) == len(heldout)
    assert copy.read_bytes() == HELDOUT.read_bytes()


def test_rows_hold_whole_documents(tokenizer: Tokenizer) -> None:
    pytest.importorskip("torch", reason="train.py needs torch")
    pytest.importorskip("transformers", reason="train.py needs transformers")
    from qcc.tutorials.tiny.train import encode, pack, positions

    documents = encode(tokenizer, [*stories(TRAIN_SEED, 20), *chats(TRAIN_SEED, 20)])
    x, y = pack(documents, seed=0)
    assert x.shape == y.shape and x.shape[1] == 512
    assert (x[:, 0] == 0).all(), "every row starts with BOS"
    assert (x == 0).sum() == len(documents), "no document is lost or cut"
    assert (y == 0).sum() == 0, "BOS is not learnt"
    assert (positions(x)[x == 0] == 0).all()
    ids, labels = encode(tokenizer, [render([Turn("user", "Hi!"), Turn("assistant", "Hello!")])])[0]
    answer = ids.index(5) + 1  # after <|assistant|>
    assert labels == [-1] * answer + ids[answer:], "what the user says is not learnt"


def test_model_has_learnt() -> None:
    """Perplexity of the stored bf16 weights in fp32 against an add-one unigram model."""
    pytest.importorskip("torch", reason="the figures of the tiny model need torch")
    pytest.importorskip("transformers", reason="the figures of the tiny model need transformers")
    from qcc.tutorials.tiny.figures import measure

    figures = measure(MODEL_DIR, HELDOUT, stories(TRAIN_SEED, 2000))
    assert figures.tokens > 8000
    assert figures.ratio >= 20, figures
    assert figures.model > 1.2, "the stories are so easy that quantization could not hurt"
