"""Attention on aarch64: the kernels run under emulation, the cache on this machine."""

from __future__ import annotations

import pytest

from qcc.targets.spec import KVCacheConfig

from .aarch64 import lacking
from .attention_session import Session, config
from .linear_weights import PROCESSORS

KV = ["f32", "f16", "int8"]
# Of the widest processor and of the narrowest.
CASES = {
    "neon_i8mm": config(heads=(8, 2), dim=64, layer_window=40, logit_soft_cap=2.0),
    "neon": config(heads=(6, 2), dim=24, rotary=8, sliding_window_size=33, attention_sink_size=20),
}


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize(("processor", "c"), CASES.items(), ids=CASES)
def test_attention_on_aarch64(processor: str, c: KVCacheConfig, kv: str) -> None:
    """Chunks, decodes and two sequences; one is long enough to be split among tasks."""
    if why := lacking():
        pytest.skip(why)
    session = Session(c, kv=kv, target=PROCESSORS[processor][1], capacity=256)
    session.add(0)
    session.add(1)
    for chunk in (60, 1, 17, 1):
        session.check(s0=chunk)
    session.check(s0=1, s1=40)
    session.check(s0=1, s1=1)
