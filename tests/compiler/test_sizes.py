"""The sizes of a library: defaults from the model, flags, and what contradicts itself."""

from __future__ import annotations

from typing import Any

import pytest

from qcc.compiler.config import ModelConfig, RopeConfig
from qcc.compiler.sizes import SizeFlags, Sizes, choose_sizes, context_note
from qcc.runtime.errors import QccError


def config(
    positions: int = 4096,
    window: int | None = None,
    rope: str = "default",
    original: int | None = None,
) -> ModelConfig:
    return ModelConfig(
        model_type="llama",
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        vocab_size=100,
        max_position_embeddings=positions,
        norm_eps=1e-5,
        hidden_act="silu",
        tie_word_embeddings=True,
        rope=RopeConfig(rope, 10000.0, 16, 4.0, original or positions),
        sliding_window=window,
    )


# model, flags -> context, sliding window, sink, chunk, batch (default chunk of the target: 512)
GOOD: list[tuple[ModelConfig, dict[str, int], tuple[int, int, int, int, int]]] = [
    (config(4096), {}, (4096, -1, -1, 512, 4)),
    (config(131072), {}, (8192, -1, -1, 512, 4)),
    (config(256), {}, (256, -1, -1, 256, 4)),
    (config(131072), {"context_window": 131072}, (131072, -1, -1, 512, 4)),
    (config(4096), {"context_window": 100}, (100, -1, -1, 100, 4)),
    (config(4096), {"prefill_chunk": 2048, "max_batch": 1}, (4096, -1, -1, 2048, 1)),
    (config(4096), {"prefill_chunk": 4096}, (4096, -1, -1, 4096, 4)),
    # A window that the context never fills is full attention.
    (config(32768, window=4096), {}, (-1, 4096, 0, 512, 4)),
    (config(4096, window=4096), {}, (4096, -1, -1, 512, 4)),
    (config(32768, window=4096), {"context_window": 4096}, (4096, -1, -1, 512, 4)),
    (config(32768, window=128), {}, (-1, 128, 0, 128, 4)),
    (config(32768, window=128), {"prefill_chunk": 1000}, (-1, 128, 0, 1000, 4)),
    (config(32768, window=4096), {"sliding_window": 64}, (-1, 64, 0, 64, 4)),
    (config(4096), {"sliding_window": 1024, "attention_sink": 4}, (-1, 1024, 4, 512, 4)),
    # A scaled rope goes past the positions that the model was trained with.
    (config(256, rope="dynamic"), {"context_window": 1024}, (1024, -1, -1, 512, 4)),
    (config(256, rope="dynamic"), {}, (256, -1, -1, 256, 4)),
    # Qwen2.5's recipe writes the positions before yarn, others those after it.
    (config(32768, rope="yarn"), {"context_window": 131072}, (131072, -1, -1, 512, 4)),
    (config(1024, rope="yarn", original=256), {"context_window": 1024}, (1024, -1, -1, 512, 4)),
    (config(256, rope="linear"), {"context_window": 1024}, (1024, -1, -1, 512, 4)),
    (config(256, rope="yarn"), {}, (256, -1, -1, 256, 4)),
    (config(4096), {"prefill_chunk": 4096, "max_batch": 256}, (4096, -1, -1, 4096, 256)),
]


@pytest.mark.parametrize(("model", "flags", "expected"), GOOD)
def test_sizes(model: ModelConfig, flags: dict[str, int], expected: tuple[int, ...]) -> None:
    sizes = choose_sizes(model, SizeFlags(**flags), 512)
    assert sizes == Sizes(*expected)
    assert (sizes.context_window_size > 0) != (sizes.sliding_window_size > 0)
    assert sizes.max_positions == max(expected[:2])


BAD: list[tuple[ModelConfig, dict[str, Any], str]] = [
    (config(4096), {"context_window": 4097}, r"--context-window 4097 exceeds the 4096 positions"),
    (config(256, rope="dynamic"), {"context_window": 1025}, r"use 1024 or less"),
    (config(256, rope="yarn"), {"context_window": 1025}, r"use 1024 or less"),
    (config(1024, rope="yarn", original=256), {"context_window": 1025}, r"use 1024 or less"),
    (config(256, rope="llama3"), {"context_window": 257}, r"use 256 or less"),
    (config(), {"max_batch": 257}, r"--max-batch 257: must be 256 or less"),
    (
        config(10**6, window=128),
        {"prefill_chunk": 10**9},
        r"--prefill-chunk 1000000000: must be 65536 or less",
    ),
    (config(), {"context_window": 0}, r"--context-window 0: must be 1 or more"),
    (config(), {"sliding_window": -1}, r"--sliding-window -1: must be 1 or more"),
    (config(), {"prefill_chunk": 0}, r"--prefill-chunk 0: must be 1 or more"),
    (config(), {"max_batch": 0}, r"--max-batch 0: must be 1 or more"),
    (config(), {"attention_sink": -1}, r"--attention-sink -1: must be 0 or more"),
    (config(), {"attention_sink": 4}, r"--attention-sink needs a sliding window"),
    (config(), {"sliding_window": 64, "attention_sink": 64}, r"below the sliding window 64"),
    (config(), {"context_window": 64, "prefill_chunk": 65}, r"--prefill-chunk 65 exceeds"),
    (
        config(32768, window=128),
        {"sliding_window": 129},
        r"--sliding-window 129 exceeds the window of 128",
    ),
]


@pytest.mark.parametrize(("model", "flags", "text"), BAD)
def test_conflicts(model: ModelConfig, flags: dict[str, int], text: str) -> None:
    with pytest.raises(QccError, match=text):
        choose_sizes(model, SizeFlags(**flags), 512)


def test_a_context_window_that_a_sliding_window_makes_idle_is_noted() -> None:
    flags = SizeFlags(context_window=1000, sliding_window=64)
    sizes = choose_sizes(config(4096), flags, 512)
    assert (sizes.context_window_size, sizes.sliding_window_size) == (-1, 64)
    note = context_note(flags, sizes)
    assert note is not None and "--context-window 1000 is not needed" in note and "64" in note
    for silent in (SizeFlags(sliding_window=64), SizeFlags(context_window=1000), SizeFlags()):
        assert context_note(silent, choose_sizes(config(4096), silent, 512)) is None
