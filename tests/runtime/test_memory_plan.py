"""The budget is what happens: planned temporaries against what the VM allocates when it runs."""

import math

import numpy as np
import pytest

PAGE = 4096
BITS = {"float32": 32, "float16": 16, "int32": 32, "int64": 64, "uint8": 8, "uint32": 32, "bool": 8}


def allocated(llm, run):
    """Bytes of the storages that the VM asks for while `run` runs, in the allocator's pages."""
    total = 0

    def count(_func, name, before, _result, *args):
        nonlocal total
        if before and str(name) == "vm.builtin.alloc_storage":
            shape, dtype = args[1], str(args[3])
            total += -(-math.prod(int(d) for d in shape) * BITS[dtype] // 8 // PAGE) * PAGE
        return 0

    vm = llm.model.library.vm
    vm["set_instrument"](count)
    try:
        run()
    finally:
        vm["set_instrument"](lambda *_: 0)
    return total


@pytest.fixture(scope="module")
def llm(compiled, bundled):
    """The bundled model, sized so that every bound differs."""
    return compiled(bundled, "q4f16_1", context_window=256, prefill_chunk=64, max_batch=3)


def test_temporaries_of_each_function_are_those_planned(llm):
    """At the largest run that the library allows; within 15 %, and never less than planned for."""
    model, usage = llm.model, llm.model.library.metadata.memory_usage
    library, cache = model.library, model.cache
    chunk = np.arange(64, dtype=np.int32)
    three = np.array([19, 39, 63], np.int32)

    def measured(seqs, lengths, run):
        for seq in seqs:
            cache.add(seq)
        cache.begin(seqs, lengths)
        found = allocated(llm, run)
        cache.end()
        for seq in seqs:
            cache.remove(seq)
        return found

    def embedding(tokens):
        return allocated(llm, lambda: library.embed(tokens))

    # Every run embeds its tokens first; `decode` and `batch_decode` plan for b tokens, `embed` for
    # a whole chunk.
    assert embedding(chunk) == pytest.approx(usage["embed"], rel=0.15)
    runs = {
        "prefill": ([0], [64], chunk, lambda: library.prefill(chunk, cache)),
        "batch_prefill": (
            [0, 1, 2],
            [20, 20, 24],
            chunk,
            lambda: library.batch_prefill(chunk, three, cache),
        ),
        "batch_verify": ([0], [64], chunk, lambda: library.verify(chunk, cache)),
        "decode": ([0], [1], chunk[:1], lambda: library.decode(chunk[:1], cache)),
        "batch_decode": ([0, 1, 2], [1, 1, 1], three, lambda: library.decode(three, cache)),
    }
    assert set(runs) | {"embed"} == set(usage)
    for name, (seqs, lengths, tokens, run) in runs.items():
        found = measured(seqs, lengths, run) - embedding(tokens)
        assert found == pytest.approx(usage[name], rel=0.15), name


def test_budget_counts_every_part(llm):
    """Weights are the slots, the KV cache its pages, table and workspace; the total is the sum."""
    from qcc.runtime.engine.memory import budget

    meta = llm.model.library.metadata
    found = budget(meta, 1, 256)
    pages = 256 // 16 + 1
    per_token = 2 * meta.num_hidden_layers * meta.num_key_value_heads * meta.head_dim * 4
    heads = 2 * meta.num_attention_heads + 2 * meta.num_key_value_heads
    workspace = 64 * (heads * meta.head_dim * 4 + 2 * meta.num_attention_heads * 4)
    table = 256 * meta.head_dim * 4
    assert found.kv_cache == pages * 16 * per_token + workspace + table
    slots = [slot.type for slot in meta.slots]
    assert found.weights == sum(math.prod(t.shape) * BITS[t.dtype] // 8 for t in slots)
    assert found.total == found.weights + found.kv_cache + found.temporaries
