"""Other engines beside qcc: their processes, the figures of the tables, the files made for them."""

from __future__ import annotations

import importlib
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from qcc.runtime.bench import peer_process, peer_serve, peers
from qcc.runtime.bench.bandwidth import measured_apart
from qcc.runtime.bench.peer_process import Engine
from qcc.runtime.errors import QccError
from qcc.tutorials.random_checkpoint import make_checkpoint, small_config

PREFILL, DECODE = ("prefill", 128, 0), ("decode", 32, 16)
FAKE = """
class Peer:
    def __init__(self, checkpoint, kind, folder, threads):
        print("a library's greeting")
        if kind == "absent":
            import no_such_package
        self.name, self.runs, self.kind = f"{checkpoint} {folder} {threads}", 0, kind

    def run(self, case, tokens, depth):
        self.runs += 1
        if self.runs == 4 and self.kind != "lasting":
            raise RuntimeError("out of luck")
        return tokens + depth / 100 + self.runs
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Engine]]:
    """fake(kind): an engine whose module is FAKE."""
    (tmp_path / "peer_serve.py").write_bytes(Path(str(peer_serve.__file__)).read_bytes())
    (tmp_path / "peer_fake.py").write_text(FAKE)
    (tmp_path / "table.py").write_text("raise AssertionError('no search path has this folder')")
    monkeypatch.setattr(peer_process, "__file__", str(tmp_path / "peer_process.py"))
    monkeypatch.setattr(peer_process, "PAUSE", 0)
    made: list[Engine] = []

    def make(kind: str) -> Engine:
        made.append(Engine(f"fake:{kind}", "fake", kind, sys.executable))
        return made[-1]

    yield make
    for engine in made:
        engine.stop()


def test_an_engine_answers_until_it_ends(fake: Callable[[str], Engine]) -> None:
    """Its own printing is no answer; a package that lacks, and its end, are told in a line."""
    absent = fake("absent").start("model", "files", 2)
    assert absent is not None and "no_such_package" in absent
    engine, ready = fake("q4"), [fake("other")]
    assert engine.start("model", "files", 2) is None
    assert engine.name == "model files 2"
    for _ in range(3):
        engine.run(DECODE)
    # Of 33.16, 34.16 and 35.16 seconds the first is the warm-up's.
    assert engine.rate(DECODE) == pytest.approx(32 / 34.66)
    assert engine.spread(DECODE) == pytest.approx(0.5 / 34.66)
    with pytest.raises(QccError, match="out of luck"):
        engine.run(DECODE)
    ready[0].start("model", "files", 2)
    failed = peers.measure(ready, [PREFILL, DECODE], 1)
    assert not ready
    assert list(failed) == ["fake:other"] and "decode at 16: ended" in failed["fake:other"]


@pytest.mark.usefixtures("fake")
def test_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is missing or ends is named, the rest is measured; with nothing left, an error."""
    memory = partial(measured_apart, total=1 << 20)
    monkeypatch.setattr(peers, "measured_apart", memory)
    monkeypatch.setitem(peers.INSTALL, "fake", "pip install it")
    flags = [str(tmp_path / "model"), "--repeats", "1", "--prompt", "128", "--depth", "0", "16"]
    wanted = [word for kind in ("lasting", "absent", "q4") for word in ("--peer", f"fake:{kind}")]
    assert peers.main([*flags, *wanted]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(found["tok_s"]) == ["fake:lasting"]
    # Its runs are numbered: of a case the second one counts, after `runs` come tokens and depth.
    expected = {"prefill 128": 128 / 130, "decode at 0": 32 / 36, "decode at 16": 32 / 38.16}
    assert found["tok_s"]["fake:lasting"] == pytest.approx(expected, abs=5e-3)
    assert "pip install it" in found["skipped"]["fake:absent"]
    assert "decode at 0: ended" in found["skipped"]["fake:q4"]
    with pytest.raises(SystemExit):
        peers.main([*flags, "--peer", "fake:q4"])
    assert "error: no engine is left: fake:q4: decode at 0: ended" in capsys.readouterr().err


def test_tables_and_ratios() -> None:
    """tok/s of the median without the warm-up; above 1 where qcc is faster."""
    ours, theirs = (Engine(x, x.split(":")[0], "", "", name=x) for x in ("qcc:a", "mnn:int4"))
    ours.seconds = {PREFILL: [9.0, 0.5, 0.25, 1.0], DECODE: [9.0, 1.0, 1.0, 1.0]}
    theirs.seconds = {PREFILL: [9.0, 1.0, 1.0, 1.0], DECODE: [9.0, 0.5, 0.5, 0.5]}
    found = peers.summary([ours, theirs], [PREFILL, DECODE])
    assert found["tok_s"]["qcc:a"] == {"prefill 128": 256, "decode at 16": 32}
    assert found["spread"]["qcc:a"]["prefill 128"] == 0.75
    ratios = {"prefill 128": 2.0, "decode at 16": 0.5}
    assert found["ratios"] == [{"qcc": "qcc:a", "peer": "mnn:int4", **ratios}]
    shown = [line.split() for line in peers.lines(found)]
    assert ["qcc:a", "256.0", "32.0"] in shown
    assert ["qcc:a", "/", "mnn:int4", "2.00", "0.50"] in shown


def test_engines_of_the_flags() -> None:
    """qcc's first; a peer may have an interpreter of its own; others are refused."""
    flags = {"qcc": ["./a-q4"], "peer": ["llama_cpp:Q4_0", "mnn:int4@/v/python"], "python": "p"}
    found = peers.engines(Namespace(**flags))
    assert [(e.label, e.kind, e.python) for e in found[1:]] == [
        ("llama_cpp:Q4_0", "Q4_0", "p"),
        ("mnn:int4", "int4", "/v/python"),
    ]
    assert (found[0].label, found[0].kind) == ("qcc:a-q4", str(Path("a-q4").resolve()))
    for wrong in ("vllm:bf16", "mnn"):
        with pytest.raises(QccError, match="give NAME:KIND"):
            peers.engines(Namespace(qcc=[], peer=[wrong], python="p"))


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_the_gguf_file_is_the_checkpoint(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor under llama.cpp's name, heads of llama in pairs, and the sizes it asks for."""
    gguf = pytest.importorskip("gguf")
    from safetensors.numpy import load_file

    monkeypatch.setitem(sys.modules, "llama_cpp", ModuleType("llama_cpp"))
    monkeypatch.delitem(sys.modules, "qcc.runtime.bench.peer_llama_cpp", raising=False)
    module = importlib.import_module("qcc.runtime.bench.peer_llama_cpp")
    config = small_config(arch, {"num_hidden_layers": 2, "num_key_value_heads": 2})
    make_checkpoint(config, tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    module.write_gguf(tmp_path / "model", tmp_path / "made.gguf")
    read = gguf.GGUFReader(tmp_path / "made.gguf")
    assert read.get_field(f"{arch}.vocab_size").contents() == config["vocab_size"]
    assert read.get_field(f"{arch}.attention.head_count_kv").contents() == 2
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), 2)
    found = {tensor.name: tensor for tensor in read.tensors}
    assert len(found) == len(stored)
    for name, array in stored.items():
        tensor = found[names.get_name(name, (".weight", ".bias"))]
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        expected: Any = array.astype(np.float32)
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            # Row 2i of a head is its row i, row 2i + 1 the one half a head below.
            size = config["hidden_size"] // config["num_attention_heads"]
            order = [
                head * size + half * size // 2 + i
                for head in range(len(array) // size)
                for i in range(size // 2)
                for half in (0, 1)
            ]
            expected = expected[order]
        assert np.array_equal(values, expected), name
