"""GPU kernels of sampling and of logits on software adapters, against numpy."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from qcc.targets.gpu.kernels.softmax import softmax_rows, softmax_tiles
from qcc.targets.gpu.limits import Limits
from qcc.targets.gpu.passes.lower_rows import KERNELS, SOFTMAX

from ..wgsl import ADAPTERS, Compiled, garbage

LIMITS = Limits()
both = pytest.mark.parametrize("adapter", ADAPTERS)
LOWEST = np.finfo("float32").min
# A sum of up to 256 stretches, each of at most 16 + 64 roundings: their random walk, times 4.
SUM_ERROR = 4 * (256 + 80) ** 0.5 * 2.0**-25


@cache
def compiled(role: str, width: int) -> Compiled:
    """The kernel of a role, for rows of a width."""
    make = softmax_rows if role == SOFTMAX else KERNELS[role]
    return Compiled(make(role, width, LIMITS))


def argsort(probs: np.ndarray, adapter: str) -> tuple[np.ndarray, np.ndarray]:
    outputs = [garbage(probs.shape, dtype) for dtype in ("float32", "int32") * 2]
    kernel = compiled("argsort_probs", probs.shape[1])
    values, tokens = kernel([probs, *outputs], [1, 2], adapter)
    return values, tokens


def numbers(b: int, v: int) -> np.ndarray:
    """Probabilities with ties, zeros and denormals, and a few that are none."""
    rng = np.random.default_rng(v)
    x = rng.exponential(size=(b, v)).astype("float32") / v
    x[rng.random((b, v)) < 0.2] = 0
    x[rng.random((b, v)) < 0.1] = np.float32(1 / v)
    denormal = rng.random((b, v)) < 0.1
    x[denormal] = rng.integers(1, 9, denormal.sum()).astype("int32").view("float32")
    x[(rng.random((b, v)) < 0.05) & (x > 0)] *= -1  # no -0, which follows 0
    return x


@both
@pytest.mark.parametrize("b, v", [(1, 1), (3, 361), (1, 151936)])
def test_argsort_is_stable(adapter: str, b: int, v: int) -> None:
    x = numbers(b, v)
    values, tokens = argsort(x, adapter)
    expected = np.argsort(-x.astype("float64"), axis=1, kind="stable")
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_array_equal(
        values.view("int32"), np.take_along_axis(x, expected, 1).view("int32")
    )


@pytest.mark.parametrize("v", [2048, 2049, 4099, 32000])
def test_argsort_of_any_number_of_tiles(v: int) -> None:
    """On one adapter: every parity of passes, a last tile of one element, a run without a pair."""
    x = numbers(3, v)
    values, tokens = argsort(x, "lavapipe")
    expected = np.argsort(-x.astype("float64"), axis=1, kind="stable")
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(x, expected, 1))


@pytest.mark.parametrize("order", ["equal", "falling", "rising", "last"])
def test_argsort_of_ordered_rows(order: str) -> None:
    """All of one run before the other, and the largest at the end."""
    v = 4099
    x = np.zeros((1, v), "float32")
    if order == "last":
        x[0, -1] = 1
    elif order != "equal":
        x[0] = np.arange(v)[:: 1 if order == "rising" else -1]
    _, tokens = argsort(x, "lavapipe")
    np.testing.assert_array_equal(tokens, np.argsort(-x, axis=1, kind="stable"))


def softmax(logits: np.ndarray, temperature: Any, adapter: str = "lavapipe") -> np.ndarray:
    b, v = logits.shape
    parts = garbage((b, 2 * softmax_tiles(v, LIMITS)), "float32")
    args = [logits[:, None], np.float32(temperature), garbage((b, 1, v), "float32"), parts]
    (probs,) = compiled(SOFTMAX, v)(args, [2], adapter)
    return probs[:, 0]


@both
@pytest.mark.parametrize("b, v", [(1, 1), (3, 361), (1, 151936)])
def test_softmax(adapter: str, b: int, v: int) -> None:
    rng = np.random.default_rng(v)
    logits = (rng.normal(size=(b, v)) * 5).astype("float32")
    temperature = np.array([0.7, 1.9, 0.3][:b], "float32")
    x = logits.astype("float64") / temperature[:, None]
    expected = np.exp(x - x.max(-1, keepdims=True))
    expected /= expected.sum(-1, keepdims=True)
    got = softmax(logits, temperature, adapter)
    # an exponent of up to 87 rounded to f32 is off by 87 * 2^-23
    seen = expected > 1e-36
    np.testing.assert_allclose(got[seen], expected[seen], rtol=2e-5)
    np.testing.assert_allclose(got[~seen], 0, atol=1e-36)
    np.testing.assert_allclose(got.sum(-1, dtype="float64"), 1, rtol=1e-6)


@both
def test_softmax_of_extremes(adapter: str) -> None:
    """Cold: the largest alone, equal ones share; masked: exactly 0; no token at all: no NaN."""
    v = 2500
    logits = np.random.default_rng(0).normal(size=(6, v)).astype("float32")
    logits[0, [7, 2049]] = 9
    logits[1] = LOWEST
    logits[2, 1:] = LOWEST
    logits[3] = -np.inf
    logits[4, :2] = 3e38, -3e38
    logits[5, [3, 4]] = 9, 9 - 5e-5  # exp(-5) of it, if the temperature were taken as it is
    expected = np.zeros((6, v))
    expected[0, [7, 2049]] = 0.5
    expected[1] = 1 / v
    expected[[2, 4, 5], [0, 0, 3]] = 1
    got = softmax(logits, [0, 1, 2, 1, 0.5, 1e-5], adapter)
    np.testing.assert_allclose(got, expected, atol=1e-9)


def sample(
    probs: np.ndarray, u: Any, top_p: Any, rows: Any = None, adapter: str = "lavapipe"
) -> np.ndarray:
    """The tokens of sorted `probs`, which are numbered from 1000."""
    u = np.float32(u)
    tokens = np.tile(np.arange(1000, 1000 + probs.shape[1], dtype="int32"), (len(probs), 1))
    rows = np.int32(np.zeros(len(u)) if rows is None else rows)
    args = [np.float32(probs), tokens, u, rows, np.float32(top_p), garbage(u.shape, "int32")]
    (out,) = compiled("sample_with_top_p", probs.shape[1])(args, 1, adapter)
    return out - 1000


@both
@pytest.mark.parametrize("b, v", [(1, 1), (3, 361), (2, 4099), (1, 151936)])
def test_sampling(adapter: str, b: int, v: int) -> None:
    """Each token against the running sums in f64, within the rounding of a sum."""
    rng = np.random.default_rng(v)
    probs = -np.sort(-(rng.exponential(size=(b, v)) ** 6), axis=1)
    probs = (probs / probs.sum(1, keepdims=True)).astype("float32")
    u, rows = rng.random(40).astype("float32"), rng.integers(0, b, 40)
    top_p = np.array([0.9, 1, 0.5][:b], "float32")
    got = sample(probs, u, top_p, rows, adapter)
    running = np.cumsum(probs.astype("float64"), axis=1)
    for token, number, row in zip(got, u, rows, strict=True):
        limit = top_p[row] if top_p[row] < 1 else 2
        last = min(int(np.searchsorted(running[row], limit)), v - 1)
        goal = number * running[row, last]
        assert token <= last
        assert running[row, token] >= goal - SUM_ERROR
        assert token == 0 or running[row, token - 1] <= goal + SUM_ERROR


@both
def test_sampling_at_the_edges(adapter: str) -> None:
    """No token of probability 0, at least one token, the prefix that just reaches top_p."""
    below_1 = float(np.nextafter(np.float32(1), np.float32(0)))
    probs = np.zeros((5, 700))
    probs[0, :3] = 0.5, 0.25, 0.25
    probs[1, 0] = 1
    probs[3, :512] = 1 / 512
    probs[4, :3] = 0.5, 0.5, 2.0**-20  # rounded, the sum may pass 1 before the end
    u = [0, 0.49, 0.5, 0.75, below_1]
    assert sample(probs, u, [1] * 5, adapter=adapter).tolist() == [0, 0, 1, 2, 2]
    assert sample(probs, u, [0.75] * 5, adapter=adapter).tolist() == [0, 0, 0, 1, 1]
    assert sample(probs, u, [0] * 5, adapter=adapter).tolist() == [0] * 5
    assert sample(probs, u, [1] * 5, [1] * 5, adapter).tolist() == [0] * 5
    assert sample(probs, u, [1] * 5, [2] * 5, adapter).tolist() == [0] * 5
    assert sample(probs, u, [1] * 5, [3] * 5, adapter).tolist() == [0, 250, 256, 384, 511]
    assert sample(probs, u, [1] * 5, [4] * 5, adapter).tolist() == [0, 0, 1, 1, 2]
    assert sample(probs, u, [0.25] * 5, [3] * 5, adapter).tolist() == [0, 62, 64, 96, 127]


@both
def test_sampling_finds_every_element(adapter: str) -> None:
    """The first and last ones of what a thread adds up: sums of powers of 2 are exact."""
    count = 1 << 17
    probs = np.zeros((1, 151936))
    probs[0, :count] = 1 / count
    wanted = [0, 1, 2, 3, 592, 593, 594, 595, 596, 597, 1187, 1188, 70000, count - 1]
    u = (np.array(wanted) + 0.5) / count
    assert sample(probs, u, [1], adapter=adapter).tolist() == wanted


def changed(role: str, logits: np.ndarray, *args: Any, adapter: str) -> np.ndarray:
    (out,) = compiled(role, logits.shape[1])([logits, *args], [0], adapter)
    return out


def random_logits(b: int, v: int) -> np.ndarray:
    return np.random.default_rng(v).normal(size=(b, v)).astype("float32")


@both
@pytest.mark.parametrize("v", [361, 151936])
def test_logit_bias(adapter: str, v: int) -> None:
    """In order, a token that is listed again counts again: (1 + 1e8) - 1e8 is 0."""
    rng, logits = np.random.default_rng(0), random_logits(3, v)
    rows, tokens = rng.integers(0, 3, 50), rng.integers(0, v, 50)
    bias = rng.normal(size=50).astype("float32")
    rows[10:13], tokens[10:13], bias[10:13] = 1, 5, [1, 1e8, -1e8]
    logits[1, 5] = 0
    expected = logits.copy()
    for row, token, value in zip(rows, tokens, bias, strict=True):
        expected[row, token] += value
    args = [np.int32(rows), np.int32(tokens), bias]
    got = changed("apply_logit_bias_inplace", logits, *args, adapter=adapter)
    np.testing.assert_array_equal(got, expected)


@both
@pytest.mark.parametrize("v", [361, 32000])
def test_penalty(adapter: str, v: int) -> None:
    """Presence, frequency, repetition; one token twice."""
    rng, logits = np.random.default_rng(0), random_logits(4, v)
    seq_ids = np.array([3, 0], "int32")
    seqs = rng.integers(0, 2, 1500)
    tokens, counts = rng.integers(0, v, 1500), rng.integers(1, 9, 1500)
    penalties = np.array([[0.5, 0.25, 1.25], [0, 1, 1]], "float32")
    expected = logits.astype("float64")
    for seq, token, count in zip(seqs, tokens, counts, strict=True):
        presence, frequency, repetition = penalties[seq].astype("float64")
        value = expected[seq_ids[seq], token] - (presence + count * frequency)
        value = value * repetition if value < 0 else value / repetition
        expected[seq_ids[seq], token] = value
    args = [seq_ids, *(np.int32(each) for each in (seqs, tokens, counts)), penalties]
    got = changed("apply_penalty_inplace", logits, *args, adapter=adapter)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    assert (got[[1, 2]] == logits[[1, 2]]).all()


@both
@pytest.mark.parametrize("v", [361, 512, 151936])
def test_bitmask(adapter: str, v: int) -> None:
    """The lowest number, to the bit, where a bit is 0; other rows stay."""
    rng, logits = np.random.default_rng(0), random_logits(3, v)
    words = rng.integers(-(2**31), 2**31, (3, -(-v // 32))).astype("int32")
    bits = np.unpackbits(words.view("uint8"), axis=1, bitorder="little")[:, :v]
    expected = logits.copy()
    for row in (2, 0):
        expected[row][bits[row] == 0] = LOWEST
    args = [np.array([2, 0], "int32"), words]
    got = changed("apply_bitmask_inplace", logits, *args, adapter=adapter)
    np.testing.assert_array_equal(got, expected)
