"""The CPU's attention kernels, through TVM's paged KV cache, against attention in numpy float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm

from qcc.compiler.passes.attach_kv_cache import AttachKVCache
from qcc.targets.cpu.kv_cache import kv_kernels
from qcc.targets.spec import KVCacheConfig

from .attention_session import AVX2, Session, builtin, check_tree, config, shape

SHAPES = [
    config(heads=(4, 4), dim=8),
    config(heads=(8, 2), dim=64, trees=True),
    config(heads=(7, 1), dim=80, rotary=32, rope_attention_factor=1.25),
]


@pytest.mark.parametrize("c", SHAPES, ids=lambda c: f"d{c.head_dim}")
def test_prefill_decode_and_chunks(c: KVCacheConfig) -> None:
    session = Session(c)
    session.add(0)
    session.check(s0=150)
    for _ in range(3):
        session.check(s0=1)
    session.check(s0=40)  # a further chunk sees cached pages
    session.check(s0=2)


def test_a_chunked_prompt_is_the_whole_prompt() -> None:
    whole, chunked = Session(SHAPES[1]), Session(SHAPES[1])
    whole.add(0)
    chunked.add(0)
    x = whole.tokens(100)
    expected = whole.run([0], [x])
    parts = [chunked.run([0], [part]) for part in np.split(x, [1, 33, 80], axis=1)]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, rtol=1e-5, atol=1e-5)


def test_batch_of_unequal_sequences() -> None:
    session = Session(SHAPES[1])
    for seq in range(4):
        session.add(seq)
    session.check(s0=33, s1=1, s2=80, s3=16)
    session.check(s0=1, s1=1, s2=1, s3=1)
    session.check(s1=70, s3=2)
    session.check(s3=1, s0=1)


def test_fork_remove_and_pop() -> None:
    session = Session(SHAPES[1])
    session.add(0)
    session.check(s0=70)
    session.fork(0, 1, 70)  # at the end, in the middle of a page
    session.fork(0, 2, 37)  # earlier, in the middle of a page
    session.check(s0=1, s1=1, s2=1)
    session.check(s1=20, s2=3)
    session.fork(1, 3, 64)  # at the end of a page: three blocks deep
    session.check(s3=5, s0=2)
    session.check(s0=1, s1=1, s2=1, s3=1)
    session.remove(1)
    session.pop(0, 40)  # beyond its own pages
    session.pop(2, 2)
    session.check(s0=1, s2=1, s3=1)
    session.check(s0=30, s3=1)
    for seq in (0, 2, 3):
        session.remove(seq)
    assert builtin("attention_kv_cache_empty")(session.cache)


def test_many_sequences_share_a_prefix() -> None:
    """32 decodes over one prefix: the cache coalesces them into one prefill over its pages."""
    c = SHAPES[0]
    session = Session(c)
    session.cache = session.vm["create_tir_paged_kv_cache"](
        *(shape(s) for s in (40, 4096, 512, 16, 0))
    )
    session.add(0)
    session.check(s0=100)
    for seq in range(1, 36):
        session.fork(0, seq, 96)
    session.check(**{f"s{seq}": 3 for seq in range(1, 36)})
    session.check(**{f"s{seq}": 1 for seq in range(36)})


def test_model_without_rope() -> None:
    session = Session(config(dim=8, rotary=0))
    session.add(0)
    session.check(s0=20)
    session.check(s0=1)


SLIDING = [
    config(sliding_window_size=40),
    config(sliding_window_size=40, attention_sink_size=4),
    config(heads=(6, 2), dim=24, rotary=8, sliding_window_size=33, attention_sink_size=20,
           rope_attention_factor=1.25),
    config(heads=(2, 2), dim=8, rotary=0, sliding_window_size=16, attention_sink_size=1),
    config(heads=(6, 2), dim=12, sliding_window_size=17),
    config(heads=(3, 1), dim=40, sliding_window_size=18),
]  # fmt: skip


@pytest.mark.parametrize(
    "c", SLIDING, ids=lambda c: f"w{c.sliding_window_size}s{c.attention_sink_size}"
)
@pytest.mark.parametrize("chunks", [(100,), (5, 30, 10, 60, 3), (1, 2, 38, 41, 1), (17, 16, 8, 24)])
def test_sliding_window(c: KVCacheConfig, chunks: tuple[int, ...]) -> None:
    session = Session(c, capacity=64)
    session.add(0)
    session.add(1)
    for chunk in chunks:
        session.check(s0=chunk)
    for step in range(70):  # several pages recycled
        session.check(s0=1, **({"s1": 1} if step % 3 == 0 else {}))
    session.check(s1=7, s0=50)
    session.check(s0=1, s1=1)


def test_long_sliding_window_keeps_its_angles() -> None:
    session = Session(config(dim=32, heads=(2, 1), sliding_window_size=300), capacity=512)
    session.add(0)
    for _ in range(3):
        session.check(s0=450)
    session.check(s0=1)


def test_the_window_is_the_librarys_choice() -> None:
    """A sliding window is there whatever the caller says; without one, asking is an error."""
    sizes = [shape(s) for s in (1, 64, 64, 16)]
    session = Session(SLIDING[0])
    session.cache = session.vm["create_tir_paged_kv_cache"](*sizes, shape(0))
    session.add(0)
    session.check(s0=50)
    with pytest.raises(tvm.error.InternalError, match="RoPE mode must be normal"):
        Session(SHAPES[0]).vm["create_tir_paged_kv_cache"](*sizes, shape(1))


def test_tree_attention() -> None:
    """A token tree after a prefix: each node sees the prefix and its own ancestors."""
    c, parents = SHAPES[1], [-1, 0, 0, 1, 1, 2, 5]
    grown, committed = Session(c), Session(c)
    for session in (grown, committed):
        session.add(0)
        session.check(s0=40)
        prefix, x = session.histories[0], session.tokens(len(parents))
        check_tree(c, prefix, x, parents, session.run([0], [x], tree=parents))
    # Two more nodes: now the cached pages hold the rest of the tree.
    more = grown.tokens(2)
    got = grown.run([0], [more], tree=[3, 6])
    check_tree(c, prefix, np.concatenate([x, more], axis=1), [*parents, 3, 6], got)
    # One path is accepted: the cache keeps its nodes only.
    commit = builtin("attention_kv_cache_commit_accepted_token_tree_nodes")
    commit(committed.cache, shape(0), shape(6))
    committed.histories[0] = np.concatenate([prefix, x[:, [0, 2, 5, 6]]], axis=1)
    committed.check(s0=1)
    committed.check(s0=20)


def test_trees_are_refused_where_nobody_asked_for_them() -> None:
    session = Session(SHAPES[0])
    session.add(0)
    with pytest.raises(tvm.error.InternalError, match="tree_mask_"):
        session.run([0], [session.tokens(3)], tree=[-1, 0, 0])


@pytest.mark.parametrize("c", [SHAPES[2], SLIDING[1]], ids=["full", "sliding"])
def test_avx2(c: KVCacheConfig) -> None:
    if not str(tvm.target.codegen.llvm_get_system_triple()).startswith("x86"):
        pytest.skip("runs x86 code")
    session = Session(c, target=AVX2)
    session.add(0)
    session.check(s0=50)
    session.check(s0=1)
    session.check(s0=20)


def test_builds_for_aarch64(tmp_path: Any) -> None:
    target = tvm.target.Target({"kind": "llvm", "mtriple": "aarch64-linux-gnu"})
    c = SLIDING[1]
    mod = AttachKVCache(c, kv_kernels(c, target))(tvm.IRModule())
    tvm.compile(mod, target=target).export_library(
        str(tmp_path / "kv.tar")
    )  # object files, not linked
    assert (tmp_path / "kv.tar").stat().st_size > 10_000
