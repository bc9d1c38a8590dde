"""Embedder: batches, prompts, cut texts, fewer dimensions, on a tiny BERT; and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcc.runtime import LLM, Embedder
from qcc.runtime.engine.embedder import similarities, unit
from qcc.runtime.engine.memory import budget
from qcc.runtime.engine.tokenizer import Tokenizer
from qcc.runtime.errors import QccError

from ..conftest import write_tokenizer
from ..embeddings import BEGIN, BERT, END, TEXTS, reference_vectors, save_embedding

PROMPTS = {"query": "Find: ", "document": ""}
SIZES = {"context_window": 48, "prefill_chunk": 100, "max_batch": 3}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_embedding(tmp_path_factory.mktemp("bert"), "bert", BERT, "mean", prompts=PROMPTS)


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from qcc.compiler.driver import compile_model
    from qcc.compiler.options import CompileOptions
    from qcc.compiler.sizes import SizeFlags

    options = CompileOptions(quant="q0f32", sizes=SizeFlags(**SIZES))
    return compile_model(str(source), tmp_path_factory.mktemp("artifact") / "bert", options)


@pytest.fixture(scope="module")
def embedder(folder: Path) -> Embedder:
    return Embedder(folder, precision="high")


def short(embedder: Embedder) -> list[str]:
    """The texts that the window holds."""
    found = [text for text in TEXTS if len(text) + 2 <= embedder.window]
    assert len(found) >= 2
    return found


def test_texts_to_vectors(embedder: Embedder, source: Path, tolerance: float) -> None:
    """From the text on, special tokens included: transformers on the same tokenizer.json."""
    from transformers import PreTrainedTokenizerFast

    texts = short(embedder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json"))
    tokens = tokenizer(texts)["input_ids"]
    assert embedder.tokenize(texts) == tokens
    expected = reference_vectors(source, tokens, "mean", True)
    found = embedder.embed(texts)
    assert found.dtype == np.float32 and found.shape == (len(texts), 60)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * 0.3)


def test_a_batch_is_its_texts(embedder: Embedder, some_ids: Any, same_library: float) -> None:
    """More texts than one pass takes, by number and by tokens; in their order."""
    lengths = [48, 48, 3, 1, 1, 1, 1, 40, 20, 48, 5]
    tokens = [some_ids(length, seed=seed) for seed, length in enumerate(lengths)]
    passes = [list(map(len, part)) for part in embedder._passes(tokens)]
    assert passes == [[48, 48, 3], [1, 1, 1], [1, 40, 20], [48, 5]]
    together = embedder.encode(tokens)
    alone = np.concatenate([embedder.encode([ids]) for ids in tokens])
    np.testing.assert_allclose(together, alone, rtol=0, atol=same_library * 0.3)
    away = np.abs(together - together[0]).max(axis=1)
    assert away[1:].min() > 0.01, "the texts are too much alike to show that they were mixed up"


def test_no_texts(embedder: Embedder) -> None:
    assert embedder.embed([]).shape == (0, 60)


def test_a_prompt_goes_before_each_text(embedder: Embedder) -> None:
    plain = embedder.embed(["Find: a cat", "Find: y"])
    np.testing.assert_array_equal(embedder.embed(["a cat", "y"], "query"), plain)
    np.testing.assert_array_equal(embedder.embed(["Find: a cat", "Find: y"], "document"), plain)
    with pytest.raises(QccError, match="prompt 'qery': the model has query, document"):
        embedder.embed("a cat", "qery")


def test_the_default_prompt(folder: Path, embedder: Embedder) -> None:
    usage = dataclasses.replace(embedder.usage, default_prompt="query")
    assert usage.prompt(None) == "Find: " and usage.prompt("document") == ""
    assert embedder.usage.prompt(None) == ""


def test_a_long_text_is_cut(embedder: Embedder) -> None:
    """Its tokens from the front, and the last token of all texts at the end."""
    text = "abcdefgh" * 20
    with pytest.warns(UserWarning, match="text 2 has 162 tokens, the window is 48: its end is cut"):
        _, cut = embedder.tokenize(["x", text])
    whole = embedder.tokenizer.encode(text)
    assert cut == [*whole[:47], END] and cut[0] == BEGIN and whole[-1] == END
    assert len(embedder.tokenizer.encode(text)) == 162  # and other texts are not cut
    with pytest.raises(QccError, match="text 1 has 162 tokens, the window is 48; compile with a"):
        embedder.embed(text, truncate=False)


def test_special_tokens_that_tokenizer_json_lacks(tmp_path: Path) -> None:
    """As tokenizer_config.json says; a text that is cut has them as well."""
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    for added, before, after in (
        ({"add_bos_token": False}, [], []),
        ({"add_bos_token": True, "add_eos_token": True}, [BEGIN], [END]),
        ({"add_bos_token": False, "add_eos_token": True}, [], [END]),
    ):
        path.write_text(json.dumps({**fields, **added}), encoding="utf-8")
        tokenizer = Tokenizer(tmp_path, {})
        plain = tokenizer.encode_rendered("abcdef")
        whole = [*before, *plain, *after]
        assert tokenizer.encode_within("abcdef", len(whole)) == (whole, len(whole))
        special = len(before) + len(after)
        for limit in range(max(special, 1), len(whole)):
            cut = [*before, *plain[: limit - special], *after]
            assert tokenizer.encode_within("abcdef", limit) == (cut, len(whole))
        if special:
            assert tokenizer.encode_within("", 5) == ([*before, *after], special)
            with pytest.raises(QccError, match=f"a text has {special} special tokens, at most "):
                tokenizer.encode_within("abcdef", special - 1)


def test_special_tokens_of_tokenizer_json_alone(embedder: Embedder) -> None:
    within = embedder.tokenizer.encode_within
    assert within("abcdef", 2) == ([BEGIN, END], 8) and within("", 2) == ([BEGIN, END], 2)
    with pytest.raises(QccError, match="a text has 2 special tokens, at most 1 tokens fit"):
        within("abcdef", 1)


def test_fewer_dimensions(embedder: Embedder) -> None:
    whole, cut = (embedder.embed(TEXTS[:2], dimensions=n) for n in (None, 7))
    lengths = np.linalg.norm(whole[:, :7], axis=1, keepdims=True)
    np.testing.assert_allclose(cut, whole[:, :7] / lengths, atol=1e-6)
    for wrong in (0, 61):
        with pytest.raises(QccError, match=f"dimensions {wrong}: the model has 1 to 60"):
            embedder.embed("x", dimensions=wrong)


def test_tokens_that_cannot_be(embedder: Embedder) -> None:
    """The library checks nothing: beyond its bounds it would read what is not there."""
    for ids, text in (
        ([], "text 2 has 0 tokens, it must have 1 to 48"),
        ([5] * 49, "text 2 has 49 tokens"),
        ([5, 361], "text 2: the model has token ids 0 to 360"),
        ([-1], "token ids 0 to 360"),
    ):
        with pytest.raises(QccError, match=text):
            embedder.encode([[5], ids])


def test_similarities() -> None:
    vectors = np.array([[3.0, 4.0], [-4.0, 3.0], [30.0, 40.0], [0.0, 0.0]], np.float32)
    expected = [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(similarities(vectors), expected, atol=1e-7)
    np.testing.assert_allclose(unit(vectors)[0], [0.6, 0.8])


def test_too_little_memory(
    folder: Path, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before the weights are touched; one byte more is enough."""
    need = budget(embedder.library.metadata, SIZES["max_batch"], 0).total
    assert need > embedder.library.metadata.weight_bytes
    monkeypatch.setattr("qcc.runtime.engine.device.available_bytes", lambda: need - 1)
    with pytest.raises(QccError, match=r"the model needs .* smaller --context-window than 48"):
        Embedder(folder)
    monkeypatch.setattr("qcc.runtime.engine.device.available_bytes", lambda: need)
    Embedder(folder)


def test_wrong_kinds_of_artifacts(
    folder: Path, checkpoint: Any, compiled: Any, tmp_path: Path
) -> None:
    llm = compiled(checkpoint("llama"))
    with pytest.raises(QccError, match="not an embedding model; use qcc generate"):
        Embedder(llm.artifact.folder)
    with pytest.raises(QccError, match="an embedding model writes no text; use qcc embed"):
        LLM(folder)
    with pytest.raises(QccError, match="--device cuda: must be cpu or vulkan"):
        Embedder(folder, device="cuda")


def test_a_damaged_configuration(folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    path = copy / "mlc-chat-config.json"
    chat = json.loads(path.read_text(encoding="utf-8"))
    assert chat["model_task"] == "embedding"
    for damaged in (None, [], {**chat["embedding"], "prompts": 3}):
        path.write_text(json.dumps({**chat, "embedding": damaged}), encoding="utf-8")
        with pytest.raises(QccError, match=r"mlc-chat-config.json: embedding is not usable"):
            Embedder(copy)
