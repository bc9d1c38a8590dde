"""What a compile writes against CONTRACTS sections 2 to 4, and that the memory plan is honest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

METADATA = """
model_type quantization context_window_size sliding_window_size attention_sink_size
prefill_chunk_size tensor_parallel_shards pipeline_parallel_stages kv_state_kind max_batch_size
active_vocab_size model_task params kv_cache memory_usage qcc
""".split()
CHAT_CONFIG = """
version model_type quantization model_config vocab_size context_window_size sliding_window_size
prefill_chunk_size attention_sink_size tensor_parallel_shards pipeline_parallel_stages
active_vocab_size temperature presence_penalty frequency_penalty repetition_penalty top_p
tokenizer_files tokenizer_info conv_template pad_token_id bos_token_id eos_token_id model_task
""".split()
FUNCTIONS = """
_metadata embed prefill decode batch_prefill batch_decode batch_verify create_tir_paged_kv_cache
softmax_with_temperature argsort_probs sample_with_top_p apply_logit_bias_inplace
apply_penalty_inplace apply_bitmask_inplace
""".split()
HIDDEN, VOCABULARY = 64, 361


@pytest.fixture(scope="module", params=["llama", "mistral"])
def llm(request: Any, compiled: Any, checkpoint: Any) -> Any:
    """A library with a context window, and one with a sliding window."""
    sizes = {"prefill_chunk": 128} if request.param == "mistral" else {}
    return compiled(checkpoint(request.param), "q8f16_1" if not sizes else "q0f32", **sizes)


@pytest.fixture
def folder(llm: Any) -> Path:
    return Path(llm.artifact.folder)


@pytest.fixture
def metadata(llm: Any) -> Any:
    return json.loads(str(llm.model.library.vm["_metadata"]()))


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_metadata(llm: Any, metadata: Any) -> None:
    assert set(metadata) == set(METADATA)
    windows = [metadata["context_window_size"], metadata["sliding_window_size"]]
    slides = llm.limits.window is not None
    assert windows == ([-1, 24] if slides else [256, -1])
    assert metadata["attention_sink_size"] == (0 if slides else -1)
    assert metadata["kv_state_kind"] == "kv_cache" and metadata["active_vocab_size"] == 259
    assert metadata["kv_cache"] == {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }


def test_parameters_are_the_stored_tensors_in_order(folder: Path, metadata: Any) -> None:
    records = [
        record
        for shard in read(folder, "tensor-cache.json")["records"]
        for record in shard["records"]
    ]
    assert [(p["name"], p["shape"], p["dtype"]) for p in metadata["params"]] == [
        (r["name"], r["shape"], r["dtype"]) for r in records
    ]
    for param in metadata["params"]:
        assert set(param) == {"name", "shape", "dtype", "preprocs", "pipeline_stages"}


def test_tensor_cache(folder: Path) -> None:
    """Shards are plain concatenations; the totals are right."""
    cache = read(folder, "tensor-cache.json")
    assert set(cache) == {"metadata", "records"}
    count = total = 0
    for shard in cache["records"]:
        assert set(shard) == {"dataPath", "format", "nbytes", "md5sum", "records"}
        end = 0
        for record in shard["records"]:
            keys = {"name", "shape", "dtype", "format", "nbytes", "byteOffset"}
            assert set(record) == keys and record["byteOffset"] == end
            end, count = end + record["nbytes"], count + 1
        assert end == shard["nbytes"] == (folder / shard["dataPath"]).stat().st_size
        total += end
    assert cache["metadata"]["ParamSize"] == count
    assert cache["metadata"]["ParamBytes"] == total


def test_chat_config(folder: Path, metadata: Any) -> None:
    config = read(folder, "mlc-chat-config.json")
    assert set(CHAT_CONFIG) <= set(config)
    assert config["version"] == "0.1.0" and config["vocab_size"] == VOCABULARY
    for name in ("model_type", "quantization", "context_window_size", "sliding_window_size"):
        assert config[name] == metadata[name], name
    for name in ("prefill_chunk_size", "attention_sink_size"):
        assert config[name] == metadata[name], name
    assert config["active_vocab_size"] == 259, "the tokenizer's 256 bytes and 3 special tokens"
    for name in config["tokenizer_files"]:
        assert (folder / name).is_file(), name
    assert config["tokenizer_info"]["token_postproc_method"] == "byte_level"


def test_functions_are_exported(llm: Any) -> None:
    for name in FUNCTIONS:
        assert llm.model.library.vm[name] is not None


def test_shapes_of_the_functions(llm: Any) -> None:
    """Called as a client of the MLC family calls them, parameters as one packed tuple, last."""
    import tvm

    library, ids = llm.model.library, np.array([1, 5, 9, 300], "int32")
    vm, params, call = library.vm, library.params, tvm.get_global_func
    shape = tvm.runtime.ShapeTuple
    cache = vm["create_tir_paged_kv_cache"](
        *(shape([n]) for n in (3, 64, 16, 16, int(llm.limits.window is not None)))
    )

    def run(
        name: str, lead: tuple[int, int], seqs: list[int], lengths: list[int], *more: Any
    ) -> Any:
        hidden = vm["embed"](tvm.runtime.tensor(ids[: lead[0] * lead[1]]), params)
        assert tuple(hidden.shape) == (lead[0] * lead[1], HIDDEN)
        data = tvm.runtime.tensor(np.from_dlpack(hidden).reshape(*lead, HIDDEN))
        call("vm.builtin.kv_state_begin_forward")(cache, shape(seqs), shape(lengths))
        logits, same = vm[name](data, *more, cache, params)
        call("vm.builtin.kv_state_end_forward")(cache)
        assert same is not None and str(logits.dtype) == "float32"
        return tuple(logits.shape)

    for seq in range(3):
        call("vm.builtin.kv_state_add_sequence")(cache, seq)
    last = tvm.runtime.tensor(np.array([1, 3], "int32"))
    assert run("prefill", (1, 4), [0], [4]) == (1, 1, VOCABULARY)
    assert run("decode", (1, 1), [0], [1]) == (1, 1, VOCABULARY)
    assert run("batch_prefill", (1, 4), [1, 2], [2, 2], last) == (1, 2, VOCABULARY)
    assert run("batch_decode", (3, 1), [0, 1, 2], [1, 1, 1]) == (3, 1, VOCABULARY)
    assert run("batch_verify", (1, 4), [0], [4]) == (1, 4, VOCABULARY)


def test_every_function_has_a_memory_plan(metadata: Any) -> None:
    names = {"embed", "prefill", "decode", "batch_prefill", "batch_decode", "batch_verify"}
    usage = metadata["memory_usage"]
    assert names <= set(usage)
    # A chunk's MLP has at least its two halves at once; one token needs no more than a chunk.
    chunk = metadata["prefill_chunk_size"]
    assert usage["prefill"] >= chunk * 2 * 172 * 4
    assert usage["decode"] < usage["prefill"] <= usage["batch_verify"]


def test_a_cache_of_another_page_size_is_refused(llm: Any) -> None:
    """The kernels are made for pages of 16 tokens; any other would read the wrong memory."""
    library = llm.model.library
    make, shape = library.vm["create_tir_paged_kv_cache"], library.ffi.Shape
    window = int(llm.limits.window is not None)
    make(*(shape((size,)) for size in (1, 64, 32, 16, window)))
    with pytest.raises(Exception, match="16"):
        make(*(shape((size,)) for size in (1, 64, 32, 32, window)))
