"""Codes of the grid mxfp4, whose scales are powers of two."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from qcc.quant_schemes.format import WeightFormat
from qcc.quant_schemes.mxfp4 import EXPONENT_BIAS, LARGEST_EXPONENT, numbers, powers
from qcc.quant_schemes.packing import Array, Grid, Quantized

TOP = 2  # exponent of the largest number, 6
NEAR = (0, -1, 1)  # beside the standard's exponent; of equal errors the first is taken
ROWS = 1 << 20  # numbers of the rows that are searched at a time


def quantize(
    weights: Array, fmt: WeightFormat, searched: bool, importance: Array | None = None
) -> Quantized:
    """Codes and exponents of f32[n, k].

    Args:
        weights: finite.
        fmt: of the grid mxfp4.
        searched: the exponent near the standard's with the least squared error; else the
            standard's own, floor(log2(max|w|)) - 2, under which a number may exceed 6 and be cut.
        importance: f32[k] weighs the columns' errors in the search; None: evenly.
    """
    assert fmt.grid == "mxfp4", fmt
    step = max(1, ROWS // weights.shape[1])
    offsets = NEAR if searched else (0,)
    weighed = np.ones(weights.shape[1], np.float32) if importance is None else importance
    parts = [
        _of_rows(weights[at : at + step], fmt, offsets, weighed)
        for at in range(0, len(weights), step)
    ]
    return Quantized.concatenate(parts)


def _of_rows(
    weights: Array, fmt: WeightFormat, offsets: tuple[int, ...], weighed: Array
) -> Quantized:
    n, k = weights.shape
    groups, size = fmt.num_groups(k), fmt.group_size(k)
    padded = np.zeros((n, groups * size), np.float32)
    padded[:, :k] = weights
    w = padded.reshape(n, groups, size)
    h = np.pad(weighed.astype(np.float32), (0, groups * size - k)).reshape(groups, size)
    _, exponent = np.frexp(np.abs(w).max(axis=2))  # max = m * 2^exponent, m from 0.5 to 1
    codes, scale, least = np.zeros(w.shape, np.uint8), np.zeros((n, groups), np.uint8), None
    for offset in offsets:
        c = np.clip(exponent - 1 - TOP + offset + EXPONENT_BIAS, 0, LARGEST_EXPONENT)
        c = c.astype(np.uint8)
        unit = powers(c)[..., None]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(unit == 0, 0, w / unit)
        q = ratio.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)  # nearest, ties to even, cut at 6
        error = (h * np.square(w - numbers(q) * unit)).sum(axis=2)
        better = np.full(error.shape, True) if least is None else error < least
        codes = np.where(better[..., None], q, codes)
        scale = np.where(better, c, scale)
        least = error if least is None else np.minimum(error, least)
    return Quantized(np.ascontiguousarray(codes.reshape(n, -1)[:, :k]), Grid(scale))
