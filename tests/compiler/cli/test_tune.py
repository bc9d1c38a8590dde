"""qcc tune on a tiny checkpoint: a scheme that compile takes, a page, and wrong flags."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from qcc.quant_schemes.scheme import load_scheme

TEXT = "A fox jumps over a lazy dog, again and again. " * 30

# Of the tied embedding, q, k, v, o, gate, up and down of one layer.
WEIGHTS = 361 * 64 + 2 * 64 * 64 + 2 * 32 * 64 + 3 * 172 * 64


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def tune(cli: Any, model: Path, text: Path, *flags: object) -> Any:
    return cli(
        *("tune", model, "--calib", text, "--tokens", 128, "--formats", "2/32a,4/32,8/32a", *flags)
    )


def test_tune_end_to_end(cli: Any, checkpoint: Any, text: Path, tmp_path: Path) -> None:
    """Its scheme has the sources' own formats; the artifact has the size that was asked for."""
    model, out = checkpoint("llama", num_hidden_layers=1), tmp_path / "tuned.yaml"
    ran = tune(cli, model, text, "--target-bpw", 5.5, "-o", out)
    assert ran.status == 0, ran.err
    page = out.with_suffix(".html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "<svg" in page
    assert "http" not in page.replace("http://www.w3.org/", "")
    scheme = load_scheme(str(out))
    assert {fmt.bits for _, fmt in scheme.rules} | {scheme.embedding.bits} <= {2, 4, 8}
    lines = ran.out.splitlines()
    uniform = [line.split() for line in lines if " uniform " in line]
    assert [words[-1] for words in uniform if words[-1] != "chosen"][-1] == "8/32a"
    (chosen,) = [line.split() for line in lines if line.endswith("<- chosen")]
    assert float(chosen[0]) <= 5.5
    below = [float(words[1]) for words in uniform if float(words[0]) <= float(chosen[0])]
    assert below and float(chosen[1]) <= min(below)
    assert lines[-1] == f"use it: qcc compile {model} --quant {out} --method gptq -o DIR"
    # What it leaves is taken, and takes as many bits as the table says.
    ran = cli("convert", model, "--quant", out, "-o", tmp_path / "out")
    assert ran.status == 0, ran.err
    cache = json.loads((tmp_path / "out" / "tensor-cache.json").read_text(encoding="utf-8"))
    sizes = {r["name"]: r["nbytes"] for shard in cache["records"] for r in shard["records"]}
    bits = 8 * sum(size for name, size in sizes.items() if ".q_" in name)
    assert bits / WEIGHTS == pytest.approx(float(chosen[0]), abs=1e-3)
    kept = json.loads((tmp_path / "out" / "qcc.json").read_text(encoding="utf-8"))["tuned_on"]
    assert kept == f"text.txt, sha256 {hashlib.sha256(TEXT.encode()).hexdigest()}"


def test_target_bytes_counts_all_that_is_stored(
    cli: Any, checkpoint: Any, text: Path, tmp_path: Path
) -> None:
    """Fixed entries and norms too; --fused keeps one format for q, k and v."""
    model, out = checkpoint("llama", num_hidden_layers=1), tmp_path / "t.yaml"
    flags = ["--embedding", "8/row", "--fused", "--no-curve"]
    ran = tune(cli, model, text, "--target-bytes", "60K", *flags, "-o", out)
    assert ran.status == 0, ran.err
    scheme = load_scheme(str(out))
    assert scheme.embedding.group == "row"
    assert not [rule for rule, _ in scheme.rules if "q_proj" in rule or "gate_proj" in rule]
    ran = cli("convert", model, "--quant", out, "-o", tmp_path / "out")
    assert ran.status == 0, ran.err
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("params_shard_*"))
    assert 52_000 < size <= 60_000


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (
            ["--target-bpw", "2"],
            "the target is 2.00 bits a weight; with these formats the least",
        ),
        (["--target-bpw", "0.5"], "--target-bpw 0.5: must be from 1 to 16"),
        (["--target-bpw", "nan"], "--target-bpw nan: must be from 1 to 16"),
        (["--target-bytes", "many"], "--target-bytes 'many': a number of bytes, as 600M or 1.5G"),
        (["--target-bytes", "nan"], "--target-bytes nan: "),
        (
            ["--target-bytes", "1K"],
            "the target is 0.07 bits a weight; with these formats",
        ),
        (
            ["--target-bytes", "1K", "--embedding", "8/32"],
            "--target-bytes 1K: what is not tuned alone takes 24,932 bytes",
        ),
        (["--target-bytes", ""], "--target-bytes '': a number of bytes"),
        (["--target-bpw", "4", "--formats", "4/32,9/32"], "--formats: format: 9 bits; quantized"),
        (["--target-bpw", "4", "--formats", "float"], "--formats 'float': give quantized formats"),
        (["--target-bpw", "4", "--formats", ","], "--formats ',': give quantized formats"),
        (["--target-bpw", "4", "--embedding", "4/33"], "--embedding: format: group 33"),
        (["--target-bpw", "4", "--lm-head", "8/32"], "--lm-head: the model has no lm_head of its"),
        (["--target-bpw", "4", "--tokens", "0"], "--tokens 0: must be 128 or more"),
        (["--target-bpw", "4", "-o", "scheme.txt"], "-o scheme.txt: a scheme file ends in .yaml"),
        (
            ["--target-bpw", "4", "-o", "/nowhere/x.yaml"],
            "-o /nowhere/x.yaml: there is no folder",
        ),
        ([], "one of the arguments --target-bpw --target-bytes is required"),
        (["--target-bpw", "4", "--target-bytes", "1M"], "not allowed with argument"),
        (["--target-bpw", "4", "--calib", "/nowhere.txt"], "/nowhere.txt: cannot read"),
    ],
)
def test_wrong_flags(
    cli: Any, checkpoint: Any, text: Path, tmp_path: Path, monkeypatch: Any, flags: Any, error: str
) -> None:
    """One line, no file, and before anything is compiled or measured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qcc.compiler.cli._swap.SwappableModel", None)
    found = tune(cli, checkpoint("llama", num_hidden_layers=1), text, *flags).error()
    assert error in found
    assert not list(tmp_path.iterdir())


def test_nothing_to_tune(cli: Any, checkpoint: Any, text: Path) -> None:
    """A missing model, and --calib text that is no text."""
    assert "no such folder" in tune(cli, Path("/nowhere"), text, "--target-bpw", 4).error()
    text.with_name("empty.txt").write_text("")
    found = tune(cli, checkpoint("llama"), text.with_name("empty.txt"), "--target-bpw", 4).error()
    assert "the file is empty" in found
