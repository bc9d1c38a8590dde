"""FORMATS.md says what packing.py does: its table of parts, its example, its bits a weight."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcc.quant_schemes.format import WeightFormat
from qcc.quant_schemes.format_text import format_of_text
from qcc.quant_schemes.packing import Grid, Quantized, dequantize, store

TEXT = (Path(__file__).parents[2] / "tutorials" / "FORMATS.md").read_text(encoding="utf-8")
FORMATS = [
    *("4/32", "3/40", "5/16", "8/row", "2/tensor", "4/64a", "3/rowa", "6/16s", "2/16k", "4/32k"),
    *("5/64k8", "3/128s5"),
]
SIZES = [(3, 40), (2, 256), (1, 1000)]


def parsed(text: str) -> WeightFormat:
    return format_of_text(text, "float16", "test", lambda name: None)


def zero_points(bits: int, group: Any) -> WeightFormat:
    return WeightFormat(bits, "float16", group, grid="zero_point")


def applies(where: str, fmt: WeightFormat) -> bool:
    """Whether a format is of the kind that a row of the table is about."""
    sparse = (fmt.bits, fmt.group) == (3, 40)
    facts = {
        "3 bits, group 40": sparse,
        "else": not sparse,
        "one level": fmt.scale_bits is None,
        "two-level": fmt.two_level,
        "mxfp4": fmt.grid == "mxfp4",
        "asymmetric": fmt.grid == "asymmetric",
        "zero_point": fmt.grid == "zero_point",
    }
    return facts[where] if where in facts else all(facts[part] for part in where.split(", "))


@pytest.mark.parametrize(
    "fmt", [*map(parsed, [*FORMATS, "mxfp4"]), zero_points(4, 32), zero_points(3, "row")], ids=str
)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_table_of_parts(fmt: WeightFormat, n: int, k: int) -> None:
    """Names, order, dtypes and shapes of every part are those that are stored."""
    group = -(-k // 32) * 32 if isinstance(fmt.group, str) else fmt.group
    assert group is not None
    names = {
        **{"n": n, "k": k, "G": group, "g": -(-k // group), "b": fmt.bits, "c": fmt.scale_bits},
        **{"r": 1 if fmt.group == "tensor" else n, "ceil": math.ceil},
    }
    rows = re.findall(r"^\| (q_\w+) \| (.*?) \| (\w+) \| (\[.*?\]) \|$", TEXT, flags=re.M)
    assert len(rows) == 10
    said = [
        (part, tuple(eval(shape, {}, names)), fmt.dtype if dtype == "dtype" else dtype)
        for part, where, dtype, shape in rows
        if applies(where, fmt)
    ]
    assert said == [(part.suffix, part.shape, part.dtype) for part in fmt.stored(n, k)]


def example() -> dict[str, Any]:
    (block,) = re.findall(r"^```json\n(.*?)^```", TEXT, flags=re.M | re.S)
    found: dict[str, Any] = json.loads(block)
    return found


def test_example_is_what_is_stored() -> None:
    """The words and numbers of the example, and the weights that they stand for."""
    told = example()
    fmt = WeightFormat.from_dict(told["format"])
    halves = {key: np.array([[told[key]]], np.float16) for key in ("block_scale", "block_bias")}
    grid = Grid(
        np.array([told["scale"]], np.uint8), np.array([told["bias"]], np.uint8), None, **halves
    )
    parts = store(Quantized(np.array([told["codes"]], np.uint8), grid), fmt)
    shown = {
        name: [f"{x:08x}" if x.dtype == np.uint32 else float(x) for x in part[0]]
        for name, part in parts.items()
    }
    assert shown == told["stored"]
    weights = dequantize(parts, fmt, 1, len(told["codes"]))[0]
    assert {column: float(weights[int(column)]) for column in told["weights"]} == told["weights"]


def test_example_follows_from_the_text() -> None:
    """By the text alone, without packing.py: bit p is bit p mod 32 of word p // 32."""
    told = example()
    for codes, part, bits in (("codes", "q_weight", 2), ("scale", "q_scale", 4)):
        words = [int(word, 16) for word in told["stored"][part]]
        stream = sum(word << (32 * at) for at, word in enumerate(words))
        found = [stream >> (at * bits) & (2**bits - 1) for at in range(len(told[codes]))]
        assert found == told[codes]
        assert stream >> (bits * len(told[codes])) == 0
    for column, weight in told["weights"].items():
        group, q = int(column) // 16, told["codes"][int(column)]
        scale = told["scale"][group] * told["block_scale"]
        assert q * scale + told["bias"][group] * told["block_bias"] == weight


def test_bits_a_weight_in_the_text() -> None:
    """The four figures, for long rows."""
    (sentence,) = re.findall(r"So (4/32 has .*?)\. Short", TEXT, flags=re.S)
    said = re.findall(r"(\d/\d+\w?)(?: \(c = (\d)\))?(?: has)? ([\d.]+)", sentence)
    assert len(said) == 4
    for text, scale_bits, bits in said:
        fmt = parsed(text)
        assert str(fmt.scale_bits or "") == scale_bits
        assert fmt.bits_per_weight(4096, 4096) == float(bits)
