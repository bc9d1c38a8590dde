"""Caches that keep keys and values as f16 or int8, against attention over what they keep."""

from __future__ import annotations

import numpy as np
import pytest
import tvm

from qcc.runtime.machine import enable_tiles
from qcc.targets.cpu.kv_cache import kv_storages
from qcc.targets.spec import TILES, KVCacheConfig

from .attention_session import AVX2, Session, as_stored, check_tree, config

SSE = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64"})
AMX = {"kind": "llvm", "mcpu": "sapphirerapids"}
TILED = [
    config(heads=(8, 2), dim=64, layer_window=40, logit_soft_cap=2.0),
    config(heads=(7, 1), dim=80, rotary=32, sliding_window_size=40, attention_sink_size=4),
]
KV = ["f32", "f16", "int8"]
GROUPED = config(heads=(8, 2), dim=64)
ONE_HEAD = config(heads=(7, 1), dim=80, rotary=32, rope_attention_factor=1.25)
NO_ROPE = config(dim=8, rotary=0, trees=True)
CASES = {
    "d64": GROUPED,
    "d12-window-cap-lse": config(
        heads=(8, 2), dim=12, layer_window=5, logit_soft_cap=2.0, returns_lse=True
    ),
    "d24-sliding": config(
        heads=(6, 2), dim=24, rotary=8, sliding_window_size=33, attention_sink_size=20
    ),
    "no-rope": NO_ROPE,
}


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("c", CASES.values(), ids=CASES)
def test_storages(c: KVCacheConfig, kv: str) -> None:
    """Chunks, decodes and two sequences; one is long enough to be split among threads."""
    session = Session(c, kv=kv)
    session.add(0)
    session.add(1)
    for chunk in (150, 1, 17, 1):
        session.check(s0=chunk)
    session.check(s0=1, s1=40)
    session.check(s1=7, s0=50)
    session.check(s0=1, s1=1)


@pytest.mark.parametrize("kv", KV)
def test_storages_of_forks(kv: str) -> None:
    """Pages are copied where a fork leaves one in its middle."""
    session = Session(GROUPED, kv=kv)
    session.add(0)
    session.check(s0=70)
    session.fork(0, 1, 70)
    session.fork(0, 2, 37)
    session.check(s0=1, s1=1, s2=1)
    session.check(s1=20, s2=3)
    session.pop(0, 40)
    session.check(s0=1, s2=1)


@pytest.mark.parametrize("kv", KV)
def test_storages_of_trees(kv: str) -> None:
    """The accepted path of a tree is moved together, scales too."""
    parents = [-1, 0, 0, 1, 1, 2, 5]
    session = Session(NO_ROPE, kv=kv)
    session.add(0)
    session.check(s0=40)
    x = session.tokens(len(parents))
    heads = session.config.num_attention_heads
    if kv != "f32":
        for token in np.moveaxis(x[:, :, heads:], 1, 0):
            token[:] = as_stored(kv, token)
        kept = [session.stored(0, layer) for layer in range(len(x))]
        prefix = session.histories[0].copy()
        for layer, found in enumerate(kept):
            assert found is not None
            prefix[layer][:, heads:] = np.concatenate(found, axis=1)
    else:
        prefix = session.histories[0]
    check_tree(session.config, prefix, x, parents, session.run([0], [x], tree=parents))
    commit = tvm.get_global_func("vm.builtin.attention_kv_cache_commit_accepted_token_tree_nodes")
    commit(session.cache, tvm.runtime.ShapeTuple([0]), tvm.runtime.ShapeTuple([6]))
    session.histories[0] = np.concatenate([session.histories[0], x[:, [0, 2, 5, 6]]], axis=1)
    session.check(s0=1)
    session.check(s0=20)


def test_a_row_of_zeros_stays_zeros() -> None:
    session = Session(NO_ROPE, kv="int8")
    session.add(0)
    x = session.tokens(3)
    x[:, :2, 4:] = 0
    session.histories[0] = x
    session.run([0], [x])
    k, v = session.read(0, 1)
    assert not k[:2].any() and not v[:2].any() and k[2].any()


def test_sizes_of_storages() -> None:
    """Words of 4 bytes: of heads of 64 numbers, and a scale each."""
    found = {s.name: s.num_key_value_heads * s.head_dim for s in kv_storages(GROUPED, SSE)}
    assert found == {"f32": 2 * 64, "f16": 2 * 32, "int8": 2 * 16 + 2}
    for storage in kv_storages(GROUPED, SSE):
        total = storage.num_attention_heads + 2 * storage.num_key_value_heads
        assert total * storage.head_dim == (8 + 2 * 2) * 64
    assert [s.name for s in kv_storages(config(dim=4, rotary=0), SSE)] == ["f32", "f16"]


@pytest.mark.parametrize("kv", KV)
def test_storages_on_avx2(kv: str) -> None:
    if not str(tvm.target.codegen.llvm_get_system_triple()).startswith("x86"):
        pytest.skip("runs x86 code")
    session = Session(ONE_HEAD, target=AVX2, kv=kv)
    session.add(0)
    for chunk in (50, 1, 20):
        session.check(s0=chunk)


@pytest.mark.parametrize("kv", KV[1:])
def test_tiles(kv: str) -> None:
    """Scores and weights of AMX are of bf16: the mean error is below that of a wrong key."""
    if not enable_tiles():
        pytest.skip("no AMX tiles here")
    for c in TILED:
        exact, tiled = (Session(c, target=AMX, kv=name) for name in (kv, kv + TILES))
        for session in (exact, tiled):
            session.add(0)
        for chunk in (100, 40, 1, 17):
            x = exact.tokens(chunk)
            want, got = (session.run([0], [x]) for session in (exact, tiled))
            error = np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))
            assert error < 1e-2, (c, chunk, error)
            # A rolling window has no decode kernel of one token.
            used = chunk > 1 or c.sliding_window_size > 0
            assert (error > 1e-5) == used, (c, chunk, error)
