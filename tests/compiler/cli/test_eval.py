"""qcc eval on the command line: what it prints, writes, keeps, finds and refuses."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TEXT = "One sunny day a small dog went out to play. " * 8 + "<|endoftext|>" + "The end of it. " * 5


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "t.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def artifact(checkpoint: Any, compiled: Any) -> Path:
    """Not to be changed."""
    folder: Path = compiled(checkpoint("llama"), "q4f16_1", low=True).artifact.folder
    return folder


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    """A copy that may be spoilt."""
    folder = tmp_path / "copy"
    shutil.copytree(artifact, folder)
    return folder


def edit(path: Path, **fields: Any) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**data, **fields}), encoding="utf-8")


def overwrite(folder: Path, name: str, change: Any) -> None:
    """Change a stored tensor in place, and the checksum of its shard."""
    path = folder / "tensor-cache.json"
    cache = json.loads(path.read_text(encoding="utf-8"))
    shard, record = next(
        (s, r) for s in cache["records"] for r in s["records"] if r["name"] == name
    )
    data = bytearray((folder / shard["dataPath"]).read_bytes())
    array = np.frombuffer(
        data, record["dtype"], int(np.prod(record["shape"])), record["byteOffset"]
    )
    change(array.reshape(record["shape"]))
    (folder / shard["dataPath"]).write_bytes(data)
    shard["md5sum"] = hashlib.md5(data).hexdigest()
    path.write_text(json.dumps(cache), encoding="utf-8")


def last_object(ran: Any) -> dict[str, Any]:
    assert ran.status == 0, ran.err
    found: dict[str, Any] = json.loads(ran.out.splitlines()[-1])
    return found


def test_json_of_two_artifacts_side_by_side(
    artifact: Path, checkpoint: Any, compiled: Any, cli: Any, text: Path
) -> None:
    """The first one's figures on top, both under `artifacts`; the protocol and its sums."""
    model = checkpoint("llama")
    other = compiled(model, "q0f32").artifact.folder
    words = ("--against", model, "--text", text, "--precision", "high", "--json")
    ran = cli("eval", artifact, other, *words)
    found = last_object(ran)
    assert len(ran.out.splitlines()) == 1
    first, second = found["artifacts"]
    assert (first["artifact"], second["artifact"]) == (str(artifact), str(other))
    assert (first["scheme"], first["method"]) == ("q4f16_1", "rtn")
    for key in ("perplexity", "kl_divergence", "top1", "artifact", "bits_per_weight"):
        assert found[key] == first[key]
    assert set(found["kl_divergence"]) == {"mean", "se", "median", "p99"}
    assert second["kl_divergence"]["mean"] < 1e-6 < first["kl_divergence"]["mean"]
    assert second["top1"] == 1.0 and second["bits_per_weight"] == 32.0
    assert 4.5 < first["linear_bits_per_weight"] < first["bits_per_weight"] < 5
    assert found["text"] == {"name": "t.txt", "sha256": hashlib.sha256(TEXT.encode()).hexdigest()}
    protocol = found["protocol"]
    assert (protocol["context"], protocol["documents"], protocol["bos"]) == (256, 2, 1)
    assert found["positions"] == found["tokens"] - protocol["windows"]
    assert found["reference"].startswith("transformers")
    assert not first["warnings"]


def test_without_a_model_it_tells_the_perplexity_alone(
    artifact: Path, cli: Any, text: Path
) -> None:
    found = last_object(cli("eval", artifact, "--text", text, "--json"))
    assert found["perplexity"] > 1 and found["reference"] is None
    assert "kl_divergence" not in found
    ran = cli("eval", artifact, "--text", text)
    assert "none: perplexity alone" in ran.out
    assert "windows of BOS (id 1) and 255 tokens without overlap" in ran.out


def test_our_own_float_library_as_the_reference(
    artifact: Path, checkpoint: Any, cli: Any, text: Path
) -> None:
    """It says which one it is, and it is what transformers is."""
    words = ("eval", artifact, "--against", checkpoint("llama"), "--text", text, "--json")
    ours = last_object(cli(*words, "--reference", "qcc"))
    theirs = last_object(cli(*words, "--reference", "transformers"))
    assert ours["reference"].startswith("qcc q0f32, ")
    for key in ("mean", "median"):
        wanted = theirs["kl_divergence"][key]
        assert ours["kl_divergence"][key] == pytest.approx(wanted, rel=1e-3)


