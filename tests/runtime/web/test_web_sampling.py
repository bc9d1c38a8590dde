"""The page's sampling chooses what the Python runtime chooses, bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcc.runtime.engine.sampling import Sampler, SamplingParams, candidates, pick
from qcc.runtime.errors import QccError

Ask = Callable[[str, Any], Any]
VOCABULARIES = (361, 1024, 1025, 8193, 151936)


@pytest.fixture(scope="module")
def same_exp() -> None:
    """Skip where NumPy's exp of float32 is not the one of x86-64 with AVX2."""
    from numpy._core._multiarray_umath import __cpu_features__ as features

    if not (features.get("AVX2") and features.get("FMA3")):
        pytest.skip("NumPy computes exp of float32 otherwise on a processor without AVX2")


def digest(values: Any) -> str:
    """The md5 of an array's bytes."""
    return hashlib.md5(np.ascontiguousarray(values).tobytes()).hexdigest()


def some_logits(folder: Path, index: int) -> tuple[Path, Any]:
    """(file, float32[V]): flat and steep, with ties, with tokens that are ruled out."""
    rng = np.random.default_rng(index)
    logits = rng.normal(0, [0.01, 1, 4, 30][index % 4], VOCABULARIES[index % 5])
    logits = logits.astype(np.float32)
    if index % 3 == 0:
        logits = np.round(logits * 4) / 4  # many ties
    if index % 7 == 0:
        logits[rng.integers(0, len(logits), len(logits) // 2)] = -np.inf
    if index % 11 == 0:
        logits *= np.float32(1e6)
    path = folder / f"{index}.f32"
    logits.tofile(path)
    return path, logits


def test_the_generator_is_numpys(ask: Ask) -> None:
    """Seeds of one word to many."""
    seeds = [0, 1, 42, 2**31, 2**32, 2**53 + 1, 2**64 - 1, 2**128 + 12345, 2**200 + 7]
    wanted = [np.random.default_rng(seed).random(5).tolist() for seed in seeds]
    assert ask("random", [str(seed) for seed in seeds]) == wanted


def test_products_are_added_with_one_rounding(ask: Ask) -> None:
    """Where the sum lies a hair beside the middle of two float32, too."""
    rng = np.random.default_rng(7)
    triples = rng.normal(0, 1, (200, 3)).astype(np.float32).astype(np.float64)
    ulp = 2.0**-23
    hairs = [
        [sign * 2.0**-24 * (1 + ulp), 1 + other * ulp, sign * (1 + odd * ulp)]
        for sign in (1, -1)
        for other in (-1, 1)
        for odd in range(4)
    ]
    wanted = []
    for a, b, c in (cases := [*triples.tolist(), *hairs]):
        exact = Fraction(a) * Fraction(b) + Fraction(c)
        near = np.float32(float(exact))
        around = [np.nextafter(near, np.float32(x)) for x in (-np.inf, np.inf)]
        wanted.append(float(min([near, *around], key=lambda x: abs(Fraction(float(x)) - exact))))
    assert ask("fma", cases) == wanted


@pytest.mark.usefixtures("same_exp")
def test_exp_is_numpys(ask: Ask, tmp_path: Path) -> None:
    """Every kind of float32 from -inf to 0, those whose exp is subnormal too."""
    rng = np.random.default_rng(0)
    spread = [-rng.random(300_000) * scale for scale in (1e-6, 1, 20, 110)]
    patterns = rng.integers(0x80000000, 0xC2F00000, 500_000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([*spread, patterns, [0, -np.inf, -103.9, -104, -1e30]])
    values = values.astype(np.float32)
    values.tofile(tmp_path / "x")
    assert ask("exp", str(tmp_path / "x")) == digest(np.exp(values))


def test_sums_are_numpys(ask: Ask, tmp_path: Path) -> None:
    """Sums in float64, in NumPy's order."""
    rng = np.random.default_rng(1)
    paths, wanted = [], []
    for size in (1, 7, 8, 9, 127, 128, 129, 1000, 8191, 8192, 8193, 16500, 151936):
        values = np.exp(rng.normal(0, 12, size)).astype(np.float32)
        paths.append(str(tmp_path / str(size)))
        values.tofile(paths[-1])
        wanted.append(float(values.sum(dtype=np.float64)))
    assert [float(total) for total in ask("sums", paths)] == wanted


@pytest.mark.usefixtures("same_exp")
def test_candidates_and_draws(ask: Ask, tmp_path: Path) -> None:
    """What top-k, top-p and min-p leave, with which probabilities, and what numbers draw of it."""
    rng = np.random.default_rng(2)
    cases, wanted = [], []
    for index in range(120):
        path, logits = some_logits(tmp_path, index)
        settings = {
            "temperature": float(rng.choice([1, 0.7, 0.1, 1.9, 1e-35])),
            "top_k": int(rng.choice([0, 1, 5, 40, 1000])),
            "top_p": float(rng.choice([1, 0.95, 0.5, 0.999999, 1e-6])),
            "min_p": float(rng.choice([0, 0, 0.05, 0.5])),
        }
        ids, probs = candidates(logits, *settings.values())
        # Draws between two tokens show in which order NumPy adds.
        sums = probs.cumsum(dtype=np.float64)
        ends = sums[1023::1024][:9, None] + np.spacing(sums[-1]) * np.arange(-8, 9)
        between = np.clip(
            np.concatenate([sums[rng.integers(0, len(sums), 99)], ends.ravel()]), 0, None
        )
        between = between / sums[-1]
        uniforms = [0.0, 1 - 2**-53, *rng.random(20).tolist(), *np.minimum(between, 1 - 2**-53)]
        picks = [int(ids[pick(probs, u)]) for u in uniforms]
        cases.append({"path": str(path), "uniforms": uniforms, **settings})
        found = {"count": len(ids), "ids": int(ids.sum()), "probs": digest(probs)}
        wanted.append({**found, "picks": picks})
    assert ask("candidates", cases) == wanted


@pytest.mark.usefixtures("same_exp")
def test_choices(ask: Ask, tmp_path: Path) -> None:
    """Whole answers with penalties, biases and a seed: the same tokens."""
    rng = np.random.default_rng(3)
    cases, wanted = [], []
    for index in range(60):
        vocabulary = int(rng.choice([50, 361, 5000]))
        logits = rng.normal(0, 2, (30, vocabulary)).astype(np.float32)
        path = tmp_path / f"{index}.f32"
        logits.tofile(path)
        params: dict[str, Any] = {
            "temperature": float(rng.choice([0, 0.8, 1, 1.3])),
            "top_p": float(rng.choice([1, 0.9])),
            "top_k": int(rng.choice([0, 30])),
            "presence_penalty": float(rng.choice([0, 0.7, -1.3])),
            "frequency_penalty": float(rng.choice([0, 0.3, 1.1])),
            "repetition_penalty": float(rng.choice([1, 1.1, 0.83])),
            "seed": int(rng.integers(0, 2**53)),
        }
        if index % 2:
            biases = zip(rng.integers(0, vocabulary, 4), [5.0, -100.0, 0.1, 1.0], strict=True)
            params["logit_bias"] = {int(token): bias for token, bias in biases}
        prompt = rng.integers(0, vocabulary, 12).tolist()
        sampler = Sampler(SamplingParams(**params), prompt, vocabulary)
        wanted.append([sampler(row) for row in logits])
        cases.append({"path": str(path), "rows": 30, "prompt": prompt, "params": params})
    assert ask("choices", cases) == wanted


def test_options_are_refused_alike(ask: Ask) -> None:
    """What Python refuses the page refuses, and takes what Python takes."""
    cases: list[dict[str, Any]] = [
        *({"temperature": value} for value in (-1, 0, 2.5, "hot")),
        *({"top_p": value} for value in (0, 1, 1.5)),
        *({"top_k": value} for value in (-2, -1, 3, 2.5)),
        *({"seed": value} for value in (-1, 0, 2**40)),
        *({"presence_penalty": value} for value in (-2, 2.01)),
        *({"max_tokens": value} for value in (-1, 0)),
        {"repetition_penalty": 0},
        {"min_p": 1.1},
        {"stop": ["a", ""]},
        {"stop": "a"},
        {"logit_bias": {"3": "much"}},
        {"stop_token_ids": [-1]},
    ]

    def refused(options: dict[str, Any]) -> bool:
        bias = {int(token): value for token, value in options.get("logit_bias", {}).items()}
        try:
            SamplingParams(**{**options, "logit_bias": bias})
        except QccError:
            return True
        return False

    found = ask("refusals", cases)
    assert [bool(text) for text in found] == [refused(options) for options in cases]
    assert found[0] == "temperature -1: must be 0 (greedy) or more"
    assert "no option heat" in ask("refusals", [{"heat": 1}])[0]
