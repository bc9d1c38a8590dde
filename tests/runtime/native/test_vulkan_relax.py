"""Relax programs on Vulkan against numpy in f64: a layer with softmax, TVM's paged KV cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn.llm import kv_cache
from tvm.s_tir import dlight

from .programs import load, target

# |result - numpy in f64|. f16 has 11 bits: logits of some 5 are 2e-3 off, a probability of 0.2
# thereby 5e-4, its own rounding not counted. f32: sums of 256 terms.
TOLERANCE = {"float32": 1e-6, "float16": 3e-3}
SCHEDULES = (dlight.gpu.Matmul, dlight.gpu.GEMV, dlight.gpu.Reduction, dlight.gpu.Fallback)
HEADS, KV_HEADS, HEAD_DIM, PAGE = 4, 2, 32, 16


class Layer(nn.Module):
    """softmax(x w^T + b) over the last axis."""

    def __init__(self) -> None:
        self.linear = nn.Linear(256, 384, bias=True)

    def main(self, x: nn.Tensor) -> nn.Tensor:
        """[n, 256] -> f32[n, 384]."""
        return nn.op.softmax(self.linear(x).astype("float32"), axis=-1)


class Attention(nn.Module):
    """One layer of attention over a paged KV cache."""

    def attend(self, cache: kv_cache.PagedKVCache, qkv: nn.Tensor) -> nn.Tensor:
        """[b, n, heads * dim of q, k and v] -> [b, n, q heads * dim]."""
        b, n, _ = qkv.shape
        qkv = nn.op.reshape(qkv, (b, n, HEADS + 2 * KV_HEADS, HEAD_DIM))
        out = cache.attention_with_fused_qkv(0, qkv, HEADS, sm_scale=HEAD_DIM**-0.5)
        return nn.op.reshape(out, (b, n, HEADS * HEAD_DIM))

    def create(
        self,
        max_batch_size: tvm.tirx.Var,
        max_total_seq_len: tvm.tirx.Var,
        prefill_chunk_size: tvm.tirx.Var,
        page_size: tvm.tirx.Var,
        support_sliding_window: tvm.tirx.Var,
    ) -> kv_cache.PagedKVCache:
        """The cache, with TVM's own kernels."""
        return kv_cache.TIRPagedKVCache(
            attn_kind="mha",
            max_batch_size=max_batch_size,
            max_total_seq_len=max_total_seq_len,
            prefill_chunk_size=prefill_chunk_size,
            page_size=page_size,
            support_sliding_window=support_sliding_window,
            layer_partition=relax.ShapeExpr([0, 1]),
            num_hidden_layers=1,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            qk_head_dim=HEAD_DIM,
            v_head_dim=HEAD_DIM,
            mla_original_qk_head_dim=0,
            mla_original_v_head_dim=0,
            rope_mode=kv_cache.RopeMode.NONE,
            rope_scale=1,
            rope_theta=10000,
            rope_scaling={},
            rope_ext_factors=relax.prim_value(0),
            rotary_dim=HEAD_DIM,
            enable_disaggregation=False,
            dtype="float32",
            target=target(),
        )


def machine(module: nn.Module, spec: dict[str, Any], device: Any, folder: Path) -> Any:
    """A virtual machine of the module's functions."""
    built, _ = module.export_tvm(spec)
    with target():
        built = relax.get_pipeline("zero")(built)
        built = dlight.ApplyDefaultSchedule(*(rule() for rule in SCHEDULES))(built)
        executable = tvm.compile(built, target=target())
    return relax.VirtualMachine(load(executable, folder), device)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_layer(vulkan: Any, tmp_path: Path, dtype: str) -> None:
    """A matrix multiplication of a length known at run time, a bias, a softmax."""
    layer = Layer()
    layer.to(dtype)
    spec = {"main": {"x": nn.spec.Tensor(["n", 256], dtype)}}
    vm = machine(layer, spec, vulkan, tmp_path)
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((384, 256)) / 16).astype(dtype)
    bias = rng.standard_normal(384).astype(dtype)
    for rows in (1, 37):
        x = rng.standard_normal((rows, 256)).astype(dtype)
        found = vm["main"](*(tvm.runtime.tensor(each, vulkan) for each in (x, weight, bias)))
        logits = x.astype(np.float64) @ weight.astype(np.float64).T + bias
        wanted = np.exp(logits - logits.max(-1, keepdims=True))
        wanted /= wanted.sum(-1, keepdims=True)
        assert np.abs(found.numpy() - wanted).max() < TOLERANCE[dtype]


def attention(qkv: np.ndarray) -> np.ndarray:
    """Of all tokens of a sequence: f32[n, HEADS + 2 KV_HEADS, dim] -> f64[n, HEADS * dim]."""
    q, k, v = np.split(qkv.astype(np.float64), [HEADS, HEADS + KV_HEADS], axis=1)
    k, v = (np.repeat(each, HEADS // KV_HEADS, axis=1) for each in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(HEAD_DIM)
    scores += np.triu(np.full(scores.shape[1:], -np.inf), 1)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, v).reshape(len(qkv), -1)


def test_paged_kv_cache(vulkan: Any, tmp_path: Path) -> None:
    """Two sequences: prefills that fill pages in part, then decodes of both at once."""
    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    cache = nn.spec.Object(object_type=kv_cache.PagedKVCache)
    spec = {
        "attend": {
            "cache": cache,
            "qkv": nn.spec.Tensor(["b", "n", width], "float32"),
            "$": {"param_mode": "none", "effect_mode": "none"},
        },
        "create": {
            **dict.fromkeys(
                ("max_batch_size", "max_total_seq_len", "prefill_chunk_size", "page_size"), int
            ),
            "support_sliding_window": int,
            "$": {"param_mode": "none", "effect_mode": "none"},
        },
    }
    vm = machine(Attention(), spec, vulkan, tmp_path)
    shape = tvm.runtime.ShapeTuple
    state = vm["create"](*(shape([size]) for size in (2, 256, 64, PAGE, 0)))
    call = {
        name: tvm.get_global_func(f"vm.builtin.kv_state_{name}")
        for name in ("add_sequence", "begin_forward", "end_forward")
    }
    rng = np.random.default_rng(0)
    history: dict[int, np.ndarray] = {}

    def step(lengths: dict[int, int]) -> None:
        new = {
            seq: rng.standard_normal((count, width)).astype(np.float32)
            for seq, count in lengths.items()
        }
        call["begin_forward"](state, shape(list(new)), shape(list(lengths.values())))
        rows = np.concatenate(list(new.values()))
        decode = set(lengths.values()) == {1}
        rows = rows[:, None] if decode else rows[None]
        found = vm["attend"](state, tvm.runtime.tensor(rows, vulkan)).numpy()
        call["end_forward"](state)
        parts = np.split(found.reshape(-1, found.shape[-1]), np.cumsum(list(lengths.values())))
        for (seq, added), part in zip(new.items(), parts, strict=False):
            before = history.get(seq, np.empty((0, width), np.float32))
            history[seq] = np.concatenate([before, added])
            wanted = attention(history[seq].reshape(len(history[seq]), -1, HEAD_DIM))
            np.testing.assert_allclose(part, wanted[-len(part) :], rtol=0, atol=2e-6)

    for seq in (0, 1):
        call["add_sequence"](state, seq)
    step({0: 37})
    step({1: 5})
    for _ in range(15):
        step({0: 1, 1: 1})
    step({0: 1})
    step({0: 3, 1: 20})