class _Page(HTMLParser):
    """What a page would load, and its rows by table."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tables: list[int] = []
        self.pictures = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [f"{tag} {k}" for k, v in attrs if k in ("src", "href") and v]
        self.pictures += tag == "svg"
        if tag == "table":
            self.tables.append(-1)  # the head
        if tag == "tr":
            self.tables[-1] += 1


def test_shares_of_the_damage_and_the_page(
    artifact: Path, checkpoint: Any, compiled: Any, cli: Any, text: Path, tmp_path: Path
) -> None:
    """Every quantized weight has a share, together 1; the page shows them and loads nothing."""
    model, path = checkpoint("llama"), tmp_path / "report.html"
    other = compiled(model, "q0f32").artifact.folder
    words = (artifact, other, "--against", model, "--text", text)
    ran = cli("eval", *words, "--tensors", "--json", "--html", path)
    tensors = last_object(ran)["tensors"]
    assert sum(tensor["share"] for tensor in tensors) == pytest.approx(1.0)
    assert all(tensor["kl"] > 0 and tensor["format"] == "4/32" for tensor in tensors)
    assert len(tensors) == 9  # four a layer, and the embedding
    html = path.read_text(encoding="utf-8")
    page = _Page()
    page.feed(html)
    assert page.loads == [] and "url(" not in html and "@import" not in html
    assert page.tables == [2, 9] and page.pictures == 3
    assert hashlib.sha256(TEXT.encode()).hexdigest() in html
    assert not re.search(r"\b(nan|inf|None)\b", html.split("<script>")[0])


def test_activations_against_high_precision(
    artifact: Path, checkpoint: Any, cli: Any, text: Path, tmp_path: Path
) -> None:
    """Each way's KL(high || way), by sums of our own; the other figures are as without it."""
    from qcc.runtime import LLM
    from qcc.runtime.machine import enable_tiles

    path, content = tmp_path / "report.html", TEXT[-250:]  # each document fits one window
    text.write_text(content, encoding="utf-8")
    words = ("eval", artifact, "--against", checkpoint("llama"), "--text", text, "--kv", "int8")
    usual = last_object(cli(*words, "--json"))
    kinds = ("--activations", "--kv", "f32", "--html", path)
    found = last_object(cli(*words, *kinds, "--json"))
    for key in ("kl_divergence", "top1", "perplexity"):
        assert found[key] == usual[key]
    ways = {(w["run"], w["activations"], w["kv"]): w for w in found["activations"].pop("ways")}
    runs = [("prefill", "int8"), ("decode", "int8")]
    runs += [("prefill", "bf16 tiles")] * enable_tiles()
    expected = {(*run, kv) for run in runs for kv in ("int8", "f32")}
    assert set(ways) == expected | {("prefill", "float32", "int8")}

    high, low = (LLM(artifact, precision=name, kv="f32") for name in ("high", "low"))
    kls = []
    for document in content.split("<|endoftext|>"):
        ids = high.tokenizer.encode(document.strip())
        low.model.add_sequence(0)
        decoded = [low.model.decode([0], np.array([t], np.int32))[0].astype("f8") for t in ids]
        low.model.remove_sequence(0)
        for x, y in zip(high.logits(ids)[:-1].astype("f8"), decoded, strict=False):
            p, q = (np.exp(z - z.max()) / np.exp(z - z.max()).sum() for z in (x, y))
            kls.append((p * np.log(p / q)).sum())
    decode = ways["decode", "int8", "f32"]
    assert decode["kl_divergence"]["mean"] == pytest.approx(np.mean(kls), rel=1e-9)
    assert decode["kl_divergence"]["p99"] == pytest.approx(np.quantile(kls, 0.99), rel=1e-9)
    weights = found["activations"]["weights"]["kl_divergence"]["mean"]
    assert decode["share"] == pytest.approx(np.mean(kls) / weights)
    assert ways["prefill", "float32", "int8"]["share"] < ways["decode", "int8", "int8"]["share"]

    shown = cli(*words, "--activations", "--max-tokens", 200).out
    assert re.search(r"\n  decode +int8 +int8 +\d", shown), shown
    assert "KL(high || way)" in shown
    page = path.read_text(encoding="utf-8")
    assert "what low precision costs" in page
    assert f'data-v="{decode["kl_divergence"]["mean"]!r}"' in page
    assert "--kv: give it once, or with --activations" in cli(*words, "--kv", "f16").error()


