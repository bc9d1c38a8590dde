"""Compiled conversion of weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qcc.quant_schemes import packing
from qcc.quant_schemes.rounding import rtn
from qcc.quant_schemes.scheme import WeightFormat

Array = npt.NDArray[Any]


def quantize(rows: Array, fmt: WeightFormat) -> tuple[Array, Array]:
    """Words uint32[r, num_words(k)] and scales fmt.dtype[r, num_groups(k)] of rows [r, k]."""
    codes, scales = rtn.quantize(rows, fmt)
    return packing.pack(codes, replace(fmt, layout="NK")), scales


def cast(flat: Array, dtype: str) -> Array:
    """Numbers [m] in another dtype, rounded to nearest even."""
    with np.errstate(over="ignore"):
        return flat.astype(packing.float_dtype(dtype))


def all_finite(numbers: Array) -> bool:
    """Whether no number is NaN or infinite."""
    if numbers.dtype == np.float32:
        return bool(np.isfinite(numbers).all())
    mask = np.uint16(0x7C00 if numbers.dtype == np.float16 else 0x7F80)
    return not bool(((numbers.view(np.uint16) & mask) == mask).any())
