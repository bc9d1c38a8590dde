"""Every WeightFormat's stored parts, read bit by bit from the text of packing.py and format.py."""

from __future__ import annotations

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qcc.quant_schemes import packing
from qcc.quant_schemes.errors import SchemeError
from qcc.quant_schemes.format import WeightFormat, mxfp4
from qcc.quant_schemes.packing import Grid, Quantized

NUMPY = {"float16": np.float16, "float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


@cache
def cases() -> list[tuple[WeightFormat, int, int]]:
    """(format, n, k): the sparse words, then random ones, rows and columns odd and even."""
    rng = np.random.default_rng(0)
    groups = (8, 16, 24, 32, 40, 64, 72, 128, 256, 1000, "row", "tensor")

    def any_of(values: Any) -> Any:
        return values[rng.integers(len(values))]

    found = [
        (WeightFormat(3, "float16", 40), 3, 172),
        (WeightFormat(3, "float32", 40, "KN"), 2, 41),
        (mxfp4("float16"), 3, 172),
        (mxfp4("float32", "KN"), 7, 33),
    ]
    while len(found) < 120:
        bits, grid = any_of((2, 3, 4, 5, 6, 8)), any_of(("symmetric", "asymmetric", "zero_point"))
        zero = int(rng.integers(2**bits)) if grid == "symmetric" and rng.random() < 0.3 else None
        scale_bits = any_of((None, None, 4, 5, 6, 8))
        layout, dtype = any_of(("NK", "KN")), any_of(tuple(NUMPY))
        try:
            fmt = WeightFormat(bits, dtype, any_of(groups), layout, grid, zero, scale_bits)
        except SchemeError:
            continue
        found.append((fmt, any_of((1, 2, 3, 7)), any_of((1, 8, 33, 100, 172, 256, 257, 361, 640))))
    return found


def quantized(fmt: WeightFormat, n: int, k: int) -> Quantized:
    """Random codes, scales and biases of all that the format can hold."""
    rng = np.random.default_rng(n * k)
    rows, groups, blocks = 1 if fmt.group == "tensor" else n, fmt.num_groups(k), -(-k // 256)

    def codes(bits: int) -> Any:
        return rng.integers(0, 2**bits, (rows, groups)).astype(np.uint8)

    def numbers(count: int) -> Any:
        return rng.normal(0, 0.01, (rows, count)).astype(NUMPY[fmt.dtype])

    if fmt.grid == "mxfp4":
        exponents = rng.integers(1, 250, (rows, groups)).astype(np.uint8)
        return Quantized(rng.integers(0, 16, (n, k)).astype(np.uint8), Grid(exponents))
    two, biased = fmt.scale_bits, fmt.grid == "asymmetric"
    grid = Grid(
        codes(two) if two else numbers(groups),
        None if not biased else codes(two) if two else numbers(groups),
        codes(fmt.bits) if fmt.grid == "zero_point" else None,
        numbers(blocks) if two else None,
        numbers(blocks) if two and biased else None,
    )
    return Quantized(rng.integers(0, 2**fmt.bits, (n, k)).astype(np.uint8), grid)


def integer(words: Any) -> int:
    """A row of words as one number, the first word lowest."""
    return sum(int(word) << 32 * i for i, word in enumerate(words))


def read(row: Any, index: int, bits: int, sparse: bool = False) -> int:
    """Code `index` of a row of words."""
    if sparse:
        return int(row[index // 10]) >> (index % 10 * 3) & 7
    return integer(row) >> (index * bits) & (2**bits - 1)


def weight_of(parts: dict[str, Any], fmt: WeightFormat, row: int, col: int, k: int) -> tuple:
    """(q, scale, bias) of one weight in f64, from the docstring of format.py."""
    at = {name: part.T if fmt.layout == "KN" else part for name, part in parts.items()}
    group = col // fmt.group if isinstance(fmt.group, int) else 0
    sparse = (fmt.bits, fmt.group) == (3, 40)
    q = read(at["q_weight"][row], col, fmt.bits, sparse)
    grid_row = 0 if fmt.group == "tensor" else row
    if fmt.grid == "mxfp4":
        exponent, mantissa = q >> 1 & 3, q & 1
        number = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
        return -number if q & 8 else number, 2.0 ** (read(at["q_scale"][row], group, 8) - 127), 0.0
    if fmt.scale_bits is None:
        scale = float(at["q_scale"][grid_row, group])
    else:
        zero = 2 ** (fmt.scale_bits - 1) if fmt.grid == "symmetric" else 0
        c = read(at["q_scale"][row], group, fmt.scale_bits)
        scale = float(at["q_block_scale"][row, col // 256]) * (c - zero)
    if fmt.grid == "asymmetric":
        if fmt.scale_bits is None:
            return q, scale, float(at["q_bias"][grid_row, group])
        d = read(at["q_bias"][row], group, fmt.scale_bits)
        return q, scale, float(at["q_block_bias"][row, col // 256]) * d
    z = 2 ** (fmt.bits - 1) - 1 if fmt.zero is None else fmt.zero
    if fmt.grid == "zero_point":
        z = read(at["q_zero"][grid_row], group, fmt.bits)
    return q - z, scale, 0.0


def some_columns(k: int) -> list[int]:
    return sorted({0, k - 1, *np.random.default_rng(k).integers(0, k, 12).tolist()})


@pytest.mark.parametrize("case", range(len(cases())))
def test_stored_parts(case: int) -> None:
    """Shapes, bits, weights; and back."""
    fmt, n, k = cases()[case]
    given = quantized(fmt, n, k)
    parts = packing.store(given, fmt)
    assert list(parts) == [part.suffix for part in fmt.stored(n, k)]
    for part in fmt.stored(n, k):
        assert parts[part.suffix].shape == part.shape and parts[part.suffix].flags.c_contiguous
        assert parts[part.suffix].dtype.name == part.dtype

    rows = parts["q_weight"].T if fmt.layout == "KN" else parts["q_weight"]
    for row in range(n):
        codes = [read(rows[row], i, fmt.bits, fmt.sparse_words) for i in range(k)]
        assert codes == given.codes[row].tolist()
        if not fmt.sparse_words:
            assert integer(rows[row]) >> (k * fmt.bits) == 0, "padding"

    found = packing.dequantize(parts, fmt, n, k, "float32")
    assert found.shape == (n, k) and found.dtype == np.float32
    plain = fmt.grid != "mxfp4"
    scale, bias = given.grid.numbers(fmt) if plain else (given.grid.scale, given.grid.scale)
    for row in range(n):
        for col in some_columns(k):
            q, s, b = weight_of(parts, fmt, row, col, k)
            # Three roundings of f32.
            assert abs(found[row, col] - (q * s + b)) <= 2e-7 * (abs(q * s) + abs(b))
            if not plain:
                assert found[row, col] == q * s
                continue
            r, g = min(row, len(scale) - 1), col // fmt.group_size(k)
            exact, q = q * s + b, int(given.codes[row, col])
            in_f32 = float(q) * float(scale[r, g]) + float(bias[r, g])
            assert abs(in_f32 - exact) <= 2e-7 * (q * abs(s) + abs(float(bias[r, g])))

    back = packing.load(parts, fmt, n, k)
    np.testing.assert_array_equal(back.codes, given.codes)
    for name in ("scale", "bias", "zero", "block_scale", "block_bias"):
        expected = getattr(given.grid, name)
        if expected is None:
            assert getattr(back.grid, name) is None
        else:
            np.testing.assert_array_equal(getattr(back.grid, name), expected)


def test_the_cases_cover_the_formats() -> None:
    formats = [fmt for fmt, _, _ in cases()]
    for name in ("bits", "dtype", "group", "layout", "grid", "scale_bits"):
        kinds = {getattr(fmt, name) for fmt in formats}
        wanted = {"bits": 6, "dtype": 3, "group": 12, "layout": 2, "grid": 4, "scale_bits": 5}
        assert len(kinds) == wanted[name], (name, kinds)
    assert any(fmt.sparse_words for fmt in formats) and any(fmt.zero for fmt in formats)


def test_weights_below_each_other() -> None:
    """A fused weight is the concatenation of its sources, part by part."""
    fmt = WeightFormat(3, "float16", 16, "KN", "asymmetric", None, 6)
    pieces = [quantized(fmt, n, 100) for n in (2, 5)]
    whole = packing.store(Quantized.concatenate(pieces), fmt)
    apart = [packing.store(piece, fmt) for piece in pieces]
    for name, part in whole.items():
        np.testing.assert_array_equal(part, np.concatenate([p[name] for p in apart], axis=1))


def _two(element: Any) -> Any:
    return lambda i, j: element(i, j)  # te.compute counts the arguments


def test_tir_equals_numpy() -> None:
    """dequantize_expr, to the bit, in f32 and in the format's own dtype."""
    tvm = pytest.importorskip("tvm")
    from tvm import te

    module, made = {}, []
    for fmt, n, k in cases()[::3]:
        dtypes = {"float32"} if fmt.dtype == "bfloat16" else {"float32", fmt.dtype}
        for dtype in sorted(dtypes):
            inputs = [
                te.placeholder([tvm.tirx.IntImm("int64", d) for d in part.shape], part.dtype)
                for part in fmt.stored(n, k)
            ]

            def element(
                i: Any, j: Any, fmt: Any = fmt, inputs: Any = inputs, k: int = k, to: str = dtype
            ) -> Any:
                return packing.dequantize_expr(fmt, inputs, i, j, k, to)

            shape = [tvm.tirx.IntImm("int64", extent) for extent in (n, k)]
            out = te.compute(shape, _two(element))
            name = f"f{len(made)}"
            func = te.create_prim_func([*inputs, out])
            module[name] = func.with_attr("global_symbol", name)
            made.append((name, fmt, n, k, dtype))
    library = tvm.compile(tvm.IRModule(module), target="llvm")
    for name, fmt, n, k, dtype in made:
        parts = packing.store(quantized(fmt, n, k), fmt)
        given = [tvm.runtime.tensor(part) for part in parts.values()]
        result = tvm.runtime.empty((n, k), dtype)
        library[name](*given, result)
        expected = packing.dequantize(parts, fmt, n, k, dtype)
        np.testing.assert_array_equal(result.numpy(), expected, err_msg=f"{fmt} {n} {k}")
