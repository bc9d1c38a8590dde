"""qcc embed: where texts come from, the table, JSON and arrays, and its errors."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ...embeddings import BERT, TEXTS, reference_vectors, save_embedding


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    return save_embedding(folder, "bert", BERT, "mean", prompts={"query": "Find: "})


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from qcc.compiler.driver import compile_model
    from qcc.compiler.options import CompileOptions
    from qcc.compiler.sizes import SizeFlags

    options = CompileOptions(quant="q8f16_1", sizes=SizeFlags(context_window=96))
    return compile_model(str(source), tmp_path_factory.mktemp("artifact") / "bert", options)


def test_table(cli: Any, folder: Path) -> None:
    """Cosines of each two, and the texts beside their rows, long ones cut."""
    ran = cli("embed", folder, *TEXTS[:3])
    head, columns, *rows = ran.out.splitlines()
    assert (ran.status, ran.err, head) == (0, "", "3 vectors of 60 numbers")
    assert columns.split() == ["cosine", "1", "2", "3"]
    cosines = np.array([[float(x) for x in row[6:27].split()] for row in rows])
    assert (np.diag(cosines) == 1).all() and (cosines == cosines.T).all()
    assert rows[0].endswith("   a cat on a mat")
    assert rows[2].endswith("   The seven green bottles that hang on ...")
    from qcc.runtime import Embedder

    vectors = Embedder(folder).embed(TEXTS[:3]).astype(np.float64)
    assert np.abs(vectors @ vectors.T - cosines).max() < 6e-4


def test_precisions(cli: Any, folder: Path, source: Path, tmp_path: Path) -> None:
    """Low precision, of few rows and of many, is off by less than weights of 8 bits are."""
    from qcc.runtime import Embedder

    texts = [TEXTS[1], TEXTS[2]]
    expected = reference_vectors(source, Embedder(folder).tokenize(texts), "mean", True)
    for text, theirs in zip(texts, expected.astype(np.float64), strict=True):
        vectors = []
        for precision in ("high", "low"):
            file = tmp_path / f"{precision}.npy"
            assert cli("embed", folder, "--precision", precision, "--npy", file, text).status == 0
            vectors.append(np.load(file)[0].astype(np.float64))
        high, low = vectors
        assert 0 < np.abs(high - low).max()
        assert 1 - high @ low < 1 - high @ theirs, text


def test_one_text(cli: Any, folder: Path) -> None:
    head, line = cli("embed", folder, "a cat").out.splitlines()
    assert head == "1 vector of 60 numbers"
    assert line.startswith("  [") and line.endswith(", ...]  a cat")


def test_json_and_array(cli: Any, folder: Path, tmp_path: Path) -> None:
    """The same numbers; --prompt counts in the tokens."""
    flags = ("--prompt", "query", "--dimensions", "12")
    found = json.loads(cli("embed", folder, *flags, "--json", "--similarity", *TEXTS[:2]).out)
    assert found["texts"] == TEXTS[:2] and found["dimensions"] == 12
    assert found["tokens"] == [len("Find: ") + len(text) + 2 for text in TEXTS[:2]]
    vectors = np.array(found["embeddings"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(vectors @ vectors.T, found["similarity"], atol=2e-6)
    file = tmp_path / "out.npy"
    ran = cli("embed", folder, *flags, "--npy", file, *TEXTS[:2])
    assert ran.out == f"2 vectors of 12 numbers in {file}\n"
    array = np.load(file)
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, vectors.astype(np.float32))
    both = json.loads(cli("embed", folder, "--npy", file, "--json", "x").out)
    assert both["npy"] == str(file) and "embeddings" not in both


def test_texts_of_a_file(
    cli: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text a line, blank ones left out, behind those of the command line."""
    file = tmp_path / "lines.txt"
    file.write_text("eins\n\n  \nzwölf Boxkämpfer\r\n", encoding="utf-8")
    found = json.loads(cli("embed", folder, "null", "--file", file, "--json").out)
    assert found["texts"] == ["null", "eins", "zwölf Boxkämpfer"]
    odd = ["a\u2028b", "c\x85d", "e\x0cf", "g"]
    file.write_bytes("\ufeffa\u2028b\nc\x85d\r\ne\x0cf\rg".encode())
    found = json.loads(cli("embed", folder, "--file", file, "--json").out)
    assert found["texts"] == odd
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"a\nb\n")))
    assert json.loads(cli("embed", folder, "--file", "-", "--json").out)["texts"] == ["a", "b"]


def test_a_cut_text_is_a_warning(cli: Any, folder: Path) -> None:
    ran = cli("embed", folder, "x" * 200, "--json")
    assert ran.status == 0 and json.loads(ran.out)["tokens"] == [96]
    warning = "qcc: warning: text 1 has 202 tokens, the window is 96: its end is cut off"
    assert ran.err.splitlines() == [warning]
    text = cli("embed", folder, "x" * 200, "--no-truncate").error()
    assert "text 1 has 202 tokens, the window is 96" in text


def test_a_checkpoint_is_compiled_first(cli: Any, source: Path) -> None:
    ran = cli("embed", source, "one", "two")
    assert ran.status == 0 and ran.out.startswith("2 vectors of 60 numbers\n")
    assert "Build the cpu library" in ran.err