def test_the_report_is_kept_in_the_artifact(
    copy: Path, checkpoint: Any, cli: Any, text: Path
) -> None:
    assert "\nquality" not in cli("show", copy).out
    model = checkpoint("llama")
    found = last_object(cli("eval", copy, "--against", model, "--text", text, "--json", "--store"))
    kept = json.loads((copy / "qcc.json").read_text(encoding="utf-8"))["quality"]
    assert kept["kl_divergence"] == found["kl_divergence"] and kept["text"] == found["text"]
    shown = cli("show", copy).out
    assert f"KL divergence  {kept['kl_divergence']['mean']:.5g} +- " in shown
    assert "stamp" not in shown
    assert json.loads(cli("show", copy, "--json").out)["quality"] == kept
    refused = cli("eval", copy, "--text", text, "--store").error()
    assert f"--store: {copy} holds a comparison with its original" in refused
    edit(copy / "qcc.json", quality={"perplexity": 3.0})
    assert "quality: key 'text' is missing; measure again" in cli("show", copy).error()


def test_compile_measures_what_it_made(
    checkpoint: Any, cli: Any, text: Path, tmp_path: Path
) -> None:
    out, model = tmp_path / "out", checkpoint("llama")
    how = ("--quant", "q8f16_1", "--opt", "O1", "--precision", "high")
    words = ("compile", model, *how, "-o", out, "--eval")
    assert "none.txt: cannot read" in cli(*words, tmp_path / "none.txt").error()
    assert not out.exists(), "the text is looked at first"
    ran = cli(*words, text)
    assert ran.status == 0, ran.err
    assert "KL mean" in ran.out
    assert json.loads((out / "qcc.json").read_text())["quality"]["top1"] > 0.9


def test_it_warns_of_the_calibration_text_and_of_another_source(
    copy: Path, checkpoint: Any, cli: Any, text: Path, tmp_path: Path
) -> None:
    model = checkpoint("llama")
    sums = {"name": "t.txt", "sha256": hashlib.sha256(text.read_bytes()).hexdigest()}
    edit(copy / "qcc.json", calibration=sums)
    ran = cli("eval", copy, "--against", model, "--text", text)
    assert "was calibrated on this very text (t.txt)" in ran.out
    assert "was compiled from" not in ran.out
    edit(copy / "qcc.json", calibration={**sums, "sha256": "0" * 64})
    tuned = tmp_path / "tuned"
    shutil.copytree(model, tuned)
    (tuned / "config.json").write_text((model / "config.json").read_text() + "\n")
    ran = cli("eval", copy, "--against", tuned, "--text", text)
    assert f"it was compiled from {model.name}, not from {tuned}" in ran.out
    assert "calibrated" not in ran.out


def test_layers_name_the_weights_that_are_wrong(
    copy: Path, checkpoint: Any, cli: Any, text: Path
) -> None:
    """Half of the scales of one weight lost, as by a wrong converter: the kernels are innocent."""

    def spoil(scales: Any) -> None:
        scales[::2] = 0

    overwrite(copy, "model.layers.1.mlp.down_proj.q_scale", spoil)
    words = ("eval", copy, "--against", checkpoint("llama"), "--text", text, "--layers")
    found = last_object(cli(*words, "--json"))
    said = found["findings"]
    assert said[0].startswith("kernels are right")
    assert any(
        text.startswith("WEIGHTS: model.layers.1.mlp.down_proj.weight is off") for text in said
    )
    rows = {row["name"]: row for row in found["layers"]}
    assert list(rows) == ["embedding", "layer 0", "layer 1 and norm", "logits"]
    assert max(row["kernel_worst"] for row in found["layers"]) < 1e-4


