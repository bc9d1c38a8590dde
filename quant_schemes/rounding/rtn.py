"""Round to nearest: the contract's choice of codes and scales, the reference in numpy.

Every step is computed and rounded in the model dtype (CONTRACTS section 1):
    s = max|w| / M      t = w / s      u = t + M      q = clip(round_half_even(u), 0, 2M)
numpy's float16 and ml_dtypes' bfloat16 compute a step in float32 and round once, which for these
steps is the correctly rounded result. compiler/weights/kernels.py is the fast twin.
"""

from __future__ import annotations

import numpy as np

from qcc.quant_schemes.packing import Array, float_dtype
from qcc.quant_schemes.scheme import WeightFormat


def quantize(weights: Array, fmt: WeightFormat) -> tuple[Array, Array]:
    """Codes and scales of a weight matrix.

    A group whose scale is 0 (all zeros, or so small that max|w| / M rounds to 0) has codes 0.

    Args:
        weights: floating [n, k], finite also after rounding to the format's dtype.
        fmt: a quantized format.

    Returns:
        (codes uint8[n, k], scales fmt.dtype[n, num_groups(k)]).
    """
    n, k = weights.shape
    assert fmt.group is not None, "a float format has no codes"
    dtype = float_dtype(fmt.dtype)
    groups = fmt.num_groups(k)
    padded = np.zeros((n, groups * fmt.group), dtype)
    padded[:, :k] = weights.astype(dtype)
    w = padded.reshape(n, groups, fmt.group)
    m = dtype.type(fmt.max_code)

    scales = np.abs(w).max(axis=2) / m  # [n, groups]
    s = scales[:, :, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        u = w / s + m
    assert scales.dtype == dtype and u.dtype == dtype, "a step left the model dtype"
    q = np.clip(np.rint(u.astype(np.float32)), 0, 2 * fmt.max_code)
    codes = np.where(s == 0, 0, q).astype(np.uint8).reshape(n, -1)
    return np.ascontiguousarray(codes[:, :k]), scales
