"""The scans of gated delta networks against numpy f64: those that run anywhere, and the CPU's."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import tvm

from qcc.compiler.models.delta_rule import causal_conv_func, delta_rule_func
from qcc.compiler.recurrent_config import DeltaConfig
from qcc.targets.cpu.passes.lower_scans import LowerScans
from qcc.targets.cpu.passes.schedule import schedule_loops

from .aarch64 import Emulated
from .linear_weights import PROCESSORS, lacks, tensor

SIZES = {
    "odd": DeltaConfig(2, 6, 12, 20, 4, (True,)),
    "lone": DeltaConfig(1, 1, 7, 33, 2, (True,)),  # no vector divides anything
    "usual": DeltaConfig(2, 4, 128, 128, 4, (True,)),
    "mamba": DeltaConfig(2, 4, 40, 24, 4, (True,), corrects=False, conv_bias=True),
}
KINDS = ("anywhere", "avx512", "avx2", "sse", "neon")
PLACES = 5
# (place, rows) of each sequence: shorter than the convolution, and longer.
RUNS = [[(3, 40)], [(4, 1)], [(4, 1), (0, 1), (3, 1)], [(1, 2), (4, 17), (0, 3), (2, 1)]]
BESIDE = 5  # columns of x beside those of the convolution


@functools.cache
def built(kind: str, name: str) -> Any:
    """A module with `conv` and `rule`."""
    sizes = SIZES[name]
    isa, description = PROCESSORS["avx2" if kind == "anywhere" else kind]
    made = {
        "conv": causal_conv_func(sizes, sizes.channels + BESIDE, "float32"),
        "rule": delta_rule_func(sizes),
    }
    module = tvm.IRModule({key: f.with_attr("global_symbol", key) for key, f in made.items()})
    if kind == "anywhere":
        scheduled = {gv: schedule_loops(f, isa) for gv, f in module.functions_items()}
        module = tvm.IRModule({gv: f for gv, f in scheduled.items()})
    else:
        module = LowerScans(isa)(module)
        named = {gv.name_hint: f for gv, f in module.functions_items()}
        assert all("tirx.is_scheduled" in f.attrs for f in named.values()), "a kernel is missing"
        module = tvm.IRModule({k: f.with_attr("global_symbol", k) for k, f in named.items()})
    target = tvm.target.Target(description)
    with target:
        lib = tvm.compile(module, target)
    return Emulated(lib, f"delta_rule_{name}") if kind == "neon" else lib


def segments(run: list[tuple[int, int]]) -> Any:
    """int32[b, 3]."""
    places, rows = np.array(run).T
    return np.stack([places, np.cumsum(rows) - rows, rows], axis=1).astype(np.int32)


@pytest.fixture(params=SIZES)
def name(request: Any) -> str:
    found: str = request.param
    return found


@pytest.fixture(params=KINDS)
def module(request: Any, name: str) -> Any:
    if request.param in PROCESSORS and (why := lacks(request.param)):
        pytest.skip(why)
    return built(request.param, name)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_convolution(module: Any, name: str, run: list[tuple[int, int]]) -> None:
    sizes, random = SIZES[name], np.random.default_rng(0)
    rows, taps, channels = sum(n for _, n in run), sizes.conv_kernel, sizes.channels
    x = random.normal(size=(rows, channels + BESIDE)).astype(np.float32)
    x[0] *= 60  # where exp(-x) overflows
    weight = random.normal(size=(taps, channels)).astype(np.float32)
    state = random.normal(size=(PLACES, taps - 1, channels)).astype(np.float32)
    bias = random.normal(size=channels * sizes.conv_bias).astype(np.float32)
    expected, kept = np.zeros((rows, channels)), state.astype(np.float64)
    for place, first, count in segments(run):
        series = np.concatenate([kept[place], x[first : first + count, :channels].astype("f8")])
        for t in range(count):
            total = (weight.astype("f8") * series[t : t + taps]).sum(axis=0)
            total += bias if sizes.conv_bias else 0.0
            expected[first + t] = total * np.exp(-np.logaddexp(0, -total))
        kept[place] = series[count:]
    held, out = tensor(state), tensor(np.full((rows, channels), np.nan, np.float32))
    inputs = [x, weight.reshape(-1), *([bias] if sizes.conv_bias else []), segments(run)]
    module["conv"](*map(tensor, inputs), held, out)
    np.testing.assert_allclose(out.numpy(), expected, rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(held.numpy(), kept.astype(np.float32))


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_recurrence(module: Any, name: str, run: list[tuple[int, int]]) -> None:
    """q and k are scaled by the norms; decays from almost 0 to almost 1."""
    sizes, random = SIZES[name], np.random.default_rng(1)
    rows, heads, dim = sum(n for _, n in run), sizes.value_heads, sizes.key_head_dim
    qkv = random.normal(size=(rows, sizes.channels)).astype(np.float32)
    qk = qkv[:, : 2 * sizes.keys].reshape(rows, 2 * sizes.key_heads, dim).astype("f8")
    norms = (1 / np.linalg.norm(qk, axis=2)).astype(np.float32)
    gates = random.uniform(0.001, 0.999, size=(rows, 2 * heads)).astype(np.float32)
    shape = (PLACES, heads, dim, sizes.value_head_dim)
    state = random.normal(size=shape).astype(np.float32)
    scaled = qk * norms[:, :, None].astype("f8")
    each = heads // sizes.key_heads
    q, k = (np.repeat(part, each, axis=1) for part in np.split(scaled, 2, axis=1))
    v = qkv[:, 2 * sizes.keys :].reshape(rows, heads, -1).astype("f8")
    decay, beta = np.split(gates.astype("f8"), 2, axis=1)
    expected, kept = np.zeros_like(v), state.astype("f8")
    for place, first, count in segments(run):
        for t in range(first, first + count):
            s = kept[place] * decay[t, :, None, None]
            known = np.einsum("hij,hi->hj", s, k[t]) * sizes.corrects
            s = s + k[t][:, :, None] * ((v[t] - known) * beta[t, :, None])[:, None]
            expected[t] = np.einsum("hij,hi->hj", s, q[t])
            kept[place] = s
    held, out = tensor(state), tensor(np.full((rows, sizes.values), np.nan, np.float32))
    inputs = [tensor(each) for each in (qkv, norms, gates, segments(run))]
    module["rule"](*inputs, held, out)
    np.testing.assert_allclose(out.numpy(), expected.reshape(rows, -1), rtol=2e-5, atol=5e-6)
    np.testing.assert_allclose(held.numpy(), kept, rtol=2e-5, atol=5e-6)
    others = [place for place in range(PLACES) if place not in dict(run)]
    np.testing.assert_array_equal(held.numpy()[others], state[others])
