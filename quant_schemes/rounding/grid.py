"""What all methods share: groups of a matrix, scales and biases as a format stores them, codes.

A method chooses real scales and biases, `stored` rounds them to what the format can hold, and
`nearest` gives the codes on that grid.
"""

from __future__ import annotations

import numpy as np

from qcc.quant_schemes.format import BLOCK, WeightFormat
from qcc.quant_schemes.packing import Array, Grid, Quantized, float_dtype

LARGEST = {"float16": 65504.0, "bfloat16": 3.3895e38, "float32": 3.4028e38}


def grouped(rows: Array, fmt: WeightFormat) -> Array:
    """f32[n, k] -> [n, groups, group]; a tail is filled with its last column."""
    n, k = rows.shape
    size = fmt.group_size(k)
    padded = np.pad(rows, ((0, 0), (0, fmt.num_groups(k) * size - k)), mode="edge")
    return padded.reshape(n, -1, size)


def ranges(rows: Array, fmt: WeightFormat) -> tuple[Array, Array]:
    """(smallest, largest) of each group, f32[n, groups], or [1, 1] of the whole tensor."""
    groups = grouped(rows, fmt)
    if fmt.group == "tensor":
        return groups.min(keepdims=True)[0], groups.max(keepdims=True)[0]
    return groups.min(axis=2), groups.max(axis=2)


def of_range(low: Array, high: Array, fmt: WeightFormat) -> Grid:
    """The grid that spans low..high f32[n, groups] of each group."""
    if fmt.grid == "symmetric":
        below, above = fmt.zero_code, fmt.top_code - fmt.zero_code
        # The side that needs the larger step decides; a side without codes has no say.
        steps = [side / count for side, count in ((-low, below), (high, above)) if count]
        return stored(np.maximum(0, np.maximum.reduce(steps)), None, fmt)
    if fmt.two_level or fmt.grid == "zero_point":  # their biases are of one sign
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    return stored((high - low) / fmt.top_code, low, fmt)


def stored(scale: Array, bias: Array | None, fmt: WeightFormat) -> Grid:
    """Real scales and biases f32[n, groups] as the format holds them; bias None: symmetric."""
    if fmt.two_level:
        block_scale, scale_codes = _two_level(scale, fmt)
        if bias is None:
            return Grid(scale_codes, block_scale=block_scale)
        block_bias, bias_codes = _two_level(np.minimum(bias, 0), fmt)
        return Grid(scale_codes, bias_codes, None, block_scale, block_bias)
    held = as_dtype(scale, fmt.dtype)
    if bias is None:
        return Grid(held)
    if fmt.grid == "asymmetric":
        return Grid(held, as_dtype(bias, fmt.dtype))
    step = held.astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        zero = np.where(step == 0, 0, np.rint(-bias / step))
    return Grid(held, zero=np.clip(zero, 0, fmt.top_code).astype(np.uint8))


def as_dtype(numbers: Array, dtype: str) -> Array:
    """Real numbers rounded to float16, bfloat16 or float32; what is too large becomes infinite."""
    with np.errstate(over="ignore"):
        return numbers.astype(float_dtype(dtype))


def _two_level(numbers: Array, fmt: WeightFormat) -> tuple[Array, Array]:
    """f32[n, groups] -> (block numbers dtype[n, blocks], codes uint8[n, groups])."""
    assert fmt.scale_bits is not None and isinstance(fmt.group, int)
    n, groups = numbers.shape
    each = BLOCK // fmt.group
    blocks = -(-groups // each)
    padded = np.pad(numbers, ((0, 0), (0, blocks * each - groups))).reshape(n, blocks, each)
    zero, top = fmt.scale_zero, 2**fmt.scale_bits - 1
    at = np.abs(padded).argmax(axis=2)[..., None]
    extreme = np.take_along_axis(padded, at, axis=2)[..., 0]  # of either sign
    # Where codes are signed the extreme takes the end that has one code more, the lowest.
    block = as_dtype(extreme / (-zero if zero else top), fmt.dtype)
    step = block.astype(np.float32)[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.where(step == 0, 0, np.rint(padded / step)) + zero
    codes = np.clip(codes, 0, top).astype(np.uint8).reshape(n, -1)
    return block, np.ascontiguousarray(codes[:, :groups])


def nearest(rows: Array, grid: Grid, fmt: WeightFormat) -> Quantized:
    """The nearest codes of f32[n, k] on a grid."""
    n, k = rows.shape
    scale, bias = (np.broadcast_to(x, (n, x.shape[1]))[:, :, None] for x in grid.numbers(fmt))
    groups = grouped(rows, fmt)
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.where(scale == 0, 0, np.rint((groups - bias) / scale))
    codes = np.clip(q, 0, fmt.top_code).astype(np.uint8).reshape(n, -1)
    return Quantized(np.ascontiguousarray(codes[:, :k]), grid)
