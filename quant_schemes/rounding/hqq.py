"""hqq: half-quadratic quantization (Badri and Shaji, 2023), which heeds outliers less than mse.

It minimizes the sum of |w - w'|^p, p < 1, by turns: E = shrink(w - w'), then the scale and bias of
each group that fit w - E best for its codes, with a penalty that grows at each turn. As published
only the bias moves; here the scale does as well, by least squares, and the best turn is kept.
"""

from __future__ import annotations

import numpy as np

from qcc.quant_schemes.format import WeightFormat
from qcc.quant_schemes.packing import Array, Grid, Quantized, dequantize_codes
from qcc.quant_schemes.rounding import grid, mse
from qcc.quant_schemes.rounding.method import Inputs, Method

NORM = 0.7  # p
BETA, GROWTH = 10.0, 1.05  # the penalty and its growth a turn
TURNS = 20


def quantize(weights: Array, fmt: WeightFormat, _inputs: Inputs | None = None) -> Quantized:
    """Codes and grid of f32[n, k]."""
    if fmt.group == "tensor" or fmt.grid in ("zero_point", "mxfp4"):
        return mse.search(weights, fmt, None)
    rows = max(1, mse.CHUNK // weights.shape[1])
    return Quantized.concatenate(
        [_of_rows(weights[at : at + rows], fmt) for at in range(0, len(weights), rows)]
    )


def _of_rows(weights: Array, fmt: WeightFormat) -> Quantized:
    """The same for some rows, which fit the processor's cache."""
    found = mse.search(weights, fmt, None)
    w = grid.grouped(weights, fmt)
    span = np.maximum(np.abs(w).max(axis=2, keepdims=True), np.float32(1e-30))
    best, least = found, _norm(weights, found, fmt)
    beta = BETA
    for _ in range(TURNS):
        error = (w - grid.grouped(dequantize_codes(found, fmt), fmt)) / span
        outliers = _shrink(error, beta) * span
        found = grid.nearest(weights, _refit(w - outliers, found, fmt), fmt)
        size = _norm(weights, found, fmt)
        better = size < least
        codes = np.where(better[:, None], found.codes, best.codes)
        best = Quantized(codes, found.grid.rows(better, best.grid))
        least = np.where(better, size, least)
        beta *= GROWTH
    return best


def _shrink(x: Array, beta: float) -> Array:
    """The proximal operator of |x|^p, as HQQ approximates it."""
    size = np.abs(x) + np.float32(1e-8)
    shrunk = np.maximum(size - np.float32(1 / beta) * size ** np.float32(NORM - 1), 0)
    return (np.sign(x) * shrunk).astype(np.float32)


def _refit(w: Array, found: Quantized, fmt: WeightFormat) -> Grid:
    """Scale and bias of each group by least squares for its codes; w f32[n, groups, size]."""
    q = grid.grouped(found.codes.astype(np.float32), fmt)
    scale, _ = found.grid.numbers(fmt)
    if fmt.grid == "symmetric":
        q = q - np.float32(fmt.zero_code)
        norm = (q * q).sum(axis=2)
        return grid.stored(
            np.where(norm == 0, scale, (q * w).sum(axis=2) / np.where(norm == 0, 1, norm)),
            None,
            fmt,
        )
    centred = q - q.mean(axis=2, keepdims=True)
    norm = (centred * centred).sum(axis=2)
    step = np.where(norm == 0, scale, (centred * w).sum(axis=2) / np.where(norm == 0, 1, norm))
    return grid.stored(step, w.mean(axis=2) - step * q.mean(axis=2), fmt)


def _norm(weights: Array, found: Quantized, fmt: WeightFormat) -> Array:
    """sum |w - w'|^p of each row, f32[n]."""
    found_sum: Array = (np.abs(weights - dequantize_codes(found, fmt)) ** np.float32(NORM)).sum(1)
    return found_sum


METHOD = Method("half-quadratic quantization: heeds outliers less than mse", quantize)
