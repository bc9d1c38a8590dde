"""qcc eval against transformers in fp32 on weights that this folder's own reader dequantized."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CONTEXT = 64
TEXT = "the quick brown fox jumps over the lazy dog, " * 6 + "</s>a second document, shorter."


def expected_windows(folder: Path) -> list[list[int]]:
    """BOS (1) and 63 tokens, by hand; the tokenizer has a token a byte and no merges."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = []
    for document in TEXT.split("</s>"):
        ids = tokenizer.encode(document.strip(), add_special_tokens=False).ids
        parts = [[1, *ids[at : at + CONTEXT - 1]] for at in range(0, len(ids), CONTEXT - 1)]
        found += [part for part in parts if len(part) > 8]
    return found


def by_transformers(original: Any, ours: Any, windows: list[list[int]], logits_of: Any) -> Any:
    """KL divergence of every position f64[positions], and the perplexity of ours."""
    import torch

    kls, losses = [], []
    for ids in windows:
        p = torch.from_numpy(logits_of(original, ids)[:-1]).double().log_softmax(-1)
        q = torch.from_numpy(logits_of(ours, ids)[:-1]).double().log_softmax(-1)
        kls.append((p.exp() * (p - q)).sum(-1))
        losses.append(-q[range(len(ids) - 1), ids[1:]])
    return torch.cat(kls).numpy(), float(torch.cat(losses).mean().exp())


@pytest.mark.parametrize("scheme", ["q4f16_1", "q3f16_1"])
def test_figures_are_those_of_transformers_on_our_weights(
    scheme: str,
    checkpoint: Any,
    compiled: Any,
    on_our_weights: Any,
    contract: Any,
    hugging_face: Any,
    logits_of: Any,
    cli: Any,
    tmp_path: Path,
) -> None:
    """To 1e-4: both sum in f32, in another order. The per-tensor errors as well."""
    model = checkpoint("llama")
    artifact = compiled(model, scheme).artifact.folder
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    saved = tmp_path / "logits.npz"
    ran = cli(
        *("eval", artifact, "--against", model, "--text", tmp_path / "t.txt"),
        *("--context", CONTEXT, "--precision", "high", "--json", "--save-logits", saved),
    )
    assert ran.status == 0, ran.err
    found = json.loads(ran.out.splitlines()[-1])
    windows = expected_windows(model)
    ours = on_our_weights(artifact, model, scheme)
    kl, perplexity = by_transformers(hugging_face(model), ours, windows, logits_of)
    figures = found["kl_divergence"]
    assert found["positions"] == len(kl) and found["tokens"] == sum(map(len, windows))
    assert figures["mean"] == pytest.approx(kl.mean(), rel=1e-4)
    assert figures["se"] == pytest.approx(kl.std(ddof=1) / math.sqrt(len(kl)), rel=1e-3)
    assert figures["median"] == pytest.approx(np.median(kl), rel=1e-3)
    assert figures["p99"] == pytest.approx(np.quantile(kl, 0.99), rel=1e-3)
    assert found["perplexity"] == pytest.approx(perplexity, rel=1e-4)
    assert found["kl_divergence"]["mean"] > 1e-3, "nothing was measured"
    # What was saved gives the same figures again.
    with np.load(saved) as logits:
        assert int(logits["windows"]) == len(windows)
        again = []
        for index, ids in enumerate(windows):
            assert logits[f"tokens_{index}"].tolist() == ids
            p, q = (_log_softmax(logits[f"{side}_{index}"][:-1]) for side in ("reference", "ours"))
            again.append((np.exp(p) * (p - q)).sum(1))
    assert np.concatenate(again).mean() == pytest.approx(figures["mean"], rel=1e-9)
    # Each weight's relative error, from the other reader.
    fmt = contract.formats[scheme]
    names = [tensor["name"] for tensor in found["tensors"]]
    originals = contract.float_weights(hugging_face(model), names)
    widths = {name: array.shape[1] for name, array in originals.items()}
    dequantized = contract.dequantized(artifact, fmt, widths)
    assert set(names) == {n for n, a in dequantized.items() if a.ndim == 2}
    for tensor in found["tensors"]:
        w, ours_w = (x[tensor["name"]].astype(np.float64) for x in (originals, dequantized))
        error = np.linalg.norm(w - ours_w) / np.linalg.norm(w)
        assert tensor["error"] == pytest.approx(error, rel=1e-5), tensor["name"]


def _log_softmax(logits: Any) -> Any:
    x = logits.astype(np.float64)
    return x - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)) - x.max(1)[:, None]


@pytest.mark.parametrize("kind", ["babyllama", "bundled"])
def test_floating_weights_diverge_by_less_than_a_millionth(
    kind: str, compiled: Any, cli: Any, request: pytest.FixtureRequest
) -> None:
    """What our kernels in f32 make of a real model is transformers' own; perplexity too."""
    if kind == "babyllama":
        shared = request.getfixturevalue("shared")
        model = shared / "models/babyllama-tok361"
        text = shared / "text/tinystories_valid_excerpt.txt"
    else:
        model = request.getfixturevalue("bundled")
        text = model.parent / "heldout.txt"
    artifact = compiled(model, "q0f32").artifact.folder
    ran = cli(
        *("eval", artifact, "--against", model, "--text", text, "--json"),
        *("--reference", "transformers", "--max-tokens", 4068, "--precision", "high"),
    )
    assert ran.status == 0, ran.err
    found = json.loads(ran.out.splitlines()[-1])
    assert 0 < found["kl_divergence"]["mean"] < 1e-6
    assert found["kl_divergence"]["p99"] < 1e-6
    assert found["perplexity"] == pytest.approx(found["reference_perplexity"], rel=1e-6)
    assert found["reference"].startswith("transformers ")
