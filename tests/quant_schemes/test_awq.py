"""awq's choice of factors, on inputs where what is best is known."""

import numpy as np

from qcc.quant_schemes.format import WeightFormat
from qcc.quant_schemes.packing import Array, dequantize_codes
from qcc.quant_schemes.rounding import awq
from qcc.quant_schemes.rounding.method import Inputs

FORMAT = WeightFormat(3, "float32", 32, grid="asymmetric")


def inputs_of(x: Array) -> Inputs:
    """The moments of inputs f64[m, k]."""
    means = ((x**2).mean(0), np.abs(x).mean(0), x.T @ x / len(x))
    return Inputs(len(x), *(mean.astype(np.float32) for mean in means))


def output_error(weights: Array, x: Array, s: Array) -> float:
    """|x (W - Q(W s) / s)^T|^2, with awq's own rounding, in f64."""
    inputs = inputs_of(x)
    scaled = Inputs(
        inputs.count,
        inputs.square / s**2,
        inputs.absolute / s,
        inputs.hessian / np.outer(s, s),
    )
    made = awq.quantize(weights * s, FORMAT, scaled)
    difference = weights - dequantize_codes(made, FORMAT) / s
    return float(((x @ difference.T.astype(np.float64)) ** 2).sum())


def test_factors_lower_the_error_of_outputs() -> None:
    """A few inputs are 30 times the others: their columns grow, and outputs err less."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((48, 96), np.float32)
    large = np.arange(0, 96, 13)
    x = rng.standard_normal((500, 96))
    x[:, large] *= 30
    s = awq.choose_scales([weights[:16], weights[16:]], [FORMAT, FORMAT], inputs_of(x))
    assert s.dtype == np.float32 and s.shape == (96,)
    small = np.setdiff1d(np.arange(96), large)
    assert s[large].min() > 1.5 * s[small].max()
    assert output_error(weights, x, s) < 0.8 * output_error(weights, x, np.ones_like(s))


def test_inputs_that_never_come() -> None:
    """A column without inputs has a finite factor; no inputs at all leave everything."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((8, 64), np.float32)
    x = rng.standard_normal((100, 64)) * np.linspace(1, 50, 64)
    x[:, 5] = 0
    s = awq.choose_scales([weights], [FORMAT], inputs_of(x))
    assert np.isfinite(s).all() and s.min() > 0 and s.max() / s.min() <= awq.MOST
    nothing = awq.choose_scales([weights], [FORMAT], inputs_of(np.zeros((4, 64))))
    np.testing.assert_array_equal(nothing, 1)
