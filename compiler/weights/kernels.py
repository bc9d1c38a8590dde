"""The converter's arithmetic, compiled for this machine: quantize and cast blocks of numbers.

`quantize` equals rounding/rtn.py and packing.pack to the bit. A kernel runs in the thread that
calls it, without Python's lock; it is compiled at its first use in the process, in about 0.2 s.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from qcc.quant_schemes.format import WeightFormat
from qcc.quant_schemes.packing import float_dtype

Array = npt.NDArray[Any]
ALIGNMENT = 64  # bytes; what compiled code assumes of an array
_COMPILING = threading.Lock()


def aligned_empty(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """New memory that a kernel takes."""
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def takes(fmt: WeightFormat) -> bool:
    """Whether `quantize` serves a format: the contract's grid in groups of whole words."""
    groups = fmt.is_contract and isinstance(fmt.group, int)
    return groups and (fmt.bits in (4, 8) or fmt.sparse_words)


def quantize(rows: Array, fmt: WeightFormat) -> tuple[Array, Array]:
    """Round rows to nearest and pack their codes, in layout NK whatever the format's layout is.

    Args:
        rows: float32, float16 or bfloat16 [r, k], C-contiguous.
        fmt: one that `takes` says yes to.

    Returns:
        (words uint32[r, num_words(k)], scales fmt.dtype[r, num_groups(k)]). A group with a number
        that is not finite, or that the format's dtype cannot hold, has a scale that is not finite.
    """
    assert takes(fmt), f"no kernel for {fmt}"
    r, k = rows.shape
    words = aligned_empty((r, fmt.num_words(k)), np.uint32)
    scales = aligned_empty((r, fmt.num_groups(k)), float_dtype(fmt.dtype))
    with _COMPILING:
        kernel = _quantize_kernel(rows.dtype.name, replace(fmt, layout="NK"))
    kernel(_tensor(rows), _tensor(words), _tensor(scales))
    return words, scales


def cast(flat: Array, dtype: str) -> Array:
    """Numbers [m] as "float32", "float16" or "bfloat16", rounded to nearest even.

    The result is `flat` itself where it has that dtype; a number beyond its range gets infinite.
    """
    if flat.dtype == float_dtype(dtype):
        return flat
    result = aligned_empty(flat.shape, float_dtype(dtype))
    with _COMPILING:
        kernel, lanes = _cast_kernel(flat.dtype.name, dtype)
    kernel(_tensor(flat), _tensor(result))
    rest = flat.size - flat.size % lanes
    with np.errstate(over="ignore"):
        result[rest:] = flat[rest:].astype(result.dtype)
    return result


def all_finite(numbers: Array) -> bool:
    """Whether no number is NaN or infinite."""
    if numbers.dtype == np.float32:
        return bool(np.isfinite(numbers).all())
    exponent = np.uint16(0x7C00 if numbers.dtype == np.float16 else 0x7F80)
    return not bool(((numbers.view(np.uint16) & exponent) == exponent).any())


@cache
def _quantize_kernel(source: str, fmt: WeightFormat) -> Callable[..., None]:
    from qcc.compiler.weights import kernel_tir

    return _compile("quantize", kernel_tir.quantize_kernel(source, fmt))


@cache
def _cast_kernel(source: str, dtype: str) -> tuple[Callable[..., None], int]:
    from qcc.compiler.weights import kernel_tir

    return _compile("cast", kernel_tir.cast_kernel(source, dtype)), kernel_tir.LANES


def _compile(name: str, func: Any) -> Callable[..., None]:
    import tvm

    from qcc.targets.cpu.build import resolve
    from qcc.targets.spec import BuildOptions

    host, _ = resolve(BuildOptions())
    library = tvm.compile(tvm.IRModule({name: func}), target=host)
    compiled: Callable[..., None] = library[name]
    return compiled


def _tensor(array: Array) -> Any:
    """The array as a tensor of the same memory, aligned; bfloat16 as its bits."""
    from tvm.runtime import from_dlpack

    if array.ctypes.data % ALIGNMENT:
        copy = aligned_empty(array.shape, array.dtype)
        copy[...] = array
        array = copy
    return from_dlpack(array.view(np.uint16) if array.dtype.name == "bfloat16" else array)
