"""The order of a compile, and what one folder takes: libraries added, sizes kept, a cache."""

import dataclasses
import json
import os
import platform

import numpy as np
import pytest

from qcc.compiler.driver import _libraries, compile_cached, compile_model, convert_model
from qcc.compiler.options import CompileOptions
from qcc.compiler.sizes import SizeFlags
from qcc.compiler.source import checksum, stamp
from qcc.runtime import artifact
from qcc.runtime.engine.model import CompiledModel
from qcc.runtime.errors import QccError
from qcc.targets import find_target
from qcc.targets.spec import BuildOptions

from ..conftest import SAME_LIBRARY
from ..embeddings import BERT, save_embedding


def manifest(folder):
    """qcc.json."""
    return json.loads((folder / "qcc.json").read_text())


def test_libraries_are_added_with_the_sizes_of_their_folder(checkpoint, tmp_path):
    """convert with sizes, then compile without: the weights stay, the sizes count.

    Of a library for each of two processors the one of this machine is loaded, unless another is
    named; they compute the same.
    """
    model, out = str(checkpoint("llama")), tmp_path / "out"
    convert_model(model, out, CompileOptions(sizes=SizeFlags(context_window=64)))
    assert manifest(out)["libraries"] == {}
    shard = (out / "params_shard_0.bin").stat().st_mtime_ns
    both = "native,x86-64-v3" if platform.machine() == "x86_64" else "native"
    compile_model(model, out, CompileOptions(build=BuildOptions(both, precision="high")))
    libraries = manifest(out)["libraries"]
    assert manifest(out)["sizes"]["context_window_size"] == 64
    assert (out / "params_shard_0.bin").stat().st_mtime_ns == shard
    with pytest.raises(QccError, match="another sizes"):
        compile_model(model, out, CompileOptions(sizes=SizeFlags(context_window=128)))
    if len(libraries) == 1:
        pytest.skip("x86-64-v3 and this machine are one library here")
    native, portable = libraries
    assert portable == "cpu-x86-64-v3" and libraries[portable]["isa"] == "avx2"
    found = artifact.Artifact.open(out)
    assert found.library("cpu").name == f"{native}.so"
    logits = []
    for device in ("cpu", portable):
        model = CompiledModel(found, device, max_batch_size=1, precision="high")
        assert model.library.path == found.library(device)
        model.add_sequence(0)
        logits.append(model.verify(0, np.arange(20, dtype=np.int32)))
    np.testing.assert_allclose(logits[0], logits[1], rtol=0, atol=SAME_LIBRARY)


def test_two_names_of_one_library():
    """What is the same is built once; what is not would overwrite the other."""
    target = find_target("cpu")
    (name,) = _libraries([target], BuildOptions("x86-64-v3, x86-64-v3,"))
    assert name == "cpu-x86-64-v3"

    def of_one_name(options):
        return target.resolve(options)[0], "cpu-one"

    same = dataclasses.replace(target, resolve=of_one_name)
    with pytest.raises(QccError, match="x86-64-v3 and x86-64-v4 are both cpu-one here; name one"):
        _libraries([same], BuildOptions("x86-64-v3,x86-64-v4"))


def test_a_tied_model_saved_by_torch_has_its_lm_head_too(checkpoint, tmp_path):
    """pytorch_model.bin keeps both names of a tied table."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    source = checkpoint("llama")
    folder = tmp_path / "bin"
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix == ".json":
            (folder / path.name).write_bytes(path.read_bytes())
    state = AutoModelForCausalLM.from_pretrained(source).state_dict()
    assert "lm_head.weight" in state
    torch.save(state, folder / "pytorch_model.bin")
    out = convert_model(str(folder), tmp_path / "out", CompileOptions(allow_pickle=True))
    same = convert_model(str(source), tmp_path / "same")
    shards = [(f / "params_shard_0.bin").read_bytes() for f in (out, same)]
    assert shards[0] == shards[1]


@pytest.fixture
def built(monkeypatch):
    """Libraries are files with a word in them; here is how many were built."""
    paths = []

    def build_library(_plan, _specs, _spec, _target, path, *_):
        path.write_text("library")
        paths.append(path)
        return {}

    monkeypatch.setattr("qcc.compiler.driver.build_library", build_library)
    return paths


def test_a_checkpoint_is_compiled_into_the_cache_once(checkpoint, tmp_path, built):
    """Until it changes: then its copy in the cache is made anew."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in checkpoint("llama").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    out = compile_cached(str(folder))
    first = (out / "qcc.json").stat().st_mtime_ns
    assert compile_cached(str(folder)) == out
    assert (out / "qcc.json").stat().st_mtime_ns == first
    os.utime(folder / "config.json")  # touched, not changed: the checksum is the same
    compile_cached(str(folder))
    assert (out / "qcc.json").stat().st_mtime_ns == first and len(built) == 1
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    compile_cached(str(folder))
    assert (out / "qcc.json").stat().st_mtime_ns != first and len(built) == 2


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True}),
        ("sentence_bert_config.json", {"max_seq_length": 20}),
        ("config_sentence_transformers.json", {"prompts": {"query": "Find: "}}),
    ],
)
def test_what_makes_a_vector_is_part_of_a_checkpoint(tmp_path, built, name, change):
    """Pooling is in the library, lengths and prompts in the configuration: none may be old."""
    folder = save_embedding(tmp_path / "model", "bert", BERT, "mean")
    out = compile_cached(str(folder))
    before = (checksum(folder), stamp(folder))
    (folder / name).write_text(json.dumps(change))
    assert checksum(folder) != before[0] and stamp(folder) != before[1]
    with pytest.raises(QccError, match="holds an artifact with another checkpoint"):
        compile_model(str(folder), out)
    first = (out / "qcc.json").stat().st_mtime_ns
    assert compile_cached(str(folder)) == out
    assert (out / "qcc.json").stat().st_mtime_ns != first and len(built) == 2
