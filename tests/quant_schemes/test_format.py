"""WeightFormat: what can be, its sizes by hand, and its dict."""

from __future__ import annotations

from typing import Any

import pytest

from qcc.quant_schemes.errors import SchemeError
from qcc.quant_schemes.format import WeightFormat, float_format, mxfp4

F16 = "float16"


@pytest.mark.parametrize(
    ("fmt", "shape", "expected"),
    [
        # 3 groups of 40 columns, 4 words each; transposed.
        (WeightFormat(3, F16, 40, "KN"), (6, 100), [("q_weight", (12, 6)), ("q_scale", (3, 6))]),
        # 4 groups of 32: 128 codes of 5 bits are 20 words.
        (WeightFormat(5, F16, 32), (6, 100), [("q_weight", (6, 20)), ("q_scale", (6, 4))]),
        # 3 groups of 8: 24 codes of 3 bits are 72 bits.
        (WeightFormat(3, F16, 8), (2, 20), [("q_weight", (2, 3)), ("q_scale", (2, 3))]),
        (
            WeightFormat(4, F16, 32, grid="asymmetric"),
            (6, 100),
            [("q_weight", (6, 16)), ("q_scale", (6, 4)), ("q_bias", (6, 4))],
        ),
        # 13 zero points of 6 bits are 78 bits.
        (
            WeightFormat(6, F16, 8, grid="zero_point"),
            (2, 100),
            [("q_weight", (2, 20)), ("q_scale", (2, 13)), ("q_zero", (2, 3))],
        ),
        # A row of 100 is padded to 128.
        (WeightFormat(8, F16, "row"), (6, 100), [("q_weight", (6, 32)), ("q_scale", (6, 1))]),
        (WeightFormat(8, F16, "tensor"), (6, 100), [("q_weight", (6, 32)), ("q_scale", (1, 1))]),
        # 300 columns: 19 groups of 16 in 2 blocks; 19 codes of 4 bits are 76 bits.
        (
            WeightFormat(2, F16, 16, "KN", "asymmetric", scale_bits=4),
            (5, 300),
            [("q_weight", (19, 5)), ("q_scale", (3, 5)), ("q_bias", (3, 5)),
             ("q_block_scale", (2, 5)), ("q_block_bias", (2, 5))],
        ),
        (
            WeightFormat(6, F16, 16, zero=32, scale_bits=8),
            (5, 256),
            [("q_weight", (5, 48)), ("q_scale", (5, 4)), ("q_block_scale", (5, 1))],
        ),
    ],
)  # fmt: skip
def test_stored_shapes(fmt: WeightFormat, shape: tuple[int, int], expected: Any) -> None:
    parts = fmt.stored(*shape)
    assert [(part.suffix, part.shape) for part in parts] == expected
    words = {"q_weight", "q_zero"} | ({"q_scale", "q_bias"} if fmt.two_level else set())
    assert all((part.dtype == "uint32") == (part.suffix in words) for part in parts)
    stored = sum((4 if part.suffix in words else 2) * a * b
                 for part, (_, (a, b)) in zip(parts, expected, strict=True))  # fmt: skip
    assert sum(part.nbytes for part in parts) == stored
    assert fmt.bits_per_weight(*shape) == 8 * stored / (shape[0] * shape[1])


def test_a_float_weight_is_stored_as_it_is() -> None:
    (part,) = WeightFormat(16, "bfloat16").stored(2, 3)
    assert (part.suffix, part.shape, part.dtype, part.nbytes) == ("weight", (2, 3), "bfloat16", 12)
    assert float_format("float32") == WeightFormat(32, "float32")


