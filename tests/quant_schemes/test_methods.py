"""rtn, mse, hqq and imse: errors measured in f64, and weights on which a search could stumble."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcc.quant_schemes import packing
from qcc.quant_schemes.errors import SchemeError
from qcc.quant_schemes.format import WeightFormat, mxfp4
from qcc.quant_schemes.format_text import format_of_text, text_of
from qcc.quant_schemes.rounding.method import Inputs, find_method, list_methods

GRIDS: list[dict[str, Any]] = [
    {},
    {"zero": 0},
    {"zero": 1},
    {"grid": "asymmetric"},
    {"grid": "zero_point"},
    {"layout": "KN", "grid": "asymmetric", "dtype": "bfloat16"},
]


def formats() -> list[WeightFormat]:
    """All bits on all grids, groups of 16 to 256 and whole, two-level scales of all bits."""
    found = []
    groups = (16, 32, 40, 64, 128, 256, "row", "tensor")
    for i, bits in enumerate((2, 3, 4, 5, 6, 8)):
        for j, grid in enumerate(GRIDS):
            fields = {"dtype": "float16", **grid}
            found.append(WeightFormat(bits=bits, group=groups[(i + 2 * j) % 8], **fields))
        found.append(WeightFormat(bits, "float16", 32, zero=1 << (bits - 1)))
        found.append(WeightFormat(bits, "float32", groups[-1 - i % 2]))
    for bits, group, scale_bits, grid in (
        (2, 16, 4, "asymmetric"),
        (3, 32, 5, "symmetric"),
        (4, 32, 6, "asymmetric"),
        (6, 16, 8, "symmetric"),
        (5, 256, 6, "asymmetric"),
    ):
        found.append(WeightFormat(bits, "float16", group, "NK", grid, None, scale_bits))
    found.append(WeightFormat(2, "float32", 16, "KN", "asymmetric", None, 4))
    found.append(mxfp4("float16"))
    return found


FORMATS = formats()


def name_of(fmt: WeightFormat) -> str:
    zero = "" if fmt.zero is None else f"-zero{fmt.zero}"
    return f"{text_of(fmt)}{zero}-{fmt.dtype}-{fmt.layout}"


def normal(n: int, k: int, seed: int = 0) -> Any:
    """f32[n, k]: heavy tails, rows of different size."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_t(4, (n, k)) * np.exp(rng.standard_normal((n, 1)))
    return (0.05 * rows).astype(np.float32)


def inputs_of(k: int, seed: int = 0, tokens: int = 400, cross: bool = False) -> Inputs:
    """Correlated inputs, a few of them large."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((k, k)) / k**0.5 + np.eye(k)
    x = rng.standard_normal((tokens, k)) @ mix * np.exp(rng.standard_normal(k))
    y = x + 0.1 * rng.standard_normal((tokens, k)) if cross else None
    return Inputs(
        tokens,
        (x * x).mean(0).astype(np.float32),
        np.abs(x).mean(0).astype(np.float32),
        (x.T @ x / tokens).astype(np.float32),
        None if y is None else (x.T @ y / tokens).astype(np.float32),
    )


def made(method: str, w: Any, fmt: WeightFormat, inputs: Inputs | None = None) -> Any:
    """f64 weights of codes that a method chose, after a trip through the stored parts."""
    found = find_method(method).quantize(w, fmt, inputs)
    assert found.codes.shape == w.shape and found.codes.dtype == np.uint8
    assert found.codes.max(initial=0) <= fmt.top_code
    parts = packing.store(found, fmt)
    for part in fmt.stored(*w.shape):
        assert (
            parts[part.suffix].shape == part.shape and str(parts[part.suffix].dtype) == part.dtype
        )
    assert list(parts) == [part.suffix for part in fmt.stored(*w.shape)]
    read = packing.dequantize(parts, fmt, *w.shape)
    np.testing.assert_array_equal(read, packing.dequantize_codes(found, fmt))
    assert np.isfinite(read).all()
    return read.astype(np.float64)


def squared(w: Any, read: Any, weight: Any = 1.0) -> float:
    """Squared error, each column weighed."""
    return float((weight * (w.astype(np.float64) - read) ** 2).sum())


@pytest.mark.parametrize("fmt", FORMATS, ids=name_of)
def test_a_search_is_no_worse_than_the_range(fmt: WeightFormat) -> None:
    """mse against rtn; imse against mse, by its own measure; hqq by |w - w'|^0.7 a row."""
    for n, k in ((6, 172), (3, 300)):
        w = normal(n, k)
        inputs = inputs_of(k)
        near, searched = made("rtn", w, fmt), made("mse", w, fmt)
        assert squared(w, searched) <= squared(w, near) * (1 + 1e-6)
        weighed = made("imse", w, fmt, inputs)
        square = inputs.square.astype(np.float64)
        # Of one group for all the search finds a minimum near the least.
        close = 1.05 if fmt.group == "tensor" else 1 + 1e-6
        assert squared(w, weighed, square) <= squared(w, searched, square) * close
        robust = made("hqq", w, fmt)
        norms = [(np.abs(w - read) ** 0.7).sum(1) for read in (robust, searched)]
        assert (norms[0] <= norms[1] * (1 + 1e-5)).all()