def test_errors(cli: Any, folder: Path, tmp_path: Path, checkpoint: Any, compiled: Any) -> None:
    llama = compiled(checkpoint("llama")).artifact.folder
    latin = tmp_path / "latin.txt"
    latin.write_bytes("zwölf".encode("latin-1"))
    for words, text in (
        ((folder,), "no text: give TEXT ..., or --file LINES"),
        ((folder, "--file", tmp_path / "none"), "none: cannot read: No such file"),
        ((folder, "--file", latin), "latin.txt: not UTF-8 text"),
        ((folder, "\udcff"), "a text is not UTF-8"),
        ((folder, "x", "--prompt", "document"), "prompt 'document': the model has query"),
        ((folder, "x", "--dimensions", "0"), "dimensions 0: the model has 1 to 60"),
        ((folder, "x", "--npy", tmp_path / "no" / "a.npy"), "a.npy: cannot write: No such file"),
        ((folder, "x", "--threads", "0"), "--threads 0: must be 1 or more"),
        ((llama, "x"), "not an embedding model; use qcc generate"),
        ((tmp_path / "nothing", "x"), "nothing"),
    ):
        assert text in cli("embed", *words).error(), words
    for verb in ("generate", "chat"):
        assert "an embedding model writes no text; use qcc embed" in cli(verb, folder, *(
            ["x"] if verb == "generate" else []
        )).error()  # fmt: skip


def test_what_compile_and_show_say(cli: Any, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    how = ("--quant", "q4f16_1", "--context-window", "32", "--precision", "high")
    ran = cli("compile", source, *how, "-o", out)
    assert ran.out == f'{out}: run it with `qcc embed {out} "a text" "another"`\n'
    shown = cli("show", out).out
    assert "embedding" in shown and "encode" in shown and "KV cache" not in shown
    facts = json.loads(cli("show", source, "--json").out)
    assert (facts["task"], facts["kv_bytes"]) == ("embedding", 0)


def test_eval_of_vectors(cli: Any, folder: Path, source: Path, tmp_path: Path) -> None:
    """Cosines with transformers' vectors of the same tokens, worked out here."""
    from qcc.runtime import Embedder

    lines = tmp_path / "lines.txt"
    lines.write_text("\ufeff" + "\n\n".join(TEXTS[:3]), encoding="utf-8")
    words = ("eval", folder, "--against", source, "--text", lines)
    found = json.loads(cli(*words, "--json").out)
    (row,) = found["artifacts"]
    embedder = Embedder(folder)
    tokens = embedder.tokenize(TEXTS[:3])
    ours = embedder.encode(tokens).astype(np.float64)
    theirs = reference_vectors(source, tokens, "mean", True).astype(np.float64)
    cosines = (ours * theirs).sum(axis=1)
    assert 1e-7 < 1 - cosines.mean() < 1e-3, "8 bits are not exact, and not far off"
    assert (row["texts"], row["tokens"]) == (3, sum(map(len, tokens)))
    assert abs(row["cosine"] - cosines.mean()) < 2e-7
    assert abs(row["least"] - cosines.min()) < 2e-7
    assert abs(row["pairs"] - np.abs(ours @ ours.T - theirs @ theirs.T).mean()) < 2e-7
    text = cli(*words, "--max-tokens", "30").out
    assert "cosine with the original 0.99" in text and "(2 texts, 19 tokens)" in text


def test_what_eval_refuses(
    cli: Any, folder: Path, source: Path, tmp_path: Path, checkpoint: Any, compiled: Any
) -> None:
    lines, llama = tmp_path / "lines.txt", checkpoint("llama")
    lines.write_text(" \n", encoding="utf-8")
    for words, text in (
        ((folder,), "measured against its original: --against MODEL"),
        ((folder, "--against", source), "no text in it; each line is one"),
        ((folder, "--against", source, "--layers"), "--layers: not for embedding models"),
        ((folder, "--against", source, "--save-logits", "f"), "--save-logits: not for embedding"),
        ((folder, "--against", source, "--reference", "qcc"), "--reference qcc: not for embedding"),
        ((folder, compiled(llama).artifact.folder), "others write text: they do not compare"),
    ):
        assert text in cli("eval", *words, "--text", lines).error(), words
    lines.write_text("a cat\n", encoding="utf-8")
    text = cli("eval", folder, "--against", llama, "--text", lines).error()
    assert "was not compiled from" in text


def test_compile_measures(cli: Any, source: Path, tmp_path: Path) -> None:
    lines, out = tmp_path / "lines.txt", tmp_path / "out"
    lines.write_text("a cat\na dog\n", encoding="utf-8")
    how = ("--quant", "q4f16_1", "--precision", "high")
    ran = cli("compile", source, *how, "--eval", lines, "-o", out)
    assert ran.status == 0 and "q4f16_1: cosine with the original 0.9" in ran.out
    words = ("compile", source, "--eval", lines, "--lora", tmp_path, "-o", tmp_path / "none")
    assert "--eval of an embedding model with --lora is not implemented" in cli(*words).error()
    assert not (tmp_path / "none").exists()
