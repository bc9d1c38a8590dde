"""awq: columns scaled up where their inputs are large, so that rounding hurts them less.

W x = (W s)(x / s): the layer before gives x / s instead of x, and W s is quantized. Among
s = mean|x|^alpha, alpha from 0 to 1, the one of least output error tr(E H E^T) is taken, E being
the error of the weights, H the mean of x x^T (Lin et al., 2023, "AWQ"). Where nothing can take the
1/s, codes are those of the weighted search alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qcc.quant_schemes.format import WeightFormat
from qcc.quant_schemes.packing import Array, Quantized, dequantize_codes
from qcc.quant_schemes.rounding import mse
from qcc.quant_schemes.rounding.method import Inputs, Method

ALPHAS = 20  # tried, 0 among them
ROWS = 256  # of each weight, evenly apart, on which they are tried
MOST = 1e4  # largest ratio of two scales: norms are stored in 16 bits


def quantize(weights: Array, fmt: WeightFormat, inputs: Inputs | None = None) -> Quantized:
    """Codes and grid of f32[n, k], the columns' errors weighed by the mean of x^2."""
    assert inputs is not None, "awq needs the inputs of the layer"
    return mse.search(weights, fmt, inputs.square)


def choose_scales(
    weights: Sequence[Array], formats: Sequence[WeightFormat], inputs: Inputs
) -> Array:
    """The factors s f32[k] of the columns of weights that share an input.

    Args:
        weights: f32[n, k] each.
        formats: of the weights, one each.
        inputs: of all of them.
    """
    some = [rows[:: max(1, len(rows) // ROWS)] for rows in weights]
    least, best = np.inf, np.ones_like(inputs.absolute)
    for alpha in np.linspace(0, 1, ALPHAS, endpoint=False):
        s = _scales(inputs.absolute, float(alpha))
        error = sum(_error(w, fmt, inputs, s) for w, fmt in zip(some, formats, strict=True))
        if error < least:
            least, best = error, s
    return best


def _scales(absolute: Array, alpha: float) -> Array:
    """mean|x|^alpha, f32[k], its least and greatest equally far from 1."""
    s = np.maximum(absolute / max(float(absolute.max()), 1e-30), 1 / MOST) ** alpha
    found: Array = (s / np.sqrt(s.max() * s.min())).astype(np.float32)
    return found


def _error(weights: Array, fmt: WeightFormat, inputs: Inputs, s: Array) -> float:
    """tr(E H E^T) of f32[n, k] quantized under the scales f32[k]."""
    made = mse.search(weights * s, fmt, inputs.square / (s * s))
    e = weights - dequantize_codes(made, fmt) / s
    return float(np.einsum("nk,nk->", e @ inputs.hessian, e))


METHOD = Method(
    "AWQ: columns of large inputs scaled up, the norm before them down",
    quantize,
    needs_text=True,
    scales=choose_scales,
)
