"""AttachSampling against numpy in float64, through the pipeline in which the functions run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax as rx

from qcc.compiler.passes import pipeline
from qcc.compiler.passes.attach_metadata import AttachMetadata
from qcc.compiler.passes.attach_sampling import AttachSampling
from qcc.compiler.passes.hoist_repack import HoistRepack
from qcc.targets.cpu import TARGET
from qcc.targets.spec import BuildOptions

MAX_BATCH = 64
SLACK = 4 * 2.0**-24
BELOW_1 = float(np.nextafter(np.float32(1), np.float32(0)))


def build(vocab_size: int, fuse: bool = True) -> Any:
    """The VM executable of a module with the sampling functions alone."""
    target, _ = TARGET.resolve(BuildOptions())
    schedule = TARGET.passes("schedule", target, 2)
    metadata = AttachMetadata(lambda usage: {})
    lowering = pipeline.lowering({}, [], HoistRepack(), schedule, metadata, fuse=fuse)
    passes = [AttachSampling(vocab_size, MAX_BATCH), *lowering]
    module = pipeline.run(tvm.IRModule(), passes, target)
    with target:
        return rx.build(module, target, relax_pipeline=None)


@pytest.fixture(scope="module", params=[361, 512, 32000])
def vocab(request: pytest.FixtureRequest) -> tuple[int, Any]:
    return request.param, rx.VirtualMachine(build(request.param), tvm.cpu())


@pytest.fixture(scope="module")
def small() -> Any:
    """A VM for a vocabulary of 8 tokens, without fusion."""
    return rx.VirtualMachine(build(8, fuse=False), tvm.cpu())


def tensor(values: Any, dtype: str = "float32") -> Any:
    return tvm.runtime.tensor(np.ascontiguousarray(values, dtype))


def softmax(vm: Any, logits: np.ndarray, temperature: Any) -> np.ndarray:
    out = vm["softmax_with_temperature"](tensor(logits[:, None, :]), tensor(temperature))
    assert out.shape == (len(logits), 1, logits.shape[1])
    return out.numpy()[:, 0, :]


def sample(vm: Any, probs: Any, u: Any, top_p: Any, rows: Any = None) -> list[int]:
    """Sort and sample; `top_p` a row of `probs`, `rows` of each u (default: the first)."""
    ordered, indices = vm["argsort_probs"](tensor(probs))
    rows = tensor([0] * len(u) if rows is None else rows, "int32")
    out = vm["sample_with_top_p"](ordered, indices, tensor(u), rows, tensor(top_p))
    assert out.dtype == "int32"
    return out.numpy().tolist()


def random_probs(rng: np.random.Generator, b: int, v: int) -> np.ndarray:
    logits = rng.normal(size=(b, v)) * 3
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    return (probs / probs.sum(-1, keepdims=True)).astype("float32")


def test_pass_adds_to_the_module() -> None:
    builder = rx.BlockBuilder()
    with builder.function("decode", [x := rx.Var("x", rx.TensorType((1,), "float32"))]):
        builder.emit_func_output(x)
    before = builder.finalize()
    after = AttachSampling(361, 4)(before)
    rx.analysis.well_formed(after)
    names = {gv.name_hint for gv, f in after.functions_items() if isinstance(f, rx.Function)}
    assert names == {"decode", "softmax_with_temperature", "argsort_probs", "sample_with_top_p"}
    assert [gv.name_hint for gv in before.get_global_vars()] == ["decode"]
    for name in names - {"decode"}:
        assert dict(after[name].attrs["tir_var_upper_bound"]) == {"b": 4, "n": 4}
    roles = {str(f.attrs["qcc.role"]) for f in after.functions.values() if "qcc.role" in f.attrs}
    assert roles == {"argsort_probs", "sample_with_top_p", "softmax_with_temperature"}


@pytest.mark.parametrize("b", [1, 3, 8])
def test_softmax(vocab: tuple[int, Any], b: int) -> None:
    v, vm = vocab
    rng = np.random.default_rng(b)
    logits = (rng.normal(size=(b, v)) * 5).astype("float32")
    temperature = rng.uniform(0.3, 2, size=b).astype("float32")
    x = logits.astype("float64") / temperature[:, None]
    expected = np.exp(x - x.max(-1, keepdims=True))
    expected /= expected.sum(-1, keepdims=True)
    got = softmax(vm, logits, temperature)
    # an exponent of up to 87 rounded to f32 is off by 87 * 2^-23
    seen = expected > 1e-36
    np.testing.assert_allclose(got[seen], expected[seen], rtol=2e-5)
    np.testing.assert_allclose(got[~seen], 0, atol=1e-36)
    np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-6)


def test_softmax_at_low_temperature_is_argmax(vocab: tuple[int, Any]) -> None:
    v, vm = vocab
    logits = np.random.default_rng(0).normal(size=(4, v)).astype("float32")
    logits[:, v // 2] = logits.max(-1) + 1e-4
    logits[3, [1, v - 1]] = logits[3, v // 2]  # three equal maxima share
    got = softmax(vm, logits, [1e-5, 1e-6, 0, 0])
    expected = np.zeros((4, v))
    expected[:, v // 2] = 1
    expected[3, [1, v // 2, v - 1]] = 1 / 3
    np.testing.assert_allclose(got, expected, atol=1e-7)
    assert np.isfinite(softmax(vm, logits, [1.1e-5] * 4)).all()


def test_softmax_of_extremes(small: Any) -> None:
    lowest, inf = np.finfo("float32").min, np.inf
    logits = np.array(
        [
            [3e38, 3e38, lowest, -inf, -3e38, 0, 1, 2],
            [lowest] * 8,  # everything masked by a bitmask: uniform
            [-inf] * 7 + [-1e30],
            [-inf] * 8,
        ],
        "float32",
    )
    got = softmax(small, logits, [1, 1, 0.5, 1])
    expected = np.zeros((4, 8))
    expected[0, :2] = 0.5
    expected[1] = 1 / 8
    expected[2, 7] = 1
    np.testing.assert_array_equal(got, expected)


def test_masked_tokens_get_exactly_zero(vocab: tuple[int, Any]) -> None:
    v, vm = vocab
    logits = np.random.default_rng(1).normal(size=(1, v)).astype("float32")
    logits[0, ::3] = np.finfo("float32").min
    got = softmax(vm, logits, [2.0])
    assert (got[0, ::3] == 0).all()
    assert (got[0, 1::3] > 0).all()


@pytest.mark.parametrize("b", [1, 5])
def test_argsort_is_stable_and_descending(vocab: tuple[int, Any], b: int) -> None:
    v, vm = vocab
    rng = np.random.default_rng(b)
    probs = random_probs(rng, b, v)
    probs[:, rng.integers(0, v, v // 4)] = 0  # many equal ones
    probs[0] = 1 / v
    values, indices = vm["argsort_probs"](tensor(probs))
    order = np.argsort(-probs, axis=-1, kind="stable")
    assert (values.dtype, indices.dtype) == ("float32", "int32")
    np.testing.assert_array_equal(indices.numpy(), order)
    np.testing.assert_array_equal(values.numpy(), np.take_along_axis(probs, order, -1))


def test_argsort_of_any_finite_numbers(small: Any) -> None:
    values = np.array([[-1.5, 3e38, -3e38, 1e-45, 0, -1e-45, 2, -1.25]], "float32")
    _, indices = small["argsort_probs"](tensor(values))
    assert indices.numpy()[0].tolist() == [1, 6, 3, 4, 5, 7, 0, 2]


@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 0.1])
def test_sample_inverts_the_cumulative_distribution(vocab: tuple[int, Any], top_p: float) -> None:
    v, vm = vocab
    rng = np.random.default_rng(int(top_p * 100))
    b, n = 3, 64
    probs = random_probs(rng, b, v)
    u = rng.random(n).astype("float32")
    u[:2] = 0, BELOW_1
    rows = rng.integers(0, b, n)
    tokens = sample(vm, probs, u, [top_p, 0.7, top_p], rows)
    for token, uniform, row in zip(tokens, u, rows, strict=True):
        order = np.argsort(-probs[row], kind="stable")
        ends = np.cumsum(probs[row][order].astype("float64"))
        limit = 0.7 if row == 1 else top_p
        last = min(int(np.searchsorted(ends, limit)), v - 1)
        at = int(np.flatnonzero(order == token)[0])
        # compensated f32 sums: a few roundings at 1 of slack at the borders
        goal = float(uniform) * ends[last]
        assert (ends[at - 1] if at else 0) - SLACK <= goal <= ends[at] + SLACK
        assert at <= last or ends[at - 1] - SLACK < limit


def test_sample_where_sums_are_exact(small: Any) -> None:
    probs = [[0.0625, 0, 0.5, 0.125, 0.25, 0, 0.0625, 0]]  # descending: tokens 2 4 3 0 6
    u = [0, 0.25, 0.5, 0.625, 0.75, 0.875, 0.9375, BELOW_1]
    assert sample(small, probs, u, [1.0]) == [2, 2, 4, 4, 3, 0, 6, 6]
    # the nucleus of 0.75 is {2: 2/3, 4: 1/3}; 0.76 takes one token more
    assert sample(small, probs, [0, 0.66, 0.67, BELOW_1], [0.75]) == [2, 2, 4, 4]
    assert sample(small, probs, [0, 0.57, 0.58, 0.86, BELOW_1], [0.76]) == [2, 2, 4, 3, 3]


@pytest.mark.parametrize("top_p", [1e-5, 0.5, 0.0, -1.0])
def test_sample_with_small_top_p_is_argmax(small: Any, top_p: float) -> None:
    probs = [[0.0625, 0, 0.5, 0.125, 0.25, 0, 0.0625, 0]]
    assert sample(small, probs, [0, 0.5, BELOW_1], [top_p]) == [2, 2, 2]


def test_sample_reaches_a_long_tail() -> None:
    """100,000 tokens of 2^-26 each, which a plain f32 sum from 0.998 on would not count."""
    v = 100_001
    probs = np.full((1, v), 2.0**-26)
    probs[0, 0] = 1 - (v - 1) * 2.0**-26
    vm = rx.VirtualMachine(build(v), tvm.cpu())
    u = np.linspace(0.9986, 0.9999, 14)
    tokens = sample(vm, probs, u, [1.0])
    np.testing.assert_allclose((np.array(tokens) - 1) * 2.0**-26 + probs[0, 0], u, atol=SLACK)


def test_sample_never_leaves_the_support(vocab: tuple[int, Any]) -> None:
    v, vm = vocab
    rng = np.random.default_rng(3)
    probs = random_probs(rng, 2, v)
    probs[:, rng.permutation(v)[: v // 2]] = 0
    probs /= probs.sum(-1, keepdims=True) * 1.001  # sums below 1: top_p is out of reach
    u = [0, BELOW_1, 1.0, 0.999999] * 2
    rows = [0] * 4 + [1] * 4
    for token, row in zip(sample(vm, probs, u, [1.0, 0.9999], rows), rows, strict=True):
        assert 0 <= token < v
        assert probs[row, token] > 0
    uniform = np.full((1, v), 1 / v)
    assert sample(vm, uniform, [0, BELOW_1], [1.0]) == [0, v - 1]


def test_width_is_checked(small: Any) -> None:
    with pytest.raises(RuntimeError, match=r"9 vs\. 8.*softmax_with_temperature"):
        softmax(small, np.zeros((1, 9), "float32"), [1.0])


def test_library_needs_only_the_runtime(tmp_path: Path) -> None:
    path = tmp_path / "lib.so"
    build(361).export_library(str(path))
    script = f"""
import numpy as np, tvm
from tvm.runtime.vm import VirtualMachine
vm = VirtualMachine(tvm.runtime.load_module({str(path)!r}), tvm.cpu())
f32 = lambda *shape: tvm.runtime.tensor(np.full(shape, 0.5, "float32"))
zero = tvm.runtime.tensor(np.zeros(2, "int32"))
vm["softmax_with_temperature"](f32(2, 1, 361), f32(2))
ordered, indices = vm["argsort_probs"](f32(2, 361))
print(vm["sample_with_top_p"](ordered, indices, f32(2), zero, f32(2)).numpy())
maps = open("/proc/self/maps").read()
print([name for name in ("libtvm_compiler", "libtvm_runtime_extra") if name in maps])
"""
    env = {**os.environ, "TVM_USE_RUNTIME_LIB": "1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["[0 0]", "[]"], done.stderr
