"""The inner loop of the search: compiled and numpy's, against the formula in f64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcc.quant_schemes.format import WeightFormat
from qcc.quant_schemes.format_text import format_of_text
from qcc.quant_schemes.packing import Quantized, dequantize_codes
from qcc.quant_schemes.rounding import mse
from qcc.quant_schemes.rounding.group_kernels import LANES
from qcc.quant_schemes.rounding.groups import Groups


def exact(w: Any, h: Any, s: Any, b: Any, zero: int, top: int) -> tuple[Any, ...]:
    """(sums of h Q, h Q^2, h Q w, and the error), f64[n, groups], of codes as f32 rounds them."""
    inverse = (1 / np.where(s == 0, 1, s)).astype(np.float32)
    offset = (np.float32(zero) - b * inverse).astype(np.float32)
    q = np.clip(np.rint(w * inverse[..., None] + offset[..., None]), 0, top) - zero
    w, h, q, s, b = (x.astype(np.float64) for x in (w, h, q, s, b))
    e = q * s[..., None] + b[..., None] - w
    return tuple((h * x).sum(axis=2) for x in (q, q * q, q * w, e * e))


@pytest.mark.parametrize(("zero", "top"), [(0, 15), (7, 14), (4, 7), (0, 255)])
@pytest.mark.parametrize("n", [3, LANES, 2 * LANES + 5])
def test_sums_and_errors(n: int, zero: int, top: int) -> None:
    """Rows that fill no vector; scales of both signs, and of 0; importances."""
    rng = np.random.default_rng(n)
    w = rng.standard_normal((n, 5, 24)).astype(np.float32)
    h = rng.uniform(0, 2, (1, 5, 24)).astype(np.float32)
    s = (rng.choice([-1, 1], (n, 5)) * rng.uniform(0.5, 4, (n, 5)) / top).astype(np.float32)
    s[0, 1] = 0
    b = np.zeros_like(s) if zero else rng.uniform(-2, 0, (n, 5)).astype(np.float32)
    ratio = (w - b[..., None]) / np.where(s == 0, 1, s)[..., None]
    tied = np.abs(ratio % 1 - 0.5) < 1e-3  # whose codes the order of operations decides
    w = np.where(tied, w + s[..., None] * np.float32(0.01), w)
    groups = Groups(w, h, zero, top)
    assert groups.compiled == (n >= LANES)
    found = [*groups.sums(s, b), groups.error(s, b)]
    for got, expected in zip(found, exact(w, h, s, b, zero, top), strict=True):
        assert got.shape == (n, 5)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-6 * scale)
    np.testing.assert_array_equal(groups.low, w.min(axis=2))
    np.testing.assert_array_equal(groups.high, w.max(axis=2))
    np.testing.assert_allclose(groups.hw, (h * w).sum(axis=2), rtol=1e-5, atol=1e-5)


def test_no_scale_at_all() -> None:
    """Scales that overflow f16 are infinite: the error is no number, and nothing stops."""
    groups = Groups(np.ones((LANES, 1, 8), np.float32), np.ones((1, 1, 8), np.float32), 0, 15)
    s = np.full((LANES, 1), np.inf, np.float32)
    assert not np.isfinite(groups.error(s, np.zeros_like(s))).any()


@pytest.mark.parametrize(
    "text", ["4/32", "3/24", "4/32s", "4/32a", "3/rowa", "4/32k", "2/16k", "z"]
)
def test_the_compiled_search_is_numpys(text: str) -> None:
    """The same grid for many rows at once as for few at a time, but for ties."""
    fmt = WeightFormat(4, "float16", 32, grid="zero_point")
    if text != "z":
        fmt = format_of_text(text, "float16", "test", lambda name: None)
    rng = np.random.default_rng(7)
    w = (rng.standard_t(5, (40, 100)) * 0.03).astype(np.float32)
    w[3] = 0
    importance = rng.uniform(0.1, 3, 100).astype(np.float32)
    compiled = mse.search(w, fmt, importance)
    few = [mse.search(w[at : at + 8], fmt, importance) for at in range(0, 40, 8)]
    plain = Quantized.concatenate(few)
    assert np.mean(compiled.codes != plain.codes) < 2e-3
    errors = [
        float((importance * (dequantize_codes(each, fmt) - w).astype(np.float64) ** 2).sum())
        for each in (compiled, plain)
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)
