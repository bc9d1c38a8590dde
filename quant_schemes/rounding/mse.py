"""mse: for each group the scale (and bias) of least squared error, found by search.

For a row of steps around the group's range the codes are rounded and scale and bias refitted to
them by least squares; the best of all steps is kept, with the codes that are nearest on the grid as
stored. Two-level scales are rounded to their codes and then each group tries the neighbours of its
own. With weights h[k] the error is the sum of h (w - w')^2.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qcc.quant_schemes.format import WeightFormat
from qcc.quant_schemes.packing import Array, Grid, Quantized
from qcc.quant_schemes.rounding import grid, mxfp4
from qcc.quant_schemes.rounding.group_kernels import (
    AFFINE,
    LANES,
    ONE_SIGN,
    SYMMETRIC,
    ZERO_POINT,
)
from qcc.quant_schemes.rounding.groups import Groups
from qcc.quant_schemes.rounding.method import Inputs, Method

STEPS = 20  # steps tried around that which spans the whole range
SPREAD = {2: 0.7, 3: 0.5}  # how far below the range steps go, as a share; other bits: LEAST
LEAST = 0.3
CHUNK = 1 << 17  # numbers at a time: the arrays of a search stay in the processor's cache


def quantize(weights: Array, fmt: WeightFormat, _inputs: Inputs | None = None) -> Quantized:
    """Codes and grid of f32[n, k] with the least squared error that the search finds."""
    return search(weights, fmt, None)


def search(weights: Array, fmt: WeightFormat, importance: Array | None) -> Quantized:
    """Codes and grid of f32[n, k]; `importance` f32[k] weighs the columns' errors, None: evenly."""
    if fmt.grid == "mxfp4":
        return mxfp4.quantize(weights, fmt, True, _valued(importance, weights.shape[1]))
    return grid.nearest(weights, search_grid(weights, fmt, importance), fmt)