def test_what_searching_gains() -> None:
    """At few bits a search gains much: a bound that a search which returns the range misses."""
    w, inputs = normal(32, 512), inputs_of(512)
    for text, least in (("4/32a", 0.1), ("3/32a", 0.18), ("2/16k", 0.3)):
        fmt = format_of_text(text, "float16", "", lambda _: None)
        gain = 1 - squared(w, made("mse", w, fmt)) / squared(w, made("rtn", w, fmt))
        assert gain > least, (text, gain)
        weighed = [
            squared(w, made(name, w, fmt, inputs), inputs.square) for name in ("mse", "imse")
        ]
        assert weighed[1] < 0.9 * weighed[0], (text, weighed)


def hard(k: int) -> dict[str, Any]:
    """Weights f32[5, k] on which scales are 0, enormous, or of no use."""
    base = normal(5, k, seed=1)
    zeros = np.zeros((5, k), np.float32)
    constant = np.full((5, k), 0.37, np.float32)
    constant[1] *= -1
    constant[2, : k // 2] = 0
    outlier = base.copy()
    outlier[0, 0], outlier[1, k - 1] = 3000.0, -3000.0
    tiny = base.copy()
    tiny[0] *= 1e-38  # subnormal in f32
    tiny[1] *= 1e-7  # scales subnormal in f16
    tiny[2] = -(2.0**-24)
    one_sided = np.abs(base) + 1
    one_sided[0] *= -1
    return {
        "zeros": zeros,
        "constant": constant,
        "outlier": outlier,
        "tiny": tiny,
        "one sided": one_sided,
    }


@pytest.mark.parametrize("method", ["rtn", "mse", "imse", "hqq"])
@pytest.mark.parametrize("k", [1, 37])
def test_hard_weights(method: str, k: int) -> None:
    """Finite for every format, exact where the weights are zeros, not far off elsewhere."""
    inputs = inputs_of(k) if find_method(method).needs_text else None
    for fmt in FORMATS[::2] if method == "hqq" else FORMATS:
        for what, w in hard(k).items():
            with np.errstate(all="raise", under="ignore"):
                read = made(method, w, fmt, inputs)
            if what == "zeros":
                assert not read.any(), fmt
            if fmt.grid == "symmetric" and fmt.zero in (0, 1):
                continue  # one sign has next to no codes
            # A group's scale may be 0 where it is tiny beside its block's: then its error is |w|.
            assert np.abs(read - w).max() <= 1.3 * np.abs(w).max() + 1e-7, (fmt, what)


@pytest.mark.parametrize("method", ["mse", "hqq", "imse"])
def test_columns_that_no_input_reaches(method: str) -> None:
    """Dead columns and inputs that are all 0 weigh nothing; weights remain near all the same."""
    w = normal(4, 64)
    inputs = inputs_of(64)
    dead = np.zeros(64, np.float32)
    for square in (np.where(np.arange(64) < 10, 0, inputs.square).astype("f4"), dead):
        given = Inputs(1, square, square, np.diag(square))
        fmt = WeightFormat(4, "float16", 32, grid="asymmetric")
        read = made(method, w, fmt, given)
        assert squared(w, read) < 0.1 * squared(w, 0 * w)


@pytest.mark.parametrize("method", list_methods())
def test_scales_that_f16_cannot_hold(method: str) -> None:
    """The converter refuses what is not finite; a method may not make numbers of it."""
    w = normal(3, 32)
    w[1] = 1e9
    fmt = WeightFormat(4, "float16", 32)
    inputs = inputs_of(32) if find_method(method).needs_text else None
    if method == "gptq":
        pytest.importorskip("torch")
    with np.errstate(over="ignore", invalid="ignore"):
        found = find_method(method).quantize(w, fmt, inputs)
        read = packing.dequantize_codes(found, fmt)
    assert not np.isfinite(read[1]).all()
    assert np.isfinite(read[[0, 2]]).all()


def test_methods_by_name() -> None:
    assert list_methods() == ["awq", "gptq", "hqq", "imse", "mse", "rtn"]
    with pytest.raises(SchemeError) as caught:
        find_method("gtpq")
    assert str(caught.value) == (
        "--method: unknown method 'gtpq' (did you mean 'gptq'?); "
        "allowed: awq, gptq, hqq, imse, mse, rtn"
    )
    for name in ("grid", "method", "", "../mse"):
        with pytest.raises(SchemeError, match="unknown method"):
            find_method(name)


def test_mxfp4_is_the_standards() -> None:
    """rtn: floor(log2(max)) - 2, the nearest number, ties to the even code, cut at 6."""
    w = np.zeros((2, 64), np.float32)
    w[0, :8] = (7.9, 6.5, 0.25, -0.75, 1.25, -2.5, 5.0, 0.26)  # exponent 2: the unit is 1
    w[0, 32:34] = (3.0e-39, 1e-41)  # below all exponents
    w[1, :3] = (-0.75, 0.0625, 0.046875)  # exponent -1: 1/8
    found = find_method("rtn").quantize(w, mxfp4("float32"), None)
    assert found.grid.scale[:, 0].tolist() == [127, 124] and found.grid.scale[0, 1] == 0
    read = packing.dequantize_codes(found, mxfp4("float32"))
    assert read[0, :8].tolist() == [6, 6, 0, -1, 1, -2, 4, 0.5] and not read[0, 8:].any()
    assert read[1, :3].tolist() == [-0.75, 0.0625, 0.0625] and not read[1, 3:].any()
    sizes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    rows = normal(5, 96)
    found = find_method("rtn").quantize(rows, mxfp4("float32"), None)
    unit = 2.0 ** (found.grid.scale.astype(float) - 127).repeat(32, axis=1)
    distance = np.abs(np.abs(rows / unit)[..., None] - sizes)
    np.testing.assert_array_equal(found.codes % 8, distance.argmin(axis=2))
    np.testing.assert_array_equal(found.codes > 7, rows < 0)


def test_mxfp4_keeps_columns_that_no_input_reaches() -> None:
    """A group of them is stored as if all counted; of one among others the range is not cut."""
    w = normal(20, 96)
    dead = np.ones(96, np.float32)
    dead[32:64] = 0
    inputs = Inputs(400, dead, dead, np.eye(96, dtype=np.float32))
    even, weighed = (made(name, w, mxfp4("float32"), inputs) for name in ("mse", "imse"))
    np.testing.assert_array_equal(weighed, even)
