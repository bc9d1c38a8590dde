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
from qcc.quant_schemes.rounding.method import Inputs, Method

STEPS = 20  # steps tried around that which spans the whole range
SPREAD = {2: 0.7, 3: 0.5}  # how far below the range steps go, as a share; other bits: LEAST
LEAST = 0.3
TINY = np.finfo(np.float32).tiny  # the reciprocal of less overflows
CHUNK = 1 << 16  # numbers at a time: the arrays of a search stay in the processor's cache


def quantize(weights: Array, fmt: WeightFormat, _inputs: Inputs | None = None) -> Quantized:
    """Codes and grid of f32[n, k] with the least squared error that the search finds."""
    return search(weights, fmt, None)


def search(weights: Array, fmt: WeightFormat, importance: Array | None) -> Quantized:
    """Codes and grid of f32[n, k]; `importance` f32[k] weighs the columns' errors, None: evenly."""
    if fmt.grid == "mxfp4":
        return mxfp4.quantize(weights, fmt, True, importance)
    return grid.nearest(weights, search_grid(weights, fmt, importance), fmt)


def search_grid(weights: Array, fmt: WeightFormat, importance: Array | None) -> Grid:
    """The grid of `search`."""
    n, k = weights.shape
    size, groups = fmt.group_size(k), fmt.num_groups(k)
    valued = np.ones((1, k), np.float32) if importance is None else importance[None].astype("f4")
    # A column that no input reaches still has to be stored within the others' error.
    valued = np.maximum(valued, 1e-3 * valued.mean() + np.float32(1e-30))
    h = np.pad(valued, ((0, 0), (0, groups * size - k))).reshape(1, groups, size)
    if fmt.group == "tensor":
        w, h = weights.reshape(1, 1, -1), np.broadcast_to(valued, (n, k)).reshape(1, 1, -1)
        h = np.ascontiguousarray(h)
        return _or_range(w, h, grid.stored(*_fit(w, h, fmt), fmt), fmt)
    made = []
    rows = max(1, CHUNK // (groups * size))
    for at in range(0, n, rows):
        w = grid.grouped(weights[at : at + rows], fmt)
        scale, bias = _fit(w, h, fmt)
        found = grid.stored(scale, bias, fmt)
        if fmt.two_level:
            found = _neighbours(w, h, found, fmt)
        made.append(_or_range(w, h, found, fmt))
    return Grid.concatenate(made)


def _fit(w: Array, h: Array, fmt: WeightFormat) -> tuple[Array, Array | None]:
    """(scale, bias) f32[n, groups] of w[n, groups, size] weighed by h[1, groups, size]."""
    return _fit_symmetric(w, h, fmt) if fmt.grid == "symmetric" else _fit_affine(w, h, fmt)


def _fit_symmetric(w: Array, h: Array, fmt: WeightFormat) -> tuple[Array, None]:
    zero, top = fmt.zero_code, fmt.top_code
    low, high = w.min(axis=2), w.max(axis=2)
    most = np.maximum(np.abs(low), np.abs(high))
    count = max(zero, top - zero)
    signs = [1.0]
    if top - zero != zero:
        # The side with one code more takes the larger extreme: the scale's sign says which.
        signs = [-1.0, 1.0]
    best = np.full(low.shape, np.inf, np.float32)
    scale = np.zeros_like(low)
    for sign in signs:
        for share in _shares(fmt):
            s = (sign * share / count) * most
            q = _codes(w, s, 0, zero, top) - zero
            hq = h * q
            norm = (hq * q).sum(axis=2)
            s = (hq * w).sum(axis=2) / np.where(norm == 0, 1, norm)
            _keep(best, _error(w, h, q, s, None), scale, s)
    return scale, None


def _fit_affine(w: Array, h: Array, fmt: WeightFormat) -> tuple[Array, Array]:
    low, high = w.min(axis=2), w.max(axis=2)
    one_sign = fmt.two_level or fmt.grid == "zero_point"
    if one_sign:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    best = np.full(low.shape, np.inf, np.float32)
    scale, bias = np.zeros_like(low), np.zeros_like(low)
    middle, total = (low + high) / 2, h.sum(axis=2)
    hw = (h * w).sum(axis=2)
    for share in _shares(fmt):
        s = (high - low) * (share / fmt.top_code)
        b = middle + (low - middle) * share
        for _ in range(2):
            q = _codes(w, s, b, 0, fmt.top_code)
            hq = h * q
            sq, sqq, swq = hq.sum(axis=2), (hq * q).sum(axis=2), (hq * w).sum(axis=2)
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
        q = _codes(w, s, b, 0, fmt.top_code)
        _keep(best, _error(w, h, q, s, b), scale, s, bias, b)
    return scale, bias


def _shares(fmt: WeightFormat) -> Array:
    """The steps tried, as shares of that which spans the range."""
    return np.linspace(1 - SPREAD.get(fmt.bits, LEAST), 1.05, STEPS, dtype=np.float32)


def _codes(w: Array, s: Array, b: Array | float, zero: int, top: int) -> Array:
    """Nearest codes of groups, f32; steps next to 0 give the code of 0."""
    inverse = 1 / np.where(np.abs(s) < TINY, 1, s)
    q = w * inverse[..., None]
    if zero:
        q += zero
    else:
        q -= (b * inverse)[..., None]
    np.rint(q, out=q)
    return np.clip(q, 0, top, out=q)


def _error(w: Array, h: Array, q: Array, s: Array, b: Array | None) -> Array:
    """Weighed squared error of each group."""
    e = q * s[..., None]
    if b is not None:
        e += b[..., None]
    e -= w
    e *= e
    e *= h
    total: Array = e.sum(axis=2)
    return total


def _keep(best: Array, error: Array, *pairs: Any) -> None:
    """Where `error` is less than `best`, take it, and the second of each pair into the first."""
    less = error < best
    best[less] = error[less]
    for kept, new in zip(pairs[::2], pairs[1::2], strict=True):
        kept[less] = new[less]


def _or_range(w: Array, h: Array, found: Grid, fmt: WeightFormat) -> Grid:
    """`found`, or the grid of the range where that has the lower error, both as stored."""
    spanned = grid.of_range(w.min(axis=2), w.max(axis=2), fmt)
    zero = fmt.zero_code if fmt.grid == "symmetric" else 0
    errors = []
    for each in (found, spanned):
        with np.errstate(over="ignore", invalid="ignore"):  # of scales that f16 cannot hold
            s, b = each.numbers(fmt)
            errors.append(_error(w, h, _codes(w, s, b, zero, fmt.top_code), s, b))
    if fmt.two_level:  # groups share their block's scale
        return found.rows(~(errors[1].sum(axis=1) < errors[0].sum(axis=1)), spanned)
    better = errors[1] < errors[0]

    def pick(mine: Array | None, its: Array | None) -> Array | None:
        return None if mine is None or its is None else np.where(better, its, mine)

    return Grid(np.where(better, spanned.scale, found.scale), pick(found.bias, spanned.bias),
                pick(found.zero, spanned.zero))  # fmt: skip


def _neighbours(w: Array, h: Array, found: Grid, fmt: WeightFormat) -> Grid:
    """Each group's scale and bias codes, moved by one where that lowers the error as stored."""
    assert fmt.scale_bits is not None
    top = 2**fmt.scale_bits - 1
    base = Grid(found.scale.copy(), found.bias, None, found.block_scale, found.block_bias)
    best = np.full(found.scale.shape, np.inf, np.float32)
    scale = found.scale.copy()
    bias = None if found.bias is None else found.bias.copy()
    for up in (0, -1, 1):
        c = np.clip(found.scale.astype(np.int16) + up, 0, top).astype(np.uint8)
        for move in (0, -1, 1) if found.bias is not None else (0,):
            d = None
            if found.bias is not None:
                d = np.clip(found.bias.astype(np.int16) + move, 0, top).astype(np.uint8)
            s, b = Grid(c, d, None, base.block_scale, base.block_bias).numbers(fmt)
            zero = fmt.zero_code if fmt.grid == "symmetric" else 0
            q = _codes(w, s, b, zero, fmt.top_code)
            pairs = (scale, c) if bias is None else (scale, c, bias, d)
            _keep(best, _error(w, h, q, s, b), *pairs)
    return Grid(scale, bias, None, base.block_scale, base.block_bias)


METHOD = Method("scale and bias of each group searched for the least squared error", quantize)
