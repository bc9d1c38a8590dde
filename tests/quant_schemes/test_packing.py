"""Codes, words and weights against a packer written here from the contract's text alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qcc.compiler.weights import kernels
from qcc.quant_schemes import packing
from qcc.quant_schemes.format import WeightFormat
from qcc.quant_schemes.rounding import rtn
from qcc.quant_schemes.scheme import list_schemes, load_scheme

# CONTRACTS section 1: name -> (group, bits, scale and model dtype, layout of a linear weight).
CONTRACT = {
    "q3f16_0": (40, 3, "float16", "KN"),
    "q3f16_1": (40, 3, "float16", "NK"),
    "q4f16_0": (32, 4, "float16", "KN"),
    "q4f16_1": (32, 4, "float16", "NK"),
    "q4f16_2": (32, 4, "float16", "NK"),
    "q4f32_1": (32, 4, "float32", "NK"),
    "q4bf16_0": (32, 4, "bfloat16", "KN"),
    "q4bf16_1": (32, 4, "bfloat16", "NK"),
    "q8f16_1": (32, 8, "float16", "NK"),
}
KS = (172, 352, 64, 100, 40, 256)
NUMPY = {"float16": np.float16, "float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def linear_format(scheme: str) -> WeightFormat:
    return load_scheme(scheme).format_of("model.layers.0.mlp.down_proj.weight", role="linear")


def naive(w: Any, group: int, bits: int, dtype: str, layout: str) -> tuple[Any, Any]:
    """The contract's text, one number at a time; w float32[n, k]."""
    t = NUMPY[dtype]
    m = t(2 ** (bits - 1) - 1)
    per_word = 32 // bits
    n, k = w.shape
    groups = math.ceil(k / group)
    words = np.zeros((n, groups * group // per_word), np.uint32)
    scales = np.zeros((n, groups), t)
    for row in range(n):
        for g in range(groups):
            members = [t(x) for x in w[row, g * group : (g + 1) * group]]
            largest = max(abs(x) for x in members)
            scales[row, g] = s = t(largest / m)
            for i, x in enumerate(members):
                if s == 0:
                    continue
                u = t(t(x / s) + m)
                q = min(max(round(float(u)), 0), 2 * int(m))  # round() is half to even
                at = g * group + i
                words[row, at // per_word] |= np.uint32(q << (at % per_word * bits))
    return (words, scales) if layout == "NK" else (words.T, scales.T)


def weights(k: int, dtype: str, seed: int = 0) -> Any:
    """float32[7, k]: normal rows, a zero row and group, signed zeros, ties, tiny and large rows."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((7, k)).astype(np.float32)
    w[1] = 0
    w[2, : k // 2] = -0.0
    w[3] *= 1e-6  # f16 scales are subnormal here, some are 0
    w[4] *= 5000  # near the top of f16
    w[5] = rng.integers(-14, 15, k) / 2  # halves: ties of rounding
    w[6] = np.where(rng.random(k) < 0.02, w[6], -0.0)
    return w


@pytest.mark.parametrize("scheme", CONTRACT)
def test_the_scheme_files_say_what_the_contract_says(scheme: str) -> None:
    group, bits, dtype, layout = CONTRACT[scheme]
    fmt = linear_format(scheme)
    assert (fmt.group, fmt.bits, fmt.dtype, fmt.layout) == (group, bits, dtype, layout)


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("scheme", CONTRACT)
def test_parts_equal_the_contract_to_the_bit(scheme: str, k: int) -> None:
    fmt, w = linear_format(scheme), weights(k, CONTRACT[scheme][2])
    words, scales = naive(w, *CONTRACT[scheme])

    parts = packing.store(rtn.quantize(w, fmt), fmt)
    for part, wanted in zip(fmt.stored(*w.shape), (words, scales), strict=True):
        assert parts[part.suffix].shape == part.shape
        assert parts[part.suffix].dtype.name == part.dtype
        np.testing.assert_array_equal(parts[part.suffix], wanted)

    for source in NUMPY.values():  # the compiled twin, from every dtype of a checkpoint
        given = w.astype(source)
        expected = rtn.quantize(given, fmt)
        got_words, got_scales = kernels.quantize(given, fmt)
        rows = replace(fmt, layout="NK")
        np.testing.assert_array_equal(got_words, packing.pack(expected.codes, rows))
        np.testing.assert_array_equal(got_scales, expected.grid.scale)


@pytest.mark.parametrize("scheme", CONTRACT)
def test_unpack_is_the_inverse_of_pack(scheme: str) -> None:
    fmt = linear_format(scheme)
    rng = np.random.default_rng(1)
    for n, k in ((1, 1), (3, 172), (5, 320), (2, 33)):
        codes = rng.integers(0, 2**fmt.bits, (n, k), dtype=np.uint8)
        words = packing.pack(codes, fmt)
        assert words.shape == fmt.stored(n, k)[0].shape
        assert words.flags.c_contiguous
        np.testing.assert_array_equal(packing.unpack(words, fmt, n, k), codes)


def test_padding_is_zero() -> None:
    fmt = linear_format("q3f16_1")
    words = packing.pack(np.full((1, 41), 7, np.uint8), fmt)[0]
    assert [int(word) for word in words] == [2**30 - 1] * 4 + [7, 0, 0, 0]


@pytest.mark.parametrize("scheme", CONTRACT)
def test_error_is_half_a_step(scheme: str) -> None:
    fmt = linear_format(scheme)
    w = np.random.default_rng(2).standard_normal((16, 352)).astype(np.float32)
    weight = rtn.quantize(w, fmt)
    back = packing.dequantize(packing.store(weight, fmt), fmt, *w.shape)
    step = np.repeat(weight.grid.scale.astype(np.float32), fmt.group_size(352), axis=1)[
        :, : w.shape[1]
    ]
    # The steps of the formula round too: the cast of w, the scale, w / s and the sum with M.
    eps = float(ml_dtypes.finfo(NUMPY[fmt.dtype]).eps)
    slack = step * (fmt.top_code) * eps * 2
    assert (np.abs(w - back) <= step / 2 + slack).all()


@pytest.mark.parametrize("scheme", CONTRACT)
def test_dequantize_is_the_formula(scheme: str) -> None:
    fmt = linear_format(scheme)
    w = weights(172, fmt.dtype)
    weight = rtn.quantize(w, fmt)
    parts = packing.store(weight, fmt)
    for dtype in ("float32", fmt.dtype):
        t = NUMPY[dtype]
        got = packing.dequantize(parts, fmt, *w.shape, dtype)
        assert got.dtype == t
        for row, col in ((0, 0), (0, 171), (3, 50), (4, 100), (5, 3), (1, 9)):
            difference = t(int(weight.codes[row, col]) - (2 ** (fmt.bits - 1) - 1))
            scale = weight.grid.scale[row, col // fmt.group_size(172)]
            assert got[row, col] == difference * t(scale)


def test_every_f16_scale_of_the_kernel_is_numpys() -> None:
    """All magnitudes of f16 as the largest of a group: f32 arithmetic rounds to the same scale."""
    magnitudes = np.arange(0x7C00, dtype=np.uint16).view(np.float16)
    w = np.zeros((len(magnitudes), 32), np.float16)
    w[:, 5], w[:, 9] = magnitudes, -magnitudes / np.float16(3)
    for scheme in ("q4f16_1", "q8f16_1"):
        fmt = linear_format(scheme)
        expected = rtn.quantize(w, fmt)
        got_words, got_scales = kernels.quantize(w, fmt)
        scales = expected.grid.scale
        np.testing.assert_array_equal(got_scales.view(np.uint16), scales.view(np.uint16))
        np.testing.assert_array_equal(got_words, packing.pack(expected.codes, fmt))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_no_number_of_the_kernel_is_rounded_twice(dtype: str) -> None:
    """Random numbers of every exponent, a million a dtype, against numpy's step by step."""
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 2**32, 1 << 20, dtype=np.uint32)
    numbers = bits.view(np.float32)
    numbers = numbers[np.abs(numbers) < (6e4 if dtype == "float16" else 3e38)]
    small = np.abs(numbers) < 1e-12
    numbers[small] *= np.float32(1e12)  # few exponents of f32 are numbers of f16
    w = numbers[: len(numbers) // 64 * 64].reshape(-1, 64)
    scheme = "q4f16_1" if dtype == "float16" else "q4bf16_1"
    fmt = linear_format(scheme)
    expected = rtn.quantize(w, fmt)
    got_words, got_scales = kernels.quantize(w, fmt)
    scales = expected.grid.scale
    np.testing.assert_array_equal(got_scales.view(np.uint16), scales.view(np.uint16))
    np.testing.assert_array_equal(got_words, packing.pack(expected.codes, fmt))
    np.testing.assert_array_equal(
        kernels.cast(w.reshape(-1), dtype).view(np.uint16),
        w.reshape(-1).astype(NUMPY[dtype]).view(np.uint16),
    )


@pytest.mark.parametrize("source", NUMPY)
@pytest.mark.parametrize("dtype", NUMPY)
def test_casts_equal_numpys(source: str, dtype: str) -> None:
    """All 65536 numbers of 16 bits, or random ones of 32; infinities and NaN stay what they are."""
    if source == "float32":
        bits = np.random.default_rng(4).integers(0, 2**32, 100_003, dtype=np.uint32)
        numbers = bits.view(np.float32)
        numbers[:4] = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7F800000], np.uint32).view(
            np.float32
        )
    else:
        numbers = np.arange(65536, dtype=np.uint32).astype(np.uint16).view(NUMPY[source])
    got = kernels.cast(numbers, dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = numbers.astype(NUMPY[dtype])
    nan = np.isnan(wanted.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), nan)
    np.testing.assert_array_equal(got[~nan].astype(np.float32), wanted[~nan].astype(np.float32))


@pytest.mark.parametrize("group", [8, 24, 136, 1000])
def test_the_compiled_twin_takes_any_group(group: int) -> None:
    w = weights(172, "float16")
    for bits in (4, 8):
        fmt = WeightFormat(bits, "float16", group)
        expected = rtn.quantize(w, fmt)
        words, scales = kernels.quantize(w, fmt)
        np.testing.assert_array_equal(words, packing.pack(expected.codes, fmt))
        np.testing.assert_array_equal(scales, expected.grid.scale)


def test_the_compiled_twin_says_what_it_takes() -> None:
    taken, other = linear_format("q4f16_1"), linear_format("q3f16_1")
    assert kernels.takes(taken) and kernels.takes(other)
    for change in ({"group": "row"}, {"bits": 5}, {"grid": "asymmetric"}, {"zero": 8}):
        assert not kernels.takes(replace(taken, **change)), change
    assert not kernels.takes(replace(other, group=32))


def test_every_scheme_has_a_test() -> None:
    floating = {"q0f16", "q0bf16", "q0f32"}
    ours = {"q8f32_1"}  # the family beyond the contract's names
    assert set(list_schemes()) >= set(CONTRACT) | floating | ours
