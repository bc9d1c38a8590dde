"""Round to nearest: the contract's choice of codes and scales, the reference in numpy.

On the contract's symmetric grid every step is computed and rounded in the model dtype (CONTRACTS
section 1):
    s = max|w| / M      t = w / s      u = t + M      q = clip(round_half_even(u), 0, 2M)
numpy's float16 and ml_dtypes' bfloat16 compute a step in float32 and round once, which for these
steps is the correctly rounded result. compiler/weights/kernels.py is the fast twin. Other formats
span [min, max] of each group: see grid.py.
"""

from __future__ import annotations

import numpy as np

from qcc.quant_schemes.format import WeightFormat
from qcc.quant_schemes.packing import Array, Grid, Quantized, float_dtype
from qcc.quant_schemes.rounding import grid, mxfp4
from qcc.quant_schemes.rounding.method import Inputs, Method


def quantize(weights: Array, fmt: WeightFormat, _inputs: Inputs | None = None) -> Quantized:
    """Codes and scales of a weight matrix.

    A group whose scale is 0 (all zeros, or so small that max|w| / M rounds to 0) has codes 0.

    Args:
        weights: floating [n, k], finite also after rounding to the format's dtype.
        fmt: a quantized format.
    """
    if fmt.grid == "mxfp4":
        return mxfp4.quantize(weights.astype(np.float32), fmt, searched=False)
    if not fmt.is_contract:
        rows = weights.astype(np.float32)
        return grid.nearest(rows, grid.of_range(*grid.ranges(rows, fmt), fmt), fmt)
    n, k = weights.shape
    dtype = float_dtype(fmt.dtype)
    group, groups = fmt.group_size(k), fmt.num_groups(k)
    padded = np.zeros((n, groups * group), dtype)
    padded[:, :k] = weights.astype(dtype)
    w = padded.reshape(n, groups, group)
    m = dtype.type(fmt.zero_code)

    scales = np.abs(w).max(axis=2) / m  # [n, groups]
    if fmt.group == "tensor":
        scales = scales.max(axis=0, keepdims=True)  # the largest of ratios: division is monotonic
    s = scales[:, :, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        u = w / s + m
    assert scales.dtype == dtype and u.dtype == dtype, "a step left the model dtype"
    q = np.clip(np.rint(u.astype(np.float32)), 0, fmt.top_code)
    codes = np.where(s == 0, 0, q).astype(np.uint8).reshape(n, -1)
    return Quantized(np.ascontiguousarray(codes[:, :k]), Grid(scales))


METHOD = Method("round to nearest; the contract's bits for the contract's names", quantize)
