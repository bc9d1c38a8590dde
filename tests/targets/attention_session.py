"""Sequences in TVM's paged KV cache on the CPU, and attention in numpy float64 beside it.

The reference sees the whole history of a sequence; the cache gets it in pieces.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx

from qcc.compiler.passes.attach_kv_cache import AttachKVCache, function_name
from qcc.targets.cpu import TARGET
from qcc.targets.cpu.kv_cache import kv_kernels, kv_storages
from qcc.targets.spec import KVCacheConfig, KVStorage

from .aarch64 import emulate_kernels

LAYERS = 2
TOLERANCE = 1e-5  # f32 sums of up to 1000 terms of order 1, against float64
HOST = {"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()}
AVX2 = {"kind": "llvm", "mcpu": "x86-64-v3"}


def config(
    heads: tuple[int, int] = (4, 2), dim: int = 16, rotary: int | None = None, **changes: Any
) -> KVCacheConfig:
    rotary = dim if rotary is None else rotary
    inv_freq = np.float32(1) / np.float32(10000.0) ** (np.arange(0, rotary, 2) / rotary)
    return KVCacheConfig(
        num_hidden_layers=LAYERS,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=dim,
        rotary_dim=rotary,
        inv_freq=tuple(float(f) for f in np.float32(inv_freq)),
        max_positions=1024,
        prefill_chunk_size=512,
        dtype="float32",
        **{
            "rope_attention_factor": 1.0,
            "sliding_window_size": -1,
            "attention_sink_size": 0,
            **changes,
        },
    )


@functools.cache
def compiled(c: KVCacheConfig, target: tuple[tuple[str, str], ...]) -> Any:
    """The cache's constructors and, for each storage, attend_<its name>; see `_attend`."""
    bb = relax.BlockBuilder()
    plain = KVStorage("", c.num_attention_heads, c.num_key_value_heads, c.head_dim)
    tvm_target = tvm.target.Target(dict(target))
    storages = kv_storages(c, tvm_target)
    for storage in (plain, *storages):
        _attend(bb, c, storage)
    mod = AttachKVCache(c, kv_kernels(c, tvm_target), storages)(bb.get())
    if "aarch64" in str(tvm_target.attrs.get("mtriple", "")):
        mod, tvm_target = emulate_kernels(mod, tvm_target), tvm.target.Target(HOST)
    with tvm.transform.PassContext(disabled_pass=list(TARGET.needless_passes)):
        return relax.VirtualMachine(tvm.compile(mod, target=tvm_target), tvm.cpu())


def _attend(bb: Any, c: KVCacheConfig, told: KVStorage) -> None:
    """attend(qkv [n, 2, heads, dim], kv): one output a layer, whatever TVM is told of shapes."""
    n = tirx.Var("n", "int64")
    heads = c.num_attention_heads + 2 * c.num_key_value_heads
    fused, real = (n, heads, c.head_dim), (n, c.num_attention_heads, c.head_dim)
    given = (n, told.num_attention_heads + 2 * told.num_key_value_heads, told.head_dim)
    out = relax.TensorType((n, told.num_attention_heads, told.head_dim), "float32")
    qkv = [relax.Var(f"qkv{i}", relax.TensorType(fused, "float32")) for i in range(LAYERS)]
    cache = relax.Var("kv", relax.AnyType())
    with bb.function(f"attend_{told.name}", [*qkv, cache]):
        results = []
        for layer, x in enumerate(qkv):
            x = bb.emit(relax.op.reshape(x, relax.ShapeExpr(given)))
            call = relax.call_dps_packed(
                "vm.builtin.attention_kv_cache_attention_with_fused_qkv",
                [cache, relax.prim_value(layer), relax.prim_value(sm_scale(c, layer)), x],
                out_ty=out,
            )
            view = relax.op.memory.view(bb.emit(call), relax.ShapeExpr(real), "float32", 0)
            results.append(bb.emit(view))
        bb.emit_func_output(relax.Tuple(results))


def windowed(c: KVCacheConfig, layer: int) -> bool:
    """Only the last layer has a window: the two must not share one."""
    return c.layer_window > 0 and layer == LAYERS - 1


def sm_scale(c: KVCacheConfig, layer: int) -> float:
    return c.head_dim**-0.5 * (-1 if windowed(c, layer) else 1)


