"""The log-sum-exps that a cache returns in the carriers of its groups of query heads."""

from __future__ import annotations

import numpy as np
import pytest

from qcc.targets.spec import KVCacheConfig

from .attention_session import TOLERANCE, Session, check_tree, config, rotate, shape

CARRIED = config(heads=(8, 2), dim=12, returns_lse=True, trees=True)
FULL_ROW = config(heads=(9, 1), dim=8, layer_window=17, logit_soft_cap=2.0, returns_lse=True)
CASES = [
    CARRIED,
    FULL_ROW,
    config(heads=(4, 2), dim=20, sliding_window_size=40, attention_sink_size=4, returns_lse=True),
]


@pytest.mark.parametrize("c", CASES, ids=["g3", "g8-window-cap", "g1-sliding"])
def test_lse_of_chunks_and_decodes(c: KVCacheConfig) -> None:
    assert c.group * c.num_key_value_heads + c.num_key_value_heads == c.num_attention_heads
    session = Session(c)
    session.add(0)
    session.add(1)
    for chunk in (5, 30, 64, 1, 1, 17):
        session.check(s0=chunk)
    session.check(s0=1, s1=40)
    session.check(s1=7, s0=50)
    session.check(s0=1, s1=1)


@pytest.mark.parametrize("c", [CARRIED, FULL_ROW], ids=["full", "window"])
def test_lse_of_forks(c: KVCacheConfig) -> None:
    """With a window, first blocks of pages that a query sees nothing of."""
    session = Session(c)
    session.cache = session.vm["create_tir_paged_kv_cache"](
        *(shape(s) for s in (40, 4096, 512, 16, 0))
    )
    session.add(0)
    session.check(s0=100)
    session.fork(0, 1, 37)
    session.fork(0, 2, 96)
    session.check(s0=1, s1=1, s2=1)
    session.check(s1=30, s2=3)
    session.fork(2, 3, 96)
    session.check(s3=40, s0=2)
    session.check(s0=1, s1=1, s2=1, s3=1)
    for seq in range(4, 40):  # decodes over one prefix: the cache coalesces them
        session.fork(0, seq, 96)
    session.check(**{f"s{seq}": 1 + seq % 3 for seq in range(4, 40)})
    session.check(**{f"s{seq}": 1 for seq in range(40)})


def test_lse_of_trees() -> None:
    parents = [-1, 0, 0, 1, 1, 2, 5]
    session = Session(CARRIED)
    session.add(0)
    session.check(s0=40)
    prefix, x = session.histories[0], session.tokens(len(parents))
    check_tree(CARRIED, prefix, x, parents, session.run([0], [x], tree=parents))
    more = session.tokens(2)
    got = session.run([0], [more], tree=[3, 6])
    check_tree(CARRIED, prefix, np.concatenate([x, more], axis=1), [*parents, 3, 6], got)


def test_a_sink_joins_the_softmax_by_the_lse() -> None:
    """As KVCacheConfig says: output * sigmoid(lse - sink) is softmax over one more logit."""
    session = Session(CARRIED)
    session.add(0)
    x = session.tokens(40)
    parts = [session.run([0], [part]) for part in np.split(x, [25, 39], axis=1)]
    got = np.concatenate(parts, axis=1)[0].reshape(40, 2, 4, 12)
    out, lse = got[:, :, :3], got[:, :, 3, :3]
    sinks = np.array([[-1.0, 0.5, 2.0], [3.0, 0.0, 6.0]])
    found = out / (1 + np.exp(sinks - lse))[..., None]

    history = x[0].astype(np.float64)
    q, k = (rotate(CARRIED, part, np.arange(40)) for part in (history[:, :8], history[:, 8:10]))
    q, v = q.reshape(40, 2, 4, 12)[:, :, :3], history[:, 10:]
    scores = np.einsum("ikgd,jkd->ikgj", q, k) * 12**-0.5
    scores = np.where(np.tri(40, dtype=bool)[:, None, None], scores, -np.inf)
    scores = np.concatenate([scores, np.broadcast_to(sinks[..., None], (40, 2, 3, 1))], axis=-1)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("ikgj,jkd->ikgd", weights[..., :-1], v)
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_group_fits_its_carrier() -> None:
    with pytest.raises(AssertionError):
        Session(config(heads=(10, 1), dim=8, returns_lse=True))
