"""Tutorial 3: what the YAML asks for is what is stored, and the refusals are those it speaks of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qcc.tutorials import add_a_scheme

FLOAT: dict[str, Any] = {"bits": 16, "dtype": "float16", "layout": "NK"}
EMBEDDING: dict[str, Any] = {**FLOAT, "bits": 8, "group": 32}


def two_level(bits: int) -> dict[str, Any]:
    """The format that qcc.json has for BITS/32k."""
    return {**FLOAT, "bits": bits, "group": 32, "grid": "asymmetric", "scale_bits": 6}


def wanted(name: str) -> dict[str, Any]:
    """The format of a stored tensor by the scheme of the tutorial, read by a human."""
    if "norm" in name:
        return FLOAT
    if "embed_tokens" in name:
        return EMBEDDING
    if ".layers.0." in name:
        return two_level(6)
    return two_level(5 if "v_proj" in name.replace("qkv_proj", "") or "down" in name else 4)


def test_the_scheme_is_what_is_stored(
    tmp_path: Path, bundled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every tensor's format in qcc.json, the text that it tells, its divergence, its refusals."""
    report = add_a_scheme.tutorial(tmp_path)
    told = capsys.readouterr().out
    manifest = json.loads((tmp_path / "artifact" / "qcc.json").read_text(encoding="utf-8"))
    tensors = manifest["tensors"]
    assert tensors == {name: wanted(name) for name in tensors}
    assert sum("v_proj" in name and "qkv" not in name for name in tensors) == 4 * 5
    assert manifest["scheme"] == "mixed" and manifest["method"] == "mse"

    (item,) = report.evaluations
    assert f"{item.bits_per_weight:6.3f} bits a weight" in told
    assert item.figures.kl is not None and 1e-4 < item.figures.kl["mean"] < 0.008
    assert (tmp_path / "mixed.yaml").read_text(encoding="utf-8") in told
    assert "every weight has the same format: yes" in told
    assert "Once upon a time, there was a" in told
    for rule, reason in zip(
        add_a_scheme.REFUSED,
        ("matches no weight", "norms, biases and routers stay floating", "an entry of its own"),
        strict=True,
    ):
        (line,) = [line for line in told.splitlines() if line.startswith(f"   --set '{rule}=")]
        assert reason in line