@pytest.mark.parametrize(
    ("fmt", "zero", "top"),
    [
        (WeightFormat(4, F16, 32), 7, 14),
        (WeightFormat(2, F16, 32), 1, 2),
        (WeightFormat(8, F16, "row"), 127, 254),
        (WeightFormat(4, F16, 32, zero=8), 8, 15),
        (WeightFormat(4, F16, 32, zero=0), 0, 15),
        (WeightFormat(4, F16, 32, grid="asymmetric"), 7, 15),
        (WeightFormat(4, F16, 32, grid="zero_point"), 7, 15),
        (mxfp4(F16), 7, 15),
    ],
)
def test_codes(fmt: WeightFormat, zero: int, top: int) -> None:
    assert fmt.top_code == top
    assert fmt.grid != "symmetric" or fmt.zero_code == zero


def test_which_formats_are_the_contracts() -> None:
    assert WeightFormat(4, "bfloat16", 32, "KN").is_contract
    assert WeightFormat(5, F16, "row").is_contract, "the same formula, one scale a row"
    for other in (
        WeightFormat(4, F16, 32, zero=7),
        WeightFormat(4, F16, 32, grid="asymmetric"),
        WeightFormat(4, F16, 32, scale_bits=6),
        WeightFormat(16, F16),
        mxfp4(F16),
    ):
        assert not other.is_contract


@pytest.mark.parametrize(
    "fmt",
    [
        WeightFormat(4, F16, 32, "KN"),
        WeightFormat(32, "float32"),
        WeightFormat(8, F16, "row"),
        WeightFormat(8, F16, "tensor", "KN", "asymmetric"),
        WeightFormat(4, "float32", 32, zero=0),
        WeightFormat(3, "bfloat16", 16, grid="zero_point"),
        WeightFormat(2, F16, 16, grid="asymmetric", scale_bits=4),
        mxfp4("bfloat16", "KN"),
    ],
)
def test_a_format_survives_its_dict(fmt: WeightFormat) -> None:
    assert WeightFormat.from_dict(fmt.as_dict()) == fmt
    assert None not in fmt.as_dict().values()


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"bits": 7}, "format: 7 bits; quantized formats have (2, 3, 4, 5, 6, 8)"),
        ({"dtype": "float8"}, "dtype 'float8' is not one of float32, float16, bfloat16"),
        ({"group": None}, "4 bits need a group size (a float format has 16 bits for float16)"),
        ({"group": 12}, "group 12 is not a multiple of 8 from 8 to 1024 (or 'row', 'tensor')"),
        ({"group": 0}, "group 0 is not"),
        ({"group": -8}, "group -8 is not"),
        ({"group": 1032}, "group 1032 is not a multiple of 8 from 8 to 1024"),
        ({"group": "rows"}, "group 'rows' is neither a size nor 'row' nor 'tensor'"),
        ({"layout": "MN"}, "layout 'MN' is not one of NK, KN"),
        (
            {"grid": "affine"},
            "grid 'affine' is not one of symmetric, asymmetric, zero_point, mxfp4",
        ),
        ({"zero": 16}, "zero 16 is no code of 4 bits"),
        ({"zero": -1}, "zero -1 is no code of 4 bits"),
        ({"zero": 8, "grid": "asymmetric"}, "zero 8 belongs to a symmetric grid, not asymmetric"),
        ({"scale_bits": 7}, "scale_bits 7 is not one of (4, 5, 6, 8)"),
        ({"grid": "mxfp4"}, "grid mxfp4: it has bits 4, group 32 and scale_bits 8, no others"),
        ({"scale_bits": 6, "grid": "zero_point"}, "two-level scales have no zero points"),
        ({"scale_bits": 6, "group": "row"}, "group row does not divide a block of 256"),
        ({"scale_bits": 6, "group": 24}, "group 24 does not divide a block of 256"),
        ({"scale_bits": 6, "group": 512}, "group 512 does not divide a block of 256"),
    ],
)
def test_what_cannot_be(fields: dict[str, Any], text: str) -> None:
    given: dict[str, Any] = {"bits": 4, "dtype": F16, "group": 32, **fields}
    with pytest.raises(SchemeError) as caught:
        WeightFormat(**given)
    assert text in str(caught.value) and "\n" not in str(caught.value)
