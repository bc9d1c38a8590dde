"""Layers of one cache that differ: windows by the sign of sm_scale; and soft caps of the scores."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tvm

from qcc.targets.spec import KVCacheConfig

from .attention_session import (
    AVX2,
    LAYERS,
    TOLERANCE,
    Session,
    check_tree,
    config,
    reference,
    shape,
)

SMALL = config(heads=(6, 2), dim=12, layer_window=5, trees=True)
CAPPED = config(heads=(3, 1), dim=20, rotary=8, layer_window=33, logit_soft_cap=1.5, trees=True)
WINDOWS = [
    SMALL,
    config(heads=(8, 2), dim=64, layer_window=16),
    config(heads=(7, 1), dim=80, rotary=32, layer_window=70, rope_attention_factor=1.25),
    CAPPED,
]
WINDOW_IDS = [f"w{c.layer_window}" for c in WINDOWS]


@pytest.mark.parametrize("c", WINDOWS, ids=WINDOW_IDS)
@pytest.mark.parametrize("chunks", [(150, 40), (5, 30, 10, 64, 3), (1, 2, 15, 33, 1), (16, 16, 17)])
def test_layer_window(c: KVCacheConfig, chunks: tuple[int, ...]) -> None:
    session = Session(c)
    session.add(0)
    session.add(1)
    for chunk in chunks:
        session.check(s0=chunk)
    for step in range(35):  # over the borders of two pages
        session.check(s0=1, **({"s1": 1} if step % 3 == 0 else {}))
    session.check(s1=7, s0=50)
    session.check(s0=1, s1=1)


@pytest.mark.parametrize("c", WINDOWS[:2], ids=WINDOW_IDS[:2])
@pytest.mark.parametrize("chunks", [(60,), (30, 30), (59, 1)], ids=["ragged", "paged", "decode"])
def test_a_window_off_by_one_would_be_seen(c: KVCacheConfig, chunks: tuple[int, ...]) -> None:
    session = Session(c)
    session.add(0)
    x = session.tokens(60)
    ends = np.cumsum(chunks)
    got = [session.run([0], [x[:, end - n : end]]) for n, end in zip(chunks, ends, strict=True)]
    last, start = got[-1], 60 - chunks[-1]

    def errors(layer: int, by: int) -> np.ndarray:
        """Largest error of each token that has more tokens before it than either window."""
        other = dataclasses.replace(c, layer_window=c.layer_window + by)
        error = np.abs(last[layer] - reference(other, x[layer], start, layer)).max((1, 2))
        return error[max(c.layer_window + 1 - start, 0) :]

    full, windowed = range(LAYERS)
    assert errors(windowed, 0).max() < TOLERANCE
    assert min(errors(windowed, by).min() for by in (-1, 1)) > 1000 * TOLERANCE
    assert errors(full, 1).max() < TOLERANCE


def test_a_windowed_layer_reads_only_its_window() -> None:
    """NaN in keys that no query of a call sees: a weight of 0 would not stop it."""
    session = Session(SMALL)
    session.add(0)
    x = session.tokens(112)
    x[:, :80] = np.nan  # five pages
    ends = [80, 100, 101, 112]
    got = [session.run([0], [part]) for part in np.split(x, ends[:-1], axis=1)]
    expected = reference(SMALL, np.nan_to_num(x[-1]), 85, LAYERS - 1)
    found = np.concatenate(got, axis=1)[-1, 85:]
    rows = 16 // 3 + 1  # tokens of a tile, which may see keys of the first
    np.testing.assert_allclose(found[rows:], expected[rows:], rtol=TOLERANCE, atol=TOLERANCE)


def test_windows_of_a_batch_and_its_forks() -> None:
    session = Session(CAPPED)
    for seq in range(3):
        session.add(seq)
    session.check(s0=70, s1=1, s2=90)
    session.check(s0=1, s1=1, s2=1)
    session.fork(0, 3, 71)  # at the end, in the middle of a page
    session.fork(0, 4, 37)  # earlier, in the middle of a page
    session.check(s0=1, s3=1, s4=1)
    session.check(s3=40, s4=3, s1=20)
    session.fork(3, 5, 96)  # at the end of a page: three blocks deep
    session.check(s5=5, s0=2)
    session.check(s0=1, s1=1, s2=1, s3=1, s4=1, s5=1)
    session.remove(3)
    session.pop(0, 40)
    session.check(s0=1, s4=1, s5=30)


def test_windows_over_a_shared_prefix() -> None:
    """Coalesced decodes: queries of unequal positions meet in a tile."""
    session = Session(SMALL)
    session.cache = session.vm["create_tir_paged_kv_cache"](
        *(shape(s) for s in (40, 4096, 512, 16, 0))
    )
    session.add(0)
    session.check(s0=100)
    for seq in range(1, 36):
        session.fork(0, seq, 96)
    session.check(**{f"s{seq}": 1 + seq * 7 % 5 for seq in range(1, 36)})
    session.check(**{f"s{seq}": 1 for seq in range(36)})


@pytest.mark.parametrize("c", [SMALL, CAPPED], ids=["w5", "w33-cap"])
def test_windows_of_trees(c: KVCacheConfig) -> None:
    """A node counts back over its ancestors: not over the nodes that are stored between them."""
    parents = [-1, 0, 0, 1, 2, 4, 3, 5, 7, 8, 8, 6]
    session = Session(c)
    session.add(0)
    session.check(s0=40)
    session.fork(0, 1, 37)
    session.check(s1=30, s0=1)
    for seq in (0, 1):  # the tree of a forked sequence lies in its second block of pages
        prefix, x = session.histories[seq], session.tokens(len(parents))
        check_tree(c, prefix, x, parents, session.run([seq], [x], tree=parents))
        # Two more nodes: now the cached pages hold the rest of the tree.
        more = session.tokens(2)
        got = session.run([seq], [more], tree=[9, 11])
        check_tree(c, prefix, np.concatenate([x, more], axis=1), [*parents, 9, 11], got)


CAPS = [
    config(heads=(6, 2), dim=20, logit_soft_cap=2.0),
    config(sliding_window_size=40, attention_sink_size=4, logit_soft_cap=0.5),
]


@pytest.mark.parametrize("c", CAPS, ids=["full", "sliding"])
def test_soft_cap(c: KVCacheConfig) -> None:
    session = Session(c)
    session.add(0)
    for count in (70, 1, 1, 30, 1):
        session.check(s0=count)
    uncapped = dataclasses.replace(c, logit_soft_cap=0.0)
    history = session.histories[0][0]
    difference = reference(c, history, 50) - reference(uncapped, history, 50)
    assert np.abs(difference).max() > 1000 * TOLERANCE


def test_windows_and_caps_on_avx2() -> None:
    if not str(tvm.target.codegen.llvm_get_system_triple()).startswith("x86"):
        pytest.skip("runs x86 code")
    session = Session(CAPPED, target=AVX2)
    session.add(0)
    session.check(s0=50)
    session.check(s0=1)
    session.check(s0=20)


def test_a_layers_window_needs_every_key() -> None:
    with pytest.raises(AssertionError, match="a layer's window needs the keys"):
        Session(config(sliding_window_size=40, layer_window=8))
