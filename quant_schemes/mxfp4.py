"""The numbers of the grid mxfp4 (OCP Microscaling Formats 1.0): as numpy and as TIR.

A weight is FP4[q] * 2^(c - 127) with q a 4-bit float (E2M1) and c the exponent of its 32 columns
(E8M0). c = 0 is below every normal number and stands for 0 here; 255 is NaN and not allowed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

# By code; bit 3 is the sign.
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
EXPONENT_BIAS = 127
LARGEST_EXPONENT = 254
_MANTISSA = 23  # bits of a float32's


def numbers(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """FP4 of uint8 codes of any shape."""
    return np.array(FP4, np.float32)[codes]


def powers(exponents: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """2^(c - 127) of uint8 exponents of any shape; 0 for c = 0."""
    return (exponents.astype(np.uint32) << np.uint32(_MANTISSA)).view(np.float32)


def number_expr(code: Any, lanes: int = 1) -> Any:
    """FP4 of a uint32 below 16, or of a vector of them: a float32 TIR expression."""
    from tvm import tirx

    size = code & _const(7, "uint32", lanes)
    # Exponent and mantissa in a float32's places, 1 for the exponent 1. The exponent 0 has no
    # hidden 1: its 0.5 and 0.75 stand for 0 and 0.5.
    places = size << _const(_MANTISSA - 1, "uint32", lanes)
    moved = places + _const((EXPONENT_BIAS - 1) << _MANTISSA, "uint32", lanes)
    normal = tirx.reinterpret(_typed("float32", lanes), moved)
    small = normal * _const(2.0, "float32", lanes) - _const(1.0, "float32", lanes)
    found = tirx.Select(size < _const(2, "uint32", lanes), small, normal)
    sign = (code & _const(8, "uint32", lanes)) << _const(28, "uint32", lanes)
    return with_sign(found, sign, lanes)


def with_sign(number: Any, sign: Any, lanes: int = 1) -> Any:
    """A float32 (or a vector) with its top bit set where `sign`, uint32, has it."""
    from tvm import tirx

    bits = tirx.reinterpret(_typed("uint32", lanes), number) | sign
    return tirx.reinterpret(_typed("float32", lanes), bits)


def power_expr(exponent: Any, lanes: int = 1) -> Any:
    """2^(c - 127) of a uint32 below 255, or of a vector of them: a float32 TIR expression."""
    from tvm import tirx

    moved = exponent << _const(_MANTISSA, "uint32", lanes)
    return tirx.reinterpret(_typed("float32", lanes), moved)


def _typed(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def _const(value: float, dtype: str, lanes: int) -> Any:
    from tvm import tirx

    one = tirx.const(value, dtype)
    return one if lanes == 1 else tirx.Broadcast(one, lanes)
