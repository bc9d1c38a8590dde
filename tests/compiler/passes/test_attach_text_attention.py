"""AttachTextAttention: which calls it makes, and what the CPU's kernel then computes of them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax, tirx

from qcc.compiler.models.texts import ATTENTION
from qcc.compiler.passes.attach_text_attention import AttachTextAttention
from qcc.targets.cpu.kv_cache import kv_kernels
from qcc.targets.spec import KVCacheConfig

HOST = {"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()}
AVX2 = {"kind": "llvm", "mcpu": "x86-64-v3"}
TOLERANCE = 1e-5  # f32 sums of up to 150 terms of order 1, against float64
LENGTHS = (1, 70, 33, 2, 150)


def config(heads: tuple[int, int] = (4, 2), dim: int = 16, **changes: Any) -> KVCacheConfig:
    return KVCacheConfig(
        num_hidden_layers=1,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=dim,
        rotary_dim=0,
        inv_freq=(),
        rope_attention_factor=1.0,
        max_positions=256,
        sliding_window_size=-1,
        attention_sink_size=0,
        prefill_chunk_size=256,
        dtype="float32",
        **changes,
    )


def module(c: KVCacheConfig, scales: list[float]) -> tvm.IRModule:
    """encode(q, k, v, starts, positions, zeros): attention once for each scale."""
    n, bounds = tirx.Var("n", "int64"), tirx.Var("bounds", "int64")
    shapes = [(n, heads, c.head_dim) for heads in
              (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)]  # fmt: skip
    params = [
        relax.Var(name, relax.TensorType(shape, "float32"))
        for name, shape in zip("qkv", shapes, strict=True)
    ]
    for name, shape in (("starts", (bounds,)), ("positions", (n,)), ("zeros", (bounds - 1,))):
        params.append(relax.Var(name, relax.TensorType(shape, "int32")))
    bb = relax.BlockBuilder()
    with bb.function("encode", params, attrs={"num_input": len(params)}):
        with bb.dataflow():
            found = [
                bb.emit(
                    relax.call_dps_packed(
                        ATTENTION, [*params, relax.prim_value(scale)], out_ty=params[0].ty
                    )
                )
                for scale in scales
            ]
            out = bb.emit_output(relax.Tuple(found))
        bb.emit_func_output(out)
    return bb.get()


def attached(c: KVCacheConfig, scales: list[float], causal: bool, target: Any) -> tvm.IRModule:
    kernel = kv_kernels(c, tvm.target.Target(target)).prefill_ragged
    return AttachTextAttention(kernel, causal)(module(c, scales))


def test_one_kernel_for_each_scale() -> None:
    """Only tensors are left as arguments, and no call by name."""
    mod = attached(config(), [0.25, 0.5, 0.25], True, HOST)
    kernels = [func for func in mod.functions.values() if isinstance(func, tirx.PrimFunc)]
    assert len(kernels) == 2
    assert all(len(func.params) == 9 for func in kernels)
    assert ATTENTION not in mod.script()


CASES = {
    "causal": (config(heads=(6, 2), dim=20), True),
    "both-ways": (config(heads=(3, 3), dim=20), False),
    "wide-heads": (config(heads=(4, 1), dim=128), False),
    "window": (config(heads=(6, 2), dim=12, layer_window=24), True),
    "soft-cap": (config(heads=(3, 1), dim=16, logit_soft_cap=1.5), True),
}


@pytest.mark.parametrize("target", [HOST, AVX2], ids=["host", "avx2"])
@pytest.mark.parametrize("name", CASES)
def test_attention_of_each_text_alone(name: str, target: Any) -> None:
    """Against numpy in f64: texts do not see each other, in any order of lengths."""
    c, causal = CASES[name]
    scale = c.head_dim**-0.5
    scales = [scale, -scale] if c.layer_window else [scale]
    mod = attached(c, scales, causal, target)
    machine = relax.VirtualMachine(tvm.compile(mod, target=tvm.target.Target(target)), tvm.cpu())
    rng = np.random.default_rng(0)
    starts = np.cumsum([0, *LENGTHS]).astype(np.int32)
    heads = (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)
    qkv = [rng.standard_normal((starts[-1], h, c.head_dim), np.float32) * 1.5 for h in heads]
    positions = np.concatenate([np.arange(length) for length in LENGTHS]).astype(np.int32)
    arrays = [*qkv, starts, positions, np.zeros(len(LENGTHS), np.int32)]
    found = machine["encode"](*map(tvm.runtime.tensor, arrays))
    for each, result in zip(scales, found, strict=True):
        window = c.layer_window if each < 0 else len(positions)
        expected = [
            attention(c, *(x[a:b] for x in qkv), causal, window) for a, b in pairwise(starts)
        ]
        np.testing.assert_allclose(result.numpy(), np.concatenate(expected), rtol=0, atol=TOLERANCE)


def attention(c: KVCacheConfig, q: Any, k: Any, v: Any, causal: bool, window: int) -> Any:
    """f64[n, heads, d] of one text."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    scores = np.einsum("ihd,jhd->hij", q, k) * c.head_dim**-0.5
    if c.logit_soft_cap:
        scores = np.tanh(scores / c.logit_soft_cap) * c.logit_soft_cap
    i, j = np.arange(len(q))[:, None], np.arange(len(q))
    if causal:
        scores = np.where((j <= i) & (j > i - window), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hij,jhd->ihd", weights / weights.sum(-1, keepdims=True), v)
