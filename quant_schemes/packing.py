"""Codes <-> uint32 words and stored parts -> weights, each twice: as numpy and as a TIR expression.

CONTRACTS section 1, E = 32 // bits codes in a word, M = 2^(bits-1) - 1:
    word[j] = sum over e < E of code[j*E + e] << (e*bits)    w' = (code - M) * scale
Layout NK: q_weight uint32[n, ceil(k/group)*group/E], q_scale[n, ceil(k/group)]; KN: transposed.
Codes past k are 0. How codes are chosen is the business of rounding/.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qcc.quant_schemes.scheme import WeightFormat

Array = npt.NDArray[Any]


def float_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of "float32", "float16" or "bfloat16" (ml_dtypes)."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def pack(codes: Array, fmt: WeightFormat) -> npt.NDArray[np.uint32]:
    """Pack codes, an unsigned [n, k], into words in the format's layout.

    Returns:
        uint32[n, num_words(k)] for NK, C-contiguous; its transpose for KN.
    """
    n, k = codes.shape
    per_word = fmt.codes_per_word
    padded = np.zeros((n, fmt.num_words(k) * per_word), np.uint8)
    padded[:, :k] = codes
    words = np.zeros((n, fmt.num_words(k)), np.uint32)
    for e in range(per_word):
        words |= padded[:, e::per_word].astype(np.uint32) << np.uint32(e * fmt.bits)
    return in_layout(words, fmt)


def unpack(words: Array, fmt: WeightFormat, n: int, k: int) -> npt.NDArray[np.uint8]:
    """The inverse of `pack`: words in the format's layout -> codes uint8[n, k]."""
    rows = in_layout(words, fmt)
    assert rows.shape == (n, fmt.num_words(k)), f"words {words.shape} for a weight [{n}, {k}]"
    per_word = fmt.codes_per_word
    codes = np.empty((n, rows.shape[1] * per_word), np.uint8)
    for e in range(per_word):
        codes[:, e::per_word] = (rows >> np.uint32(e * fmt.bits)) & np.uint32(2**fmt.bits - 1)
    return np.ascontiguousarray(codes[:, :k])


def in_layout(rows: Array, fmt: WeightFormat) -> Array:
    """[n, x] as the format stores it, or back (a transpose is its own inverse); C-contiguous."""
    return np.ascontiguousarray(rows.T if fmt.layout == "KN" else rows)


def store(codes: Array, scales: Array, fmt: WeightFormat) -> dict[str, Array]:
    """The stored parts of a weight, by suffix.

    Args:
        codes: uint8[n, k].
        scales: [n, num_groups(k)] in the format's dtype.
        fmt: a quantized format.
    """
    return {"q_weight": pack(codes, fmt), "q_scale": in_layout(scales, fmt)}


def dequantize(
    parts: Mapping[str, Array], fmt: WeightFormat, n: int, k: int, dtype: str = "float32"
) -> Array:
    """The weights that stored parts stand for, w' = (q - M) * s.

    Args:
        parts: suffix -> array, as `store` returns; {"weight": [n, k]} for a float format.
        fmt: of the weight.
        n: rows (output features).
        k: columns (input features).
        dtype: what every step is computed and rounded in, and the dtype of the result. The
            product is exact in float32 where scales have 16 bits; the format's own dtype gives
            what the contract's formula says to the bit.

    Returns:
        dtype[n, k].
    """
    out = float_dtype(dtype)
    if fmt.is_float:
        return parts["weight"].astype(out)
    codes = unpack(parts["q_weight"], fmt, n, k)
    assert fmt.group is not None
    scales = in_layout(parts["q_scale"], fmt).astype(out)  # [n, groups]
    # The codes' differences are small whole numbers: exact in every dtype.
    weights = (codes.astype(np.float32) - np.float32(fmt.max_code)).astype(out)
    for start in range(0, k, fmt.group):
        weights[:, start : start + fmt.group] *= scales[:, start // fmt.group, None]
    return weights


def dequantize_expr(fmt: WeightFormat, words: Any, scales: Any, n: Any, k: Any, dtype: str) -> Any:
    """Element [n, k] of a quantized weight as a TIR expression of `dtype`.

    Args:
        fmt: a quantized format.
        words: q_weight, a te tensor or TIR buffer, in the format's layout.
        scales: q_scale, likewise.
        n: row, an integer expression.
        k: column, likewise; must lie before the weight's k (codes past it are padding).
        dtype: what (q - M) and the product are computed in.
    """
    from tvm import tirx

    assert fmt.group is not None, "a float format has no codes"
    # A Python int takes the dtype of the index: FuseTIR refuses a mix of int32 and int64.
    word, group = tirx.floordiv(k, fmt.codes_per_word), tirx.floordiv(k, fmt.group)
    shift = (tirx.floormod(k, fmt.codes_per_word) * fmt.bits).astype("uint32")
    loaded = words[n, word] if fmt.layout == "NK" else words[word, n]
    scale = scales[n, group] if fmt.layout == "NK" else scales[group, n]
    code = (loaded >> shift) & tirx.const(2**fmt.bits - 1, "uint32")
    centred = code.astype("int32") - tirx.const(fmt.max_code, "int32")
    return centred.astype(dtype) * scale.astype(dtype)
