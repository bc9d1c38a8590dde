"""What the methods gain on the bundled model: KL divergence of transformers on our weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="module")
def halves(bundled: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Text to calibrate on, and other text of the same kind to measure on."""
    text = (bundled.parent / "heldout.txt").read_text(encoding="utf-8")
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(text[: len(text) // 2], encoding="utf-8")
    return path, text[len(text) // 2 :]


def test_methods_by_their_divergence(
    cli: Any, bundled: Path, halves: tuple[Path, str], on_our_weights: Any, hugging_face: Any,
    logits_of: Any, tmp_path: Path,
) -> None:  # fmt: skip
    """gptq is far better than mse at 3 bits, the embedding at 8; the text is written down."""
    from tokenizers import Tokenizer

    calibration, text = halves
    encode = Tokenizer.from_file(str(bundled / "tokenizer.json")).encode
    bos = json.loads((bundled / "config.json").read_text(encoding="utf-8"))["bos_token_id"]
    # Whole documents: the first is cut where the halves part.
    documents = [part.strip() for part in text.split("<|endoftext|>")[1:13]]
    windows = [[bos, *encode(part, add_special_tokens=False).ids][:128] for part in documents]
    assert sum(map(len, windows)) > 1000
    original = hugging_face(bundled)

    def log_p(model: Any) -> Any:
        rows = np.concatenate([logits_of(model, window) for window in windows]).astype("f8")
        return (
            rows
            - np.log(np.exp(rows - rows.max(1, keepdims=True)).sum(1, keepdims=True))
            - (rows.max(1, keepdims=True))
        )

    p = log_p(original)
    found = {}
    for method in ("mse", "gptq"):
        out = tmp_path / method
        ran = cli(
            *("convert", bundled, "-o", out, "--quant", "q4f16_k", "--set", "*=3/32a"),
            *("--embedding", "8/32", "--method", method, "--calib", calibration),
            *("--calib-tokens", 4096),
        )
        assert ran.status == 0, ran.err
        manifest = json.loads((out / "qcc.json").read_text(encoding="utf-8"))
        assert manifest["method"] == method
        if method == "gptq":
            digest = hashlib.sha256(calibration.read_bytes()).hexdigest()
            assert manifest["calibration"]["sha256"] == digest
        else:
            assert "calibration" not in manifest
        q = log_p(on_our_weights(out, bundled, ""))
        found[method] = float((np.exp(p) * (p - q)).sum(1).mean())
    assert found["gptq"] < 0.7 * found["mse"], found
