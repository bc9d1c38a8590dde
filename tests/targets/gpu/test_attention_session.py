"""The GPU attention kernels through TVM's paged KV cache, against attention in numpy float64."""

from __future__ import annotations

import numpy as np
import pytest

from qcc.targets.spec import KVCacheConfig

from .attention_cases import gpu_config
from .attention_gpu import GpuSession

FULL = {"heads": (8, 2), "dim": 64}
WINDOW = {"heads": (3, 1), "dim": 20, "rotary": 8, "layer_window": 33, "logit_soft_cap": 1.5}
SLIDING = {"heads": (4, 2), "dim": 64, "sliding_window_size": 40, "attention_sink_size": 4}
LSE = {"heads": (8, 2), "dim": 80, "rotary": 32, "returns_lse": True}


@pytest.mark.parametrize(
    "c",
    [gpu_config("float16", **FULL), gpu_config("float32", **LSE, rope_attention_factor=1.25)],
    ids=["f16", "lse-f32"],
)
def test_gpu_session(c: KVCacheConfig) -> None:
    session = GpuSession(c)
    session.add(0)
    session.add(1)
    for chunk in (150, 1, 17, 1):
        session.check(s0=chunk)
    session.check(s0=1, s1=40)
    session.check(s1=7, s0=50)
    session.check(s0=1, s1=1)


def test_gpu_sliding_window() -> None:
    """Of one sequence: TVM's cache cannot slide over several but on CPUs and CUDA."""
    session = GpuSession(gpu_config("float16", **SLIDING))
    session.add(0)
    for chunk in (30, 5, 1, 1, 50, *[1] * 12):
        session.check(s0=chunk)


def test_gpu_forks() -> None:
    """Blocks of pages that sequences share, and decodes over one prefix, which are coalesced."""
    session = GpuSession(gpu_config("float32", **WINDOW))
    session.cache = session.make_cache(40, 4096)
    session.add(0)
    session.check(s0=100)
    session.fork(0, 1, 37)
    session.fork(0, 2, 96)
    session.check(s0=1, s1=1, s2=1)
    session.check(s1=30, s2=3)
    session.fork(2, 3, 99)
    session.check(s3=40, s0=2)
    session.pop(0, 40)
    for seq in range(4, 40):
        session.fork(2, seq, 96)
    session.check(**{f"s{seq}": 1 + seq % 3 for seq in range(4, 40)})
    session.check(**{f"s{seq}": 1 for seq in range(40)})


def test_gpu_trees() -> None:
    """In a layer without a window and one with; of a forked sequence in its second block."""
    parents = [-1, 0, 0, 1, 2, 4, 3, 5, 7, 8, 8, 6]
    session = GpuSession(gpu_config("float32", **WINDOW))
    session.add(0)
    session.check(s0=40)
    session.fork(0, 1, 37)
    session.check(s1=30, s0=1)
    for seq in (0, 1):
        x = session.tokens(len(parents))
        session.check_tree(x, parents, session.run([seq], [x], tree=parents), seq)
        # Two more nodes: now the cached pages hold the rest of the tree.
        more = session.tokens(2)
        got = session.run([seq], [more], tree=[9, 11])
        session.check_tree(np.concatenate([x, more], axis=1), [*parents, 9, 11], got, seq)
