"""What the attention kernels take of a GPU, and what they refuse."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from qcc.runtime.errors import QccError
from qcc.targets.gpu.kv_cache import kv_kernels
from qcc.targets.gpu.limits import Limits

from ..wgsl import validate_f16
from .attention_cases import compiled, gpu_config

SLOTS = ["prefill_ragged", "prefill", "decode", "tree_prefill", "tree_prefill_paged"]
LEAST = Limits(max_storage_buffers=8, workgroup_bytes=16 * 1024, max_threads=128)
LARGE: dict[str, dict[str, Any]] = {
    "sliding-f32": {
        "heads": (8, 1),
        "dim": 256,
        "sliding_window_size": 64,
        "attention_sink_size": 4,
    },
    "window-lse-f16": {
        "heads": (18, 2),
        "dim": 256,
        "dtype": "float16",
        "layer_window": 64,
        "returns_lse": True,
        "logit_soft_cap": 30.0,
    },
}


@pytest.mark.parametrize("name", LARGE)
def test_attention_kernels_keep_the_limits(name: str) -> None:
    """And are valid WGSL for Dawn, with barriers in uniform control flow."""
    c = gpu_config(**LARGE[name])
    for slot in SLOTS[: 3 if c.sliding_window_size > 0 else None]:
        for shader in compiled(c, slot, LEAST).shaders.values():
            where = f"{slot}: {shader.name}"
            assert shader.threads[0] <= LEAST.max_threads, where
            assert shader.workgroup_bytes <= LEAST.workgroup_bytes, where
            assert len(shader.storage) <= LEAST.max_storage_buffers, where
            # Numbers are read as vectors, but where only index arrays are gathered or parts merged.
            dtypes = {each.dtype for each in shader.storage}
            assert len(shader.storage) < 7 or f"vec4<f{c.dtype[5:]}>" in dtypes, where
            validate_f16(shader.source)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"dim": 18}, "head_dim 18: GPU targets need a multiple of 4 up to 256"),
        ({"dim": 260}, "head_dim 260: GPU targets need a multiple of 4 up to 256"),
        (
            {"sliding_window_size": 65_100},
            r"sliding window 65100 \+ prefill chunk 512: GPU targets slide over at most 65536",
        ),
    ],
)
def test_gpus_refuse_what_attention_cannot_do(changes: dict[str, int], text: str) -> None:
    with pytest.raises(QccError, match=text):
        kv_kernels(gpu_config(**changes), Limits())


def test_gpus_refuse_a_chunk_wider_than_a_grid() -> None:
    c = dataclasses.replace(gpu_config(), prefill_chunk_size=70_000)
    with pytest.raises(QccError, match="prefill chunk 70000: at most 65535 on a GPU"):
        kv_kernels(c, Limits())
