"""Flags of quantization that cannot be: rules, entries, methods, calibration text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

FORMAT = "is no FORMAT: bits/group as 4/32, 4/64a (asymmetric)"
FLAGS: list[tuple[list[str], str]] = [
    (["--set", "q_proj"], "--set 'q_proj': it takes RULE=FORMAT, as '*.v_proj.*=6/32a'"),
    (["--set", "=4/32"], "--set '=4/32': it takes RULE=FORMAT"),
    (["--set", "*.q_proj.*="], "--set '*.q_proj.*=': it takes RULE=FORMAT"),
    (["--set", "*.q_proj.*=4/33"], "--set *.q_proj.*: format: group 33 is not a multiple of 8"),
    (["--set", "*.q_proj.*=fuor"], f"--set *.q_proj.*: 'fuor' {FORMAT}"),
    (["--set", "*.q_proj.*=q3f16_km"], f"--set *.q_proj.*: 'q3f16_km' {FORMAT}"),
    (
        ["--set", "*.nope.*=4/32"],
        "rule '*.nope.*' matches no weight; the first are model.layers.0.s",
    ),
    (
        ["--set", "model.layers.0.mlp.donw_proj.weight=4/32"],
        "(did you mean 'model.layers.0.mlp.down_proj.weight'?)",
    ),
    (["--set", "*norm*=4/32"], "would quantize 'model.layers.0.input_layernorm.weight'; norms,"),
    (["--set", "*embed*=4/32"], "the embedding, which has an entry of its own: `embedding` in a"),
    (["--embedding", "8/33"], "--embedding: format: group 33 is not"),
    (["--embedding", ""], f"--embedding: '' {FORMAT}"),
    (["--lm-head", "banana"], f"--lm-head: 'banana' {FORMAT}"),
    (["--lm-head", "8/32"], "--lm-head: the model has no lm_head of its own, it multiplies by its"),
    (["--method", "gtpq"], "--method: unknown method 'gtpq' (did you mean 'gptq'?); allowed: awq,"),
    (["--method", ""], "--method: unknown method ''"),
    (["--calib-tokens", "0"], "--calib-tokens 0: must be 128 or more"),
    (["--calib-tokens", "-5", "--method", "imse"], "--calib-tokens -5: must be 128 or more"),
    (["--calib", "", "--method", "imse"], "--calib: give a FILE, or self"),
]


@pytest.mark.parametrize(("flags", "text"), FLAGS, ids=[" ".join(flags) for flags, _ in FLAGS])
def test_convert_refuses(refused: Any, flags: list[str], text: str) -> None:
    assert text in refused(*flags)


@pytest.mark.parametrize("quant", [["--method", "gptq"], ["--quant", "static"]])
@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "--calib {}: the file is empty; give text like what the model will see"),
        (b" \n ", "--calib {}: the file is empty"),
        (b"too short", "--calib {}: too short: 10 tokens in documents of more than 8; give at"),
        (b"\xff\xfeabc" * 99, "{}: not UTF-8 text: invalid start byte at byte 0"),
        (None, "{}: cannot read: No such file or directory"),
    ],
)
def test_calibration_text(
    refused: Any, static_scheme: str, tmp_path: Path, monkeypatch: Any, quant: list[str],
    content: bytes | None, text: str,
) -> None:  # fmt: skip
    """Before a library is built, which takes longer."""
    quant = [static_scheme if word == "static" else word for word in quant]
    monkeypatch.setattr("qcc.compiler.driver.build_library", None)
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    assert text.format(path) in refused(*quant, "--calib", path, verb="compile")


def test_text_that_no_method_reads_is_not_looked_for(cli: Any, broken: Path) -> None:
    """rtn needs none, and neither does gptq where nothing is quantized."""
    for flags in (["--method", "rtn"], ["--method", "gptq", "--quant", "q0f16"]):
        out = broken.with_name(f"by-{flags[1]}")
        ran = cli("convert", broken, "-o", out, "--calib", "none.txt", *flags)
        assert ran.status == 0, ran.err


def test_a_rule_of_a_scheme_file_that_matches_nothing(refused: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("dtype: float16\nlinear: 4/32\nrules: {'*.experts.*': 2/16k}\n")
    assert "mine: rule '*.experts.*' matches no weight" in refused("--quant", path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(
    refused: Any, change_tensors: Any, tmp_path: Path, bad: float
) -> None:
    """Whatever the method; calibration names the weight too."""
    (tmp_path / "text.txt").write_text("A fox jumps over a lazy dog. " * 60)
    name = "model.layers.1.mlp.up_proj.weight"

    def spoil(tensors: dict[str, Any]) -> None:
        tensors[name][3, 5] = bad

    change_tensors(spoil)
    for method in ("mse", "gptq"):
        text = refused("--method", method, "--calib", tmp_path / "text.txt", "--quant", "q4f16_a32")
        assert name in text or "gate_up_proj" in text, text
