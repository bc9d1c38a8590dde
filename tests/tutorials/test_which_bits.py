"""Tutorial 2: more bits are nearer to the original, and the page shows every artifact."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qcc.runtime.eval.figures import Figures
from qcc.runtime.eval.protocol import Text, Windows
from qcc.runtime.eval.report import Evaluation, Report
from qcc.tutorials import which_bits

NAMES = ["q8f16_1", "q4f16_k", "q3f16_k", "q2f16_k", "q2f16_k-gptq"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bits")


@pytest.fixture(scope="module")
def printed(out: Path, bundled: Path) -> Iterator[str]:
    """What the program prints on the bundled model."""
    pytest.importorskip("transformers", reason="gptq and the reference need transformers")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as text:
        patch.setattr(sys, "argv", ["which_bits", "--out", str(out)])
        which_bits.main()
    yield text.getvalue()


def rows(printed: str) -> dict[str, dict[str, float]]:
    """The printed table: artifact -> figures by the heads of their columns."""
    head, *lines = re.findall(r"^   (artifact .*|q\d\w+(?:-gptq)? .*%.*)$", printed, flags=re.M)
    names = head.split()[1:]
    found = {}
    for line in lines:
        name, *cells = line.split()
        numbers = [float(cell.strip("%").replace(",", "")) for cell in cells]
        found[name] = dict(zip(names, numbers, strict=True))
    return found


def test_more_bits_are_nearer(printed: str, out: Path) -> None:
    """KL divergence and same top-1 by bits; the sizes are those of the files; gptq beats mse."""
    found = rows(printed)
    assert list(found) == NAMES
    falling = NAMES[:4]
    for more, fewer in itertools.pairwise(falling):
        assert found[more]["KL"] * 2 < found[fewer]["KL"]
        assert found[more]["top-1"] > found[fewer]["top-1"]
        assert found[more]["bits"] > found[fewer]["bits"]
    assert found["q8f16_1"]["KL"] < 1e-3 < 0.05 < found["q2f16_k"]["KL"] < 0.5
    assert found["q2f16_k-gptq"]["KL"] < found["q2f16_k"]["KL"]
    assert found["q2f16_k-gptq"]["bits"] == found["q2f16_k"]["bits"]
    for name, figures in found.items():
        stored = sum(path.stat().st_size for path in (out / name).glob("params_shard_*.bin"))
        assert figures["MB"] == pytest.approx(stored / 1e6, abs=0.06)
        assert figures["bits"] == pytest.approx(8 * stored / 3_214_080, abs=0.006)


def test_page_is_self_contained(printed: str, out: Path) -> None:
    """One file that names every artifact and fetches nothing."""
    page = (out / "report.html").read_text(encoding="utf-8")
    assert str(out / "report.html") in printed
    for name in NAMES:
        assert f"{name}</td>" in page
    assert page.count("<svg") >= 3
    assert not re.findall(r"<(?:link|script|img|iframe)[^>]*(?:src|href)=", page)
    assert not re.findall(r"url\(|@import", page)


def report(*figures: tuple[str, float, float, float]) -> Report:
    """A report of (name, bits, mean KL, its standard error); top-1 and perplexity are fixed."""
    evaluations = []
    for name, bits, mean, se in figures:
        kl = {"mean": mean, "se": se, "median": mean, "p99": mean}
        part = Figures(100, 4.0, 5.0, kl, 0.75)
        evaluations.append(Evaluation(f"x/{name}", name, "mse", bits, 1, part))
    none: Any = ()
    windows = Windows(none, 8, None, none, 1, 0)
    return Report(tuple(evaluations), "r", Text("t", "0", ""), windows, {}, 0.0)


def test_findings() -> None:
    """The smallest whose divergence is below the bound by two standard errors; odd perplexity."""
    measured = report(("a", 8.5, 0.001, 0.0), ("b", 4.5, 0.01, 0.001), ("c", 3.5, 0.019, 0.001))
    first, *_, last = which_bits.findings(measured, 0.02)
    assert first == (
        "a: another likeliest token at 1 position in 4; yet its perplexity is below the original's"
    )
    assert last.endswith("is b, 4.50 bits a weight")
    assert which_bits.findings(measured, 0.0001)[-1].startswith("none has a KL divergence below")
    same = replace(measured.evaluations[0].figures, top1=1.0, perplexity=5.5)
    exact = replace(measured, evaluations=(replace(measured.evaluations[0], figures=same),))
    assert which_bits.findings(exact, 1.0)[0] == "a: another likeliest token at no position"