def search_grid(weights: Array, fmt: WeightFormat, importance: Array | None) -> Grid:
    """The grid of `search`."""
    n, k = weights.shape
    size, groups = fmt.group_size(k), fmt.num_groups(k)
    valued = _valued(importance, k)[None]
    h = np.pad(valued, ((0, 0), (0, groups * size - k))).reshape(1, groups, size)
    if fmt.group == "tensor":
        h = np.ascontiguousarray(np.broadcast_to(valued, (n, k)).reshape(1, 1, -1))
        return _grid(_groups(weights.reshape(1, 1, -1), h, fmt), fmt)
    rows = max(LANES, CHUNK // (groups * size) // LANES * LANES)
    return Grid.concatenate(
        [
            _grid(_groups(grid.grouped(weights[at : at + rows], fmt), h, fmt), fmt)
            for at in range(0, n, rows)
        ]
    )


def _valued(importance: Array | None, k: int) -> Array:
    """f32[k], all above 0: a column that no input reaches is stored within the others' error."""
    found = np.ones(k, np.float32) if importance is None else importance.astype(np.float32)
    valued: Array = np.maximum(found, 1e-3 * found.mean() + np.float32(1e-30))
    return valued


def _groups(w: Array, h: Array, fmt: WeightFormat) -> Groups:
    zero = fmt.zero_code if fmt.grid == "symmetric" else 0
    return Groups(w, h, zero, fmt.top_code)


def _grid(groups: Groups, fmt: WeightFormat) -> Grid:
    """The best grid that is found for some rows."""
    scale, bias = _fit(groups, fmt)
    found = _stored(scale, bias, fmt)
    if fmt.two_level:
        found = _neighbours(groups, found, fmt)
    return _or_range(groups, found, fmt)


def _stored(scale: Array, bias: Array | None, fmt: WeightFormat) -> Grid:
    rows_first = None if bias is None else np.ascontiguousarray(bias)
    return grid.stored(np.ascontiguousarray(scale), rows_first, fmt)


def _fit(groups: Groups, fmt: WeightFormat) -> tuple[Array, Array | None]:
    """Scales and biases f32[n, groups]; no biases of a symmetric grid."""
    if fmt.grid == "symmetric":
        steps = _symmetric_steps(fmt)
        fitted = groups.fit(SYMMETRIC, steps)[0] if groups.compiled else None
        return _fit_symmetric(groups, steps) if fitted is None else fitted, None
    if not groups.compiled:
        return _fit_affine(groups, fmt)
    kind = ONE_SIGN if fmt.two_level else ZERO_POINT if fmt.grid == "zero_point" else AFFINE
    return groups.fit(kind, _shares(fmt))


def _symmetric_steps(fmt: WeightFormat) -> Array:
    """Scales to begin with, over the largest magnitude."""
    zero, top = fmt.zero_code, fmt.top_code
    steps = _shares(fmt) / np.float32(max(zero, top - zero))
    # The side with one code more takes the larger extreme: the scale's sign says which.
    return steps if top - zero == zero else np.concatenate([-steps, steps])


def _fit_symmetric(groups: Groups, steps: Array) -> Array:
    """As Groups.fit, of few rows."""
    most = np.maximum(np.abs(groups.low), np.abs(groups.high))
    none = np.zeros_like(most)
    best, scale = np.full_like(most, np.inf), np.zeros_like(most)
    for step in steps:
        _, norm, product = groups.sums(step * most, none)
        s = product / np.where(norm == 0, 1, norm)
        _keep(best, groups.error(s, none), scale, s)
    return scale


def _fit_affine(groups: Groups, fmt: WeightFormat) -> tuple[Array, Array]:
    """As Groups.fit, of few rows."""
    low, high, total, hw = groups.low, groups.high, groups.total, groups.hw
    one_sign = fmt.two_level or fmt.grid == "zero_point"
    if one_sign:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    best = np.full_like(low, np.inf)
    scale, bias = np.zeros_like(low), np.zeros_like(low)
    middle = (low + high) / 2
    for share in _shares(fmt):
        s = (high - low) * (share / fmt.top_code)
        b = middle + (low - middle) * share
        for _ in range(2):
            sq, sqq, swq = groups.sums(s, b)
            norm = total * sqq - sq * sq
            flat = norm <= 1e-6 * total * sqq
            s = np.where(flat, s, (total * swq - sq * hw) / np.where(flat, 1, norm))
            b = (hw - s * sq) / total
            if one_sign:
                above = b > 0
                b = np.minimum(b, 0)
                s = np.where(above, swq / np.maximum(sqq, np.float32(1e-30)), s)
        if fmt.grid == "zero_point":
            z = np.rint(-b / np.where(s == 0, 1, s))
            b = -np.clip(z, 0, fmt.top_code) * s
        _keep(best, groups.error(s, b), scale, s, bias, b)
    return scale, bias


def _shares(fmt: WeightFormat) -> Array:
    """The steps tried, as shares of that which spans the range."""
    return np.linspace(1 - SPREAD.get(fmt.bits, LEAST), 1.05, STEPS, dtype=np.float32)


def _keep(best: Array, error: Array, *pairs: Any) -> None:
    """Where `error` is less than `best`, take it, and the second of each pair into the first."""
    less = error < best
    for kept, new in zip((best, *pairs[::2]), (error, *pairs[1::2]), strict=True):
        np.copyto(kept, new, where=less)


def _error(groups: Groups, found: Grid, fmt: WeightFormat) -> Array:
    """The error of each group on a grid as stored."""
    s, b = found.numbers(fmt)
    return groups.error(s, np.zeros_like(s) if fmt.grid == "symmetric" else b)


def _or_range(groups: Groups, found: Grid, fmt: WeightFormat) -> Grid:
    """`found`, or the grid of the range where that has the lower error, both as stored."""
    low, high = np.ascontiguousarray(groups.low), np.ascontiguousarray(groups.high)
    spanned = grid.of_range(low, high, fmt)
    with np.errstate(over="ignore", invalid="ignore"):  # of scales that f16 cannot hold
        errors = [_error(groups, each, fmt) for each in (found, spanned)]
    if fmt.two_level:  # groups share their block's scale
        return found.rows(~(errors[1].sum(axis=1) < errors[0].sum(axis=1)), spanned)
    better = errors[1] < errors[0]

    def pick(mine: Array | None, its: Array | None) -> Array | None:
        return None if mine is None or its is None else np.where(better, its, mine)

    return Grid(np.where(better, spanned.scale, found.scale), pick(found.bias, spanned.bias),
                pick(found.zero, spanned.zero))  # fmt: skip


def _neighbours(groups: Groups, found: Grid, fmt: WeightFormat) -> Grid:
    """Each group's scale and bias codes, moved by one where that lowers the error as stored."""
    assert fmt.scale_bits is not None
    top = 2**fmt.scale_bits - 1
    best = np.full(found.scale.shape, np.inf, np.float32)
    scale = found.scale.copy()
    bias = None if found.bias is None else found.bias.copy()
    for up in (0, -1, 1):
        c = np.clip(found.scale.astype(np.int16) + up, 0, top).astype(np.uint8)
        for move in (0, -1, 1) if found.bias is not None else (0,):
            d = None
            if found.bias is not None:
                d = np.clip(found.bias.astype(np.int16) + move, 0, top).astype(np.uint8)
            moved = Grid(c, d, None, found.block_scale, found.block_bias)
            pairs = (scale, c) if bias is None else (scale, c, bias, d)
            _keep(best, _error(groups, moved, fmt), *pairs)
    return Grid(scale, bias, None, found.block_scale, found.block_bias)


METHOD = Method("scale and bias of each group searched for the least squared error", quantize)