def test_findings_tell_a_leap_from_steady_growth() -> None:
    """Errors of 0.1 a layer, whose squares add up; then one layer that adds 0.4."""
    from qcc.compiler.cli._layers import findings
    from qcc.runtime.eval.report import LayerFigures

    def rows(added: list[float], kernel: float = 1e-6) -> list[LayerFigures]:
        errors = np.sqrt(np.cumsum(np.square(added)))
        return [
            LayerFigures(f"layer {i}", error, error, kernel / 9, kernel)
            for i, error in enumerate([*errors, 0.1])
        ]

    steady = findings(rows([0.1] * 6), [])
    assert len(steady) == 1 and steady[0].startswith("kernels are right")
    leap = findings(rows([0.1, 0.1, 0.1, 0.4, 0.1, 0.1]), [])
    assert len(leap) == 2 and "the error leaps at layer 3, from 1.7e-01 to 4.4e-01" in leap[1]
    # What is no number is wrong as well.
    for kernel in (2e-3, float("nan")):
        said = findings(rows([0.1] * 6, kernel), [])[0]
        assert said.startswith("WRONG KERNEL: layer 0 is the first")
    # Rounded activations depart on their own.
    said = findings(rows([0.1] * 6, 2e-3), [], "dynamic")[0]
    assert said.startswith("activations are rounded to int8 (dynamic)")


def test_layers_name_the_kernel_that_is_wrong(
    artifact: Path, checkpoint: Any, cli: Any, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that computes layer 1 with the down projection of layer 0."""
    from qcc.runtime.engine.library import Library

    bind = Library.bind

    def wrong(self: Any, slots: Any) -> None:
        places = {s.stored[0]: at for at, s in enumerate(self.metadata.slots) if s.stored}
        names = [f"model.layers.{i}.mlp.down_proj.q_weight" for i in range(2)]
        if set(names) <= set(places):
            slots[places[names[1]]] = slots[places[names[0]]]
        bind(self, slots)

    monkeypatch.setattr(Library, "bind", wrong)
    words = ("eval", artifact, "--against", checkpoint("llama"), "--text", text, "--layers")
    found = last_object(cli(*words, "--json"))
    assert found["findings"][0].startswith("WRONG KERNEL: layer 1 and norm is the first")
    rows = {row["name"]: row for row in found["layers"]}
    assert rows["layer 0"]["kernel_worst"] < 1e-5 < 0.01 < rows["layer 1 and norm"]["kernel_worst"]


def test_what_cannot_be_measured_is_refused(
    artifact: Path, copy: Path, checkpoint: Any, cli: Any, text: Path, tmp_path: Path
) -> None:
    model = checkpoint("llama")
    short = tmp_path / "short.txt"
    short.write_text("tiny", encoding="utf-8")
    assert "short.txt: too short" in cli("eval", artifact, "--text", short).error()
    short.write_bytes(b"\xff\xfe\x00")
    assert "short.txt: not UTF-8 text" in cli("eval", artifact, "--text", short).error()
    words = ("eval", artifact, "--text", text)
    assert (
        f"--context 257: {artifact} was compiled for 256" in cli(*words, "--context", 257).error()
    )
    assert "--tensors compares with the original" in cli(*words, "--tensors").error()
    deeper = checkpoint("llama", num_hidden_layers=3)
    said = cli(*words, "--against", deeper).error()
    assert f"{artifact} was not compiled from {deeper}: 'model.layers.2" in said
    assert "no such folder" in cli(*words, "--against", tmp_path / "none").error()
    other = tmp_path / "other"
    shutil.copytree(model, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    assert "another vocabulary (259 tokens)" in cli(*words, "--against", other).error()
    overwrite(copy, "model.norm.weight", lambda array: array.fill(np.nan))
    said = cli("eval", copy, "--text", text).error()
    assert f"{copy}: NaN or infinite logits; qcc eval --against MODEL --layers names" in said


def test_layers_tell_where_logits_that_are_no_numbers_come_from(
    copy: Path, checkpoint: Any, cli: Any, text: Path
) -> None:
    """A scale that is NaN: no figures, but the weight's name."""

    def spoil(scales: Any) -> None:
        scales[5] = np.nan

    overwrite(copy, "model.layers.1.self_attn.o_proj.q_scale", spoil)
    words = ("eval", copy, "--against", checkpoint("llama"), "--text", text)
    said = cli(*words, "--layers").error()
    assert f"{copy}: NaN or infinite logits; kernels are right" in said
    assert "WEIGHTS: model.layers.1.self_attn.o_proj.weight is off by nan" in said
