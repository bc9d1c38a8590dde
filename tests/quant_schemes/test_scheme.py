"""Schemes and formats: what a file may say, and the text of what it may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcc.quant_schemes.errors import SchemeError
from qcc.quant_schemes.scheme import WeightFormat, list_schemes, load_scheme, parse_scheme


@pytest.mark.parametrize("name", list_schemes())
def test_a_shipped_scheme_loads(name: str) -> None:
    scheme = load_scheme(name)
    assert scheme.name == name
    dtype = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}[name[2:].split("_")[0]]
    linear = scheme.format_of("model.layers.3.mlp.down_proj.weight", role="linear")
    assert {scheme.dtype, linear.dtype, scheme.embedding.dtype} == {dtype}
    assert linear.is_float == name.startswith("q0")
    assert scheme.format_of("model.norm.weight", role="linear", ndim=1) == scheme.float_format
    assert scheme.format_of("x.q_proj.bias", role="linear") == scheme.float_format
    assert scheme.format_of("router.weight", role="float") == scheme.float_format


def test_q4f16_2_leaves_embedding_and_lm_head_floating() -> None:
    scheme = load_scheme("q4f16_2")
    assert scheme.embedding.is_float and scheme.lm_head.is_float
    assert not load_scheme("q4f16_1").embedding.is_float


def test_stored_shapes_at_a_tail() -> None:
    fmt = WeightFormat(3, "float16", 40, "KN")
    q_weight, q_scale = fmt.stored(6, 100)
    assert (q_weight.suffix, q_weight.shape, q_weight.dtype) == ("q_weight", (12, 6), "uint32")
    assert (q_scale.suffix, q_scale.shape, q_scale.dtype) == ("q_scale", (3, 6), "float16")
    assert q_weight.nbytes == 12 * 6 * 4
    assert fmt.bits_per_weight() == pytest.approx(3.6)
    assert WeightFormat(4, "float16", 32).bits_per_weight() == 4.5
    assert WeightFormat(8, "float32", 32).bits_per_weight() == 9.0
    assert WeightFormat(16, "bfloat16").stored(2, 3)[0].nbytes == 12


def test_the_largest_group() -> None:
    assert WeightFormat(4, "float16", 65536).num_groups(100) == 1
    with pytest.raises(SchemeError, match="group 65544; the largest is 65536"):
        WeightFormat(4, "float16", 65544)


@pytest.mark.parametrize("fmt", [WeightFormat(4, "float16", 32, "KN"), WeightFormat(32, "float32")])
def test_a_format_survives_its_dict(fmt: WeightFormat) -> None:
    assert WeightFormat.from_dict(fmt.as_dict()) == fmt


def test_the_first_rule_that_matches_wins() -> None:
    data = {
        "dtype": "float16",
        "linear": {"bits": 4, "group": 32},
        "rules": {"*.down_proj.weight": {"bits": 8, "group": 32}, "*.0.*": "float"},
    }
    scheme = parse_scheme("mine", data, "mine.yaml")
    assert scheme.format_of("layers.0.mlp.down_proj.weight", role="linear").bits == 8
    assert scheme.format_of("layers.0.mlp.up_proj.weight", role="linear").is_float
    assert scheme.format_of("layers.1.mlp.up_proj.weight", role="linear").bits == 4


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ([], "a scheme is a mapping"),
        ({"dtype": "float8"}, "dtype is 'float8', allowed: float32, float16, bfloat16"),
        ({"dtype": "float16", "liner": 1}, "unknown key 'liner' (did you mean 'linear'?)"),
        ({"dtype": "float16", "rules": []}, "rules maps wildcards"),
        ({"dtype": "float16", "linear": 4}, "linear: 4 is neither 'float' nor a mapping"),
        ({"dtype": "float16", "linear": {"bits": "4", "group": 32}}, "bits is '4', it must be a"),
        ({"dtype": "float16", "linear": {"bits": 4, "group": 30}}, "not a multiple of the 8 codes"),
        ({"dtype": "float16", "linear": {"bits": 7, "group": 32}}, "7 bits; quantized formats"),
        (
            {"dtype": "float16", "linear": {"bits": 4, "group": 32, "layout": "NN"}},
            "layout 'NN' is not one of NK, KN",
        ),
        ({"dtype": ["a"]}, "dtype is ['a'], allowed"),
        ({"dtype": "float16", "linear": {"bits": 4, "group": 10**33}}, "group is 1000"),
        ({"dtype": "float16", "linear": {"bits": 4, "group": 16**9000}}, "group is a huge number"),
        ({"dtype": "float16", "linear": {"bits": 4, "group": 2.0}}, "group is 2.0, it must be a"),
        ({"dtype": "float16", "linear": {"bits": True, "group": 32}}, "bits is True, it must be"),
        ({"dtype": "float16", "linear": {"bits": 4, "group": 32, "layout": [1]}}, "layout [1] is"),
        ({"dtype": "float16", "rules": {16**9000: "float"}}, "rules[a huge number] is no wildcard"),
        ({"dtype": "float16", "rules": {"a\nb": 3}}, "rules['a\\nb']: 3 is neither"),
        ({"dtype": "float16", 16**9000: 1}, "unknown key a huge number; allowed"),
        ({"dtype": "x" * 9999}, "xxx...xxx"),
    ],
)
def test_a_wrong_scheme_is_one_line(data: object, text: str) -> None:
    with pytest.raises(SchemeError) as caught:
        parse_scheme("mine", data, "mine.yaml")
    assert text in str(caught.value)
    assert str(caught.value).startswith("mine.yaml")
    assert "\n" not in str(caught.value)


def test_wrong_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match=r"unknown scheme 'q4f16_3' \(did you mean 'q4f16_"):
        load_scheme("q4f16_3")
    with pytest.raises(SchemeError, match=r"cannot read .*none\.yaml: No such file"):
        load_scheme(str(tmp_path / "none.yaml"))
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [")
    with pytest.raises(SchemeError, match="is not readable as YAML"):
        load_scheme(str(bad))
    for text in ("x: 2001-99-99", "x: " + "9" * 5000, "x: " + "[" * 5000, "x: 0b", "x: !!set"):
        bad.write_text(text)
        with pytest.raises(SchemeError) as caught:
            load_scheme(str(bad))
        assert str(bad) in str(caught.value) and "\n" not in str(caught.value)
    bomb = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    bad.write_text("\n".join([*bomb, "dtype: *a39"]))
    with pytest.raises(SchemeError, match="unknown key 'a0'"):
        load_scheme(str(bad))
    bad.write_text("\n".join(["description:", *(f"  {line}" for line in bomb), "dtype: *a39"]))
    with pytest.raises(SchemeError, match="dtype is "):
        load_scheme(str(bad))
    good = tmp_path / "mine.yaml"
    good.write_text("dtype: float32\nlinear: {bits: 3, group: 40, layout: KN}\n")
    assert load_scheme(str(good)).rules[-1][1] == WeightFormat(3, "float32", 40, "KN")
