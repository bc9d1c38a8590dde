"""Figures against torch's own formulas in f64, window by window."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from qcc.runtime.errors import QccError
from qcc.runtime.eval import figures
from qcc.runtime.eval.figures import Collector

WIDTH = 50


def stream(seed: int, noise: float, widths: tuple[int, int] = (WIDTH, WIDTH)) -> list[Any]:
    """(ids, ours, reference) of three windows; what is beyond WIDTH is padding of large logits."""
    rng = np.random.default_rng(seed)
    found = []
    for length in (7, 12, 30):
        reference = 3 * rng.standard_normal((length, WIDTH))
        ours = reference + noise * rng.standard_normal((length, WIDTH))
        padded = [
            np.pad(x, ((0, 0), (0, width - WIDTH)), constant_values=40.0).astype(np.float32)
            for x, width in zip((ours, reference), widths, strict=True)
        ]
        found.append((rng.integers(0, WIDTH, length).tolist(), *padded))
    return found


def collected(windows: list[Any]) -> Collector:
    collector = Collector("ours")
    for ids, ours, reference in windows:
        collector.add(ids, ours, reference)
    return collector


def by_torch(windows: list[Any]) -> dict[str, Any]:
    """The same figures, by torch.nn.functional in f64."""
    import torch
    from torch.nn import functional

    kls, losses, theirs, same = [], [], [], []
    for ids, ours, reference in windows:
        q = torch.tensor(ours[:-1, :WIDTH], dtype=torch.float64)
        p = torch.tensor(reference[:-1, :WIDTH], dtype=torch.float64)
        next_ids = torch.tensor(ids[1:])
        losses.append(functional.cross_entropy(q, next_ids, reduction="none"))
        theirs.append(functional.cross_entropy(p, next_ids, reduction="none"))
        each = functional.kl_div(
            q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True
        )
        kls.append(each.sum(-1))
        same.append(q.argmax(-1) == p.argmax(-1))
    kl = torch.cat(kls)
    return {
        "kl": kl,
        "perplexity": torch.cat(losses).mean().exp().item(),
        "reference_perplexity": torch.cat(theirs).mean().exp().item(),
        "top1": torch.cat(same).double().mean().item(),
        "mean": kl.mean().item(),
        "se": kl.std(unbiased=True).item() / math.sqrt(len(kl)),
        "median": kl.quantile(0.5).item(),
        "p99": kl.quantile(0.99).item(),
    }


@pytest.mark.parametrize("noise", [1e-3, 0.5])
@pytest.mark.parametrize("widths", [(WIDTH, WIDTH), (WIDTH + 14, WIDTH), (WIDTH, WIDTH + 6)])
def test_figures_are_torchs(
    noise: float, widths: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one side's vocabulary is padded, and where a window is many blocks."""
    monkeypatch.setattr(figures, "BLOCK", 5 * WIDTH)
    windows = stream(1, noise, widths)
    found, wanted = collected(windows).figures(), by_torch(windows)
    assert found.kl is not None
    assert found.positions == 6 + 11 + 29
    for name in ("mean", "se", "median", "p99"):
        assert found.kl[name] == pytest.approx(wanted[name], rel=1e-9), name
    for name in ("perplexity", "reference_perplexity", "top1"):
        assert getattr(found, name) == pytest.approx(wanted[name], rel=1e-12), name


def test_the_same_logits_diverge_by_nothing() -> None:
    windows = [(ids, ours, ours) for ids, ours, _ in stream(2, 0.0)]
    found = collected(windows).figures()
    assert found.kl == {"mean": 0.0, "se": 0.0, "median": 0.0, "p99": 0.0}
    assert found.top1 == 1.0


def test_the_divergence_is_of_the_reference_from_ours() -> None:
    """KL(p || q) of p = (1/2, 1/2), q = (1/4, 3/4) is ln 2 - ln 3 / 2; KL(q || p) is another."""
    p, q = np.log([[0.5, 0.5]] * 2), np.log([[0.25, 0.75]] * 2)
    collector = Collector("ours")
    collector.add([0, 1], q.astype(np.float32), p.astype(np.float32))
    assert collector.kl[0] == pytest.approx(math.log(2) - math.log(3) / 2, rel=1e-6)


def test_perplexity_needs_no_reference() -> None:
    windows = stream(3, 0.5)
    collector = Collector("ours")
    for ids, ours, _ in windows:
        collector.add(ids, ours)
    found = collector.figures()
    assert found.perplexity == pytest.approx(by_torch(windows)["perplexity"], rel=1e-12)
    assert found.kl is None and "kl_divergence" not in found.as_dict()


def test_the_histogram_counts_every_position() -> None:
    found = collected(stream(4, 0.3)).figures()
    assert found.histogram is not None
    assert sum(found.histogram["counts"]) == found.positions
    kl = collected(stream(4, 0.3)).kl
    edges = np.array(found.histogram["edges"])
    middle = int((kl < 10 ** edges[20]).sum())
    assert sum(found.histogram["counts"][:20]) == middle


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused(bad: float) -> None:
    ids, ours, reference = stream(5, 0.1)[0]
    ours[2, 3] = bad
    with pytest.raises(QccError, match=r"ours: NaN or infinite logits"):
        Collector("ours").add(ids, ours, reference)
    with pytest.raises(QccError, match=r"the reference: NaN or infinite logits"):
        Collector("ours").add(ids, reference, ours)
