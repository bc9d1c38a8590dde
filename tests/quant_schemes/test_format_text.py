"""FORMAT, what a user writes: every form, and the text of what is none."""

from __future__ import annotations

from typing import Any

import pytest

from qcc.quant_schemes.errors import SchemeError
from qcc.quant_schemes.format import WeightFormat
from qcc.quant_schemes.format_text import format_of_dict, format_of_text, text_of
from qcc.quant_schemes.scheme import list_schemes, load_scheme, uniform_format

F16 = "float16"


def affine(bits: int, group: int, scale_bits: int | None = None) -> WeightFormat:
    return WeightFormat(bits, F16, group, grid="asymmetric", scale_bits=scale_bits)


FORMS = {
    "float": WeightFormat(16, F16),
    "4/32": WeightFormat(4, F16, 32),
    "2/1024": WeightFormat(2, F16, 1024),
    "8/row": WeightFormat(8, F16, "row"),
    "8/tensor": WeightFormat(8, F16, "tensor"),
    "4/64a": affine(4, 64),
    "3/rowa": WeightFormat(3, F16, "row", grid="asymmetric"),
    "2/16k": affine(2, 16, 4),
    "3/32k": affine(3, 32, 4),
    "4/16k": affine(4, 16, 4),
    "4/32k": affine(4, 32, 6),
    "8/256k": affine(8, 256, 6),
    "2/32k6": affine(2, 32, 6),
    "4/32k8": affine(4, 32, 8),
}


@pytest.mark.parametrize("text", FORMS)
def test_every_form(text: str) -> None:
    assert format_of_text(text, F16, "--set", uniform_format) == FORMS[text]
    assert text_of(FORMS[text]) == text


def test_the_dtype_is_that_of_the_scheme() -> None:
    assert format_of_text("4/32", "bfloat16", "x", uniform_format).dtype == "bfloat16"
    assert format_of_text("float", "float32", "x", uniform_format).bits == 32
    assert format_of_text("q4f32_1", F16, "x", uniform_format).dtype == "float32"


def test_schemes_as_formats() -> None:
    """Those without rules of their own, and no others."""
    for name in list_schemes():
        rules = load_scheme(name).rules
        if len(rules) == 1:
            assert format_of_text(name, F16, "x", uniform_format) == rules[0][1]
        else:
            with pytest.raises(SchemeError, match=f"'{name}' is no FORMAT"):
                format_of_text(name, F16, "x", uniform_format)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "where: '' is no FORMAT: bits/group as 4/32, 4/64a (asymmetric), 2/16k (two-level)"),
        ("4", "where: '4' is no FORMAT"),
        ("4/", "where: '4/' is no FORMAT"),
        ("4/32b", "where: '4/32b' is no FORMAT"),
        ("4/32 ", "where: '4/32 ' is no FORMAT"),
        ("4/32k66", "where: '4/32k66' is no FORMAT"),
        ("16/32", "where: '16/32' is no FORMAT"),
        ("4/999999", "where: '4/999999' is no FORMAT"),
        ("4/-32", "where: '4/-32' is no FORMAT"),
        ("\u0664/32", "where: '\u0664/32' is no FORMAT"),  # an Arabic digit
        ("Q4F16_1", "where: 'Q4F16_1' is no FORMAT"),
        ("../q4f16_1", "where: '../q4f16_1' is no FORMAT"),
        ("x" * 500, "where: 'xxxx"),
        ("4/99999", "where: group is 99999, it must be a whole number, at most 1024"),
        ("7/32", "where: format: 7 bits; quantized formats have"),
        ("4/20", "where: format: group 20 is not a multiple of 8"),
        ("4/24k", "where: format: scale_bits: group 24 does not divide a block of 256"),
        ("4/rowk", "where: format: scale_bits: group row does not divide"),
        ("4/32k7", "where: format: scale_bits 7 is not one of"),
    ],
)
def test_what_is_none(text: str, error: str) -> None:
    with pytest.raises(SchemeError) as caught:
        format_of_text(text, F16, "where", uniform_format)
    assert str(caught.value).startswith(error)
    assert len(str(caught.value)) < 250 and "\n" not in str(caught.value)


def test_a_mapping_says_more_than_a_text() -> None:
    fields = {"bits": 4, "group": 32, "grid": "zero_point", "layout": "KN", "dtype": "float32"}
    found = format_of_dict(fields, F16, "x")
    assert found == WeightFormat(4, "float32", 32, "KN", "zero_point")
    assert text_of(found) == "4/32z"
    assert text_of(format_of_text("mxfp4", F16, "x", uniform_format)) == "mxfp4"
    fields = {"bits": 4, "group": 32, "zero": 8}
    assert format_of_dict(fields, F16, "x") == WeightFormat(4, F16, 32, zero=8)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (None, "x: None is neither 'float' nor a mapping"),
        ([4, 32], "x: [4, 32] is neither 'float' nor a mapping"),
        ({}, "x: bits is None, it must be a whole number"),
        ({"bits": 4}, "x: group is None, it must be"),
        ({"bits": 4, "group": 32, "scales": 4}, "x: unknown key 'scales' (did you mean 'scale_b"),
        ({"bits": 4, "group": 32, 3: 4}, "x: unknown key 3; allowed: bits, dtype, grid, group,"),
        ({"bits": 4, "group": 32, "zero": None}, "x: zero is None, it must be a whole number"),
        ({"bits": 4, "group": 32, "zero": 8.0}, "x: zero is 8.0, it must be"),
        ({"bits": 4, "group": 32, "scale_bits": True}, "x: scale_bits is True, it must be"),
        ({"bits": 4, "group": "column"}, "x: group is 'column', it must be"),
        ({"bits": 4, "group": 32, "grid": 3}, "x: grid 3 is no text"),
        ({"bits": 4, "group": 32, "dtype": "f16"}, "x: format: dtype 'f16' is not one of"),
    ],
)
def test_what_is_no_mapping(value: Any, error: str) -> None:
    with pytest.raises(SchemeError) as caught:
        format_of_dict(value, F16, "x")
    assert str(caught.value).startswith(error)
