"""The order of a compile, and what one folder takes: libraries added, sizes kept, a cache."""

import json
import os

import pytest

from qcc.compiler.driver import compile_cached, compile_model, convert_model
from qcc.compiler.options import CompileOptions
from qcc.compiler.sizes import SizeFlags
from qcc.compiler.source import checksum, stamp
from qcc.runtime.errors import QccError

from ..embeddings import BERT, save_embedding


def manifest(folder):
    """qcc.json."""
    return json.loads((folder / "qcc.json").read_text())


def test_a_library_is_added_with_the_sizes_of_its_folder(checkpoint, tmp_path):
    """convert with sizes, then compile without: the weights stay, the sizes count."""
    model, out = str(checkpoint("llama")), tmp_path / "out"
    convert_model(model, out, CompileOptions(sizes=SizeFlags(context_window=64)))
    assert manifest(out)["libraries"] == {}
    shard = (out / "params_shard_0.bin").stat().st_mtime_ns
    compile_model(model, out)
    assert list(manifest(out)["libraries"]) != []
    assert manifest(out)["sizes"]["context_window_size"] == 64
    assert (out / "params_shard_0.bin").stat().st_mtime_ns == shard
    with pytest.raises(QccError, match="another sizes"):
        compile_model(model, out, CompileOptions(sizes=SizeFlags(context_window=128)))


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


def test_a_checkpoint_is_compiled_into_the_cache_once(checkpoint, tmp_path):
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
    assert (out / "qcc.json").stat().st_mtime_ns == first
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    compile_cached(str(folder))
    assert (out / "qcc.json").stat().st_mtime_ns != first


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True}),
        ("sentence_bert_config.json", {"max_seq_length": 20}),
        ("config_sentence_transformers.json", {"prompts": {"query": "Find: "}}),
    ],
)
def test_what_makes_a_vector_is_part_of_a_checkpoint(tmp_path, name, change):
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
    assert (out / "qcc.json").stat().st_mtime_ns != first
