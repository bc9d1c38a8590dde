"""Sequences in TVM's paged KV cache on a software GPU: Vulkan on lavapipe, through wgpu-native."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax, tirx
from tvm.s_tir import dlight

from qcc.compiler.passes.attach_kv_cache import AttachKVCache, function_name
from qcc.targets.gpu.kv_cache import kv_kernels
from qcc.targets.gpu.limits import Limits
from qcc.targets.spec import KVCacheConfig

from ..attention_session import LAYERS, Session, reference, shape, sm_scale

VULKAN = tvm.target.Target({"kind": "webgpu", "target_device_type": 7}, host={"kind": "llvm"})
# f32: sums of up to 1000 terms of order 1; f16: rotated q and k are rounded to 11 bits, so that a
# score of order 1 is off by 2^-10, and so is a weight.
TOLERANCE = {"float32": 2e-5, "float16": 5e-3}


@functools.cache
def device() -> Any:
    """lavapipe; skips the test where it is not installed."""
    pytest.importorskip("wgpu", reason="PyPI's wgpu is not installed")
    from qcc.runtime.native.vulkan import load_vulkan

    for adapter in load_vulkan():
        if "llvmpipe" in adapter.name:
            return tvm.device("vulkan", adapter.index)
    pytest.skip("no lavapipe (Debian's mesa-vulkan-drivers)")


@functools.cache
def compiled_on_gpu(c: KVCacheConfig, limits: Limits) -> Any:
    """The cache's constructor and attend(qkv of each layer, kv): one output a layer."""
    dev = device()
    bb = relax.BlockBuilder()
    n = tirx.Var("n", "int64")
    fused = (n, c.num_attention_heads + 2 * c.num_key_value_heads, c.head_dim)
    out = relax.TensorType((n, c.num_attention_heads, c.head_dim), c.dtype)
    qkv = [relax.Var(f"qkv{i}", relax.TensorType(fused, c.dtype)) for i in range(LAYERS)]
    cache = relax.Var("kv", relax.AnyType())
    with bb.function("attend", [*qkv, cache]):
        results = []
        for layer, x in enumerate(qkv):
            call = relax.call_dps_packed(
                "vm.builtin.attention_kv_cache_attention_with_fused_qkv",
                [cache, relax.prim_value(layer), relax.prim_value(sm_scale(c, layer)), x],
                out_ty=out,
            )
            results.append(bb.emit(call))
        bb.emit_func_output(relax.Tuple(results))
    mod = AttachKVCache(c, kv_kernels(c, limits))(bb.get())
    with VULKAN:
        mod = relax.get_pipeline("zero")(mod)
        mod = dlight.ApplyDefaultSchedule(dlight.gpu.Fallback())(mod)
        executable = tvm.compile(mod, target=VULKAN)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "attend.so"  # what the compiler returns does not run: TVM.md
        executable.export_library(str(path))
        return relax.VirtualMachine(tvm.runtime.load_module(str(path)), dev)


class GpuSession(Session):
    """A Session whose cache lies on lavapipe, in the dtype of the configuration."""

    limits = Limits()

    def __post_init__(self) -> None:
        self.vm = compiled_on_gpu(self.config, self.limits)
        self.random = np.random.default_rng(self.seed)
        self.histories: dict[int, np.ndarray] = {}
        self.cache = self.make_cache(8, self.capacity)

    def make_cache(self, sequences: int, capacity: int) -> Any:
        sliding = int(self.config.sliding_window_size > 0)
        sizes = (sequences, capacity, self.config.prefill_chunk_size, 16, sliding)
        return self.vm[function_name("")](*(shape(s) for s in sizes))

    def tokens(self, n: int) -> np.ndarray:
        return super().tokens(n).astype(self.config.dtype)

    def run(self, seqs: list[int], x: list[np.ndarray], tree: list[int] | None = None) -> Any:
        lengths = shape(*(part.shape[1] for part in x))
        parents = [] if tree is None else [shape(*tree)]
        call = tvm.get_global_func
        call("vm.builtin.kv_state_begin_forward")(self.cache, shape(*seqs), lengths, *parents)
        joined = np.concatenate(x, axis=1)
        given = [tvm.runtime.tensor(layer, device()) for layer in joined]
        out = self.vm["attend"](*given, self.cache)
        call("vm.builtin.kv_state_end_forward")(self.cache)
        return np.stack([layer.numpy() for layer in out]).astype("float64")

    def close(self, got: np.ndarray, expected: np.ndarray) -> None:
        tolerance = TOLERANCE[self.config.dtype]
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)

    def check(self, **appended: int) -> None:
        """Append s<id>=<count> random tokens to sequences and compare every output."""
        seqs = [int(name[1:]) for name in appended]
        x = [self.tokens(n) for n in appended.values()]
        for seq, part in zip(seqs, x, strict=True):
            self.histories[seq] = np.concatenate([self.histories[seq], part], axis=1)
        got = self.run(seqs, x)
        for layer in range(LAYERS):
            parts = []
            for seq, part in zip(seqs, x, strict=True):
                history = self.histories[seq][layer]
                start = len(history) - part.shape[1]
                parts.append(reference(self.config, history, start, layer))
            self.close(got[layer], np.concatenate(parts))

    def check_tree(self, x: np.ndarray, parents: list[int], got: np.ndarray, seq: int = 0) -> None:
        """`got` holds the outputs of the last nodes of the tree."""
        first = len(parents) - got.shape[1]
        for node in range(first, len(parents)):
            path = [node]
            while parents[path[0]] >= 0:
                path.insert(0, parents[path[0]])
            history = np.concatenate([self.histories[seq], x[:, path]], axis=1)
            for layer in range(LAYERS):
                expected = reference(self.config, history[layer], history.shape[1] - 1, layer)[0]
                self.close(got[layer, node - first], expected)
