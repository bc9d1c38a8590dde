"""Flags of compile that cannot be: schemes, targets, processors, sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

FLAGS: list[tuple[list[object], str]] = [
    (["--quant", "q4f16_11"], "unknown scheme 'q4f16_11' (did you mean 'q4f16_1'?)"),
    (["--quant", "none.yaml"], "cannot read none.yaml: No such file"),
    (["--target", "cpuu"], "did you mean 'cpu'"),
    (["--target", "webgpu", "--mcpu", "skylake"], "a browser's library has neither"),
    (["--target", "webgpu", "--quant", "q4bf16_1"], "computes in bfloat16, which its kernels"),
    (["--mcpu", "sapphirerapid"], "close: sapphirerapids"),
    (["--mcpu", "x86-64-v3,sapphirerapid"], "--mcpu 'sapphirerapid' is not a processor"),
    (["--mcpu", ","], "--mcpu: no processor named; native, x86-64-v3, ..."),
    (["--triple", "riscv64-unknown-linux-gnu"], "supported processors are x86_64 and aarch64"),
    (["--context-window", "257"], "exceeds the 256 positions that the model has"),
    (["--context-window", "0"], "--context-window 0: must be 1 or more"),
    (["--prefill-chunk", "-1"], "--prefill-chunk -1: must be 1 or more"),
    (["--attention-sink", "4"], "--attention-sink needs a sliding window"),
    (
        ["--sliding-window", "16", "--attention-sink", "16"],
        "--attention-sink 16 must be below the sliding window 16",
    ),
    (["--context-window", "64", "--prefill-chunk", "65"], "exceeds the context window 64"),
]


@pytest.mark.parametrize(("flags", "text"), FLAGS, ids=[text[:40] for _, text in FLAGS])
def test_compile_refuses(refused: Any, flags: list[object], text: str) -> None:
    assert text in refused(*flags, verb="compile")


SCHEMES: list[tuple[str, str]] = [
    ("dtype: float16\nlinear: {bits: 4, grupp: 32}", "unknown key 'grupp' (did you mean 'group'?)"),
    ("dtype: float16\nliner: float", "unknown key 'liner' (did you mean 'linear'?)"),
    ("dtype: float12", "dtype is 'float12', allowed: float32"),
    ("dtype: float16\nlinear: {bits: 7, group: 32}", "7 bits; quantized formats have"),
    ("dtype: float16\nlinear: {bits: 4, group: 30}", "group 30 is not a multiple"),
    ("{", "is not readable as YAML"),
    ("- 1", "a scheme is a mapping"),
]


@pytest.mark.parametrize(("content", "text"), SCHEMES, ids=[text[:40] for _, text in SCHEMES])
def test_a_scheme_file(refused: Any, tmp_path: Path, content: str, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content, encoding="utf-8")
    found = refused("--quant", path)
    assert text in found and "mine.yaml" in found