def builtin(name: str) -> Any:
    return tvm.get_global_func(f"vm.builtin.{name}")


def shape(*values: int) -> Any:
    return tvm.runtime.ShapeTuple(values)


def reference(
    c: KVCacheConfig,
    history: np.ndarray,
    start: int,
    layer: int = 0,
    stored: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """A layer's outputs of tokens start, start + 1, ... of a history [t, hq + 2 hkv, d].

    `stored`: the keys and values [t, hkv, d] that a cache keeps of it; rotated, unless it slides.
    """
    hq, hkv = c.num_attention_heads, c.num_key_value_heads
    q, k, v = np.split(history.astype(np.float64), [hq, hq + hkv], axis=1)
    if stored is not None:
        k, v = stored
    if c.returns_lse:  # the last head of each group is its carrier
        q = np.delete(q, np.arange(1, hkv + 1) * (hq // hkv) - 1, axis=1)
    group = q.shape[1] // hkv
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    query, key = np.arange(start, len(history)), np.arange(len(history))
    seen = key <= query[:, None]
    turned = k if stored is not None and c.sliding_window_size < 0 else rotate(c, k, key)
    scores = np.einsum("ihd,jhd->hij", rotate(c, q[start:], query), turned)
    if c.sliding_window_size > 0:
        window, sinks = c.sliding_window_size, c.attention_sink_size
        at_sinks = rotate(c, q[start:], np.minimum(query, window - 1))
        to_sinks = np.einsum("ihd,jhd->hij", at_sinks, turned)
        recent = query[:, None] - key < window - sinks
        scores = np.where(recent | (query[:, None] < window), scores, to_sinks)
        seen &= recent | (key < sinks)
    if windowed(c, layer):  # as transformers.masking_utils.sliding_window_overlay
        seen &= key > query[:, None] - c.layer_window
    scores *= c.head_dim**-0.5
    if c.logit_soft_cap:
        scores = np.tanh(scores / c.logit_soft_cap) * c.logit_soft_cap
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mass = weights.sum(-1, keepdims=True)
    out = np.einsum("hij,jhd->ihd", weights / mass, v)
    if not c.returns_lse:
        return out
    carriers = np.zeros((len(out), hkv, 1, c.head_dim))
    lse = (scores.max(-1) + np.log(mass[..., 0])).T  # [i, h]
    carriers[:, :, 0, :group] = lse.reshape(len(out), hkv, group)
    groups = out.reshape(len(out), hkv, group, c.head_dim)
    return np.concatenate([groups, carriers], axis=2).reshape(len(out), hq, c.head_dim)


def as_stored(kv: str, x: np.ndarray) -> np.ndarray:
    """x f32[t, h, d] after a storage: rounded to f16, or to codes of max |x| / 127 of each row."""
    if kv == "f16":
        return x.astype(np.float16).astype(np.float64)
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    return np.rint(x / np.where(scale > 0, scale, 1)).astype(np.float64) * scale


def rotate(c: KVCacheConfig, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """x [t, h, d] rotated by positions [t]."""
    half = c.rotary_dim // 2
    angle = positions[:, None, None] * np.array(c.inv_freq)
    cos, sin = (f(angle) * c.rope_attention_factor for f in (np.cos, np.sin))
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


@dataclass
class Session:
    """A cache, and beside it the history [layers, t, heads, d] of each of its sequences."""

    config: KVCacheConfig
    target: dict[str, str] = field(default_factory=lambda: HOST)
    capacity: int = 1024
    seed: int = 0
    kv: str = ""

    def __post_init__(self) -> None:
        self.vm = compiled(self.config, tuple(self.target.items()))
        self.random = np.random.default_rng(self.seed)
        self.histories: dict[int, np.ndarray] = {}
        sliding = int(self.config.sliding_window_size > 0)
        sizes = (8, self.capacity, self.config.prefill_chunk_size, 16, sliding)
        self.cache = self.vm[function_name(self.kv)](*(shape(s) for s in sizes))

    def tokens(self, n: int) -> np.ndarray:
        c = self.config
        heads = c.num_attention_heads + 2 * c.num_key_value_heads
        return self.random.standard_normal((LAYERS, n, heads, c.head_dim)).astype("float32")

    def add(self, seq: int) -> None:
        builtin("kv_state_add_sequence")(self.cache, seq)
        c = self.config
        if c.sliding_window_size > 0:
            builtin("attention_kv_cache_enable_sliding_window_for_seq")(
                self.cache, seq, c.sliding_window_size, c.attention_sink_size
            )
        self.histories[seq] = self.tokens(0)

    def fork(self, parent: int, child: int, at: int) -> None:
        builtin("kv_state_fork_sequence")(self.cache, parent, child, at)
        self.histories[child] = self.histories[parent][:, :at]

    def pop(self, seq: int, n: int) -> None:
        builtin("kv_state_popn")(self.cache, seq, n)
        self.histories[seq] = self.histories[seq][:, :-n]

    def remove(self, seq: int) -> None:
        builtin("kv_state_remove_sequence")(self.cache, seq)
        del self.histories[seq]

    def run(self, seqs: list[int], x: list[np.ndarray], tree: list[int] | None = None) -> Any:
        """Append x[i] [layers, n, heads, d] to seqs[i]; outputs [layers, total, hq, d]."""
        lengths = shape(*(part.shape[1] for part in x))
        parents = [] if tree is None else [shape(*tree)]
        builtin("kv_state_begin_forward")(self.cache, shape(*seqs), lengths, *parents)
        joined = np.concatenate(x, axis=1)
        out = self.vm[f"attend_{self.kv}"](
            *(tvm.runtime.tensor(layer) for layer in joined), self.cache
        )
        builtin("kv_state_end_forward")(self.cache)
        return np.stack([layer.numpy() for layer in out])

    def stored(self, seq: int, layer: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Keys and values [t, hkv, d] as the cache keeps them; None: as they are."""
        c, history = self.config, self.histories[seq][layer]
        if self.kv in ("", "f32"):
            return None
        hq, hkv = c.num_attention_heads, c.num_key_value_heads
        k, v = history[:, hq : hq + hkv], history[:, hq + hkv :]
        if c.sliding_window_size > 0:
            return as_stored(self.kv, k), as_stored(self.kv, v)
        found = self.read(seq, layer)
        # Rotated keys differ in their last bits, so a number halfway may be rounded either way.
        k = rotate(c, k, np.arange(len(k)))
        step = np.abs(k).max(-1, keepdims=True) / (127 if self.kv == "int8" else 1024)
        assert (np.abs(found[0] - k) <= 0.501 * step).all()
        np.testing.assert_array_equal(found[1], as_stored(self.kv, v))
        return found

    def read(self, seq: int, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """The same, out of the cache's pages."""
        c, count = self.config, self.histories[seq].shape[1]
        words = next(
            s for s in kv_storages(c, tvm.target.Target(self.target)) if s.name == self.kv
        ).num_key_value_heads
        rows = [tvm.runtime.tensor(np.zeros((LAYERS, count, words, 1), "float32")) for _ in "kv"]
        builtin("attention_kv_cache_debug_get_kv")(self.cache, seq, 0, count, *rows)
        found, size = [], c.num_key_value_heads * c.head_dim
        for row in (each.numpy()[layer, :, :, 0] for each in rows):
            shape = (count, c.num_key_value_heads, c.head_dim)
            if self.kv == "f16":
                found.append(row.view(np.float16).reshape(shape).astype(np.float64))
            else:
                codes = row.view(np.int8)[:, :size].reshape(shape).astype(np.float64)
                found.append(codes * row[:, size // 4 :, None])
        return found[0], found[1]

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
                stored = self.stored(seq, layer)
                parts.append(reference(self.config, history, start, layer, stored))
            expected = np.concatenate(parts)
            np.testing.assert_allclose(got[layer], expected, rtol=TOLERANCE, atol=TOLERANCE)


def check_tree(
    c: KVCacheConfig, prefix: np.ndarray, x: np.ndarray, parents: list[int], got: np.ndarray
) -> None:
    """`got` holds the outputs of the last nodes of the tree."""
    first = len(parents) - got.shape[1]
    for node in range(first, len(parents)):
        path = [node]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        history = np.concatenate([prefix, x[:, path]], axis=1)
        for layer in range(LAYERS):
            expected = reference(c, history[layer], history.shape[1] - 1, layer)[0]
            np.testing.assert_allclose(
                got[layer, node - first], expected, rtol=TOLERANCE, atol=TOLERANCE
            )
