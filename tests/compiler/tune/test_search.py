"""Effects and search on a stand-in for a model whose divergence is known, and what is written."""

from __future__ import annotations

import html.parser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from qcc.compiler.tune.effects import Effect, Unit, measure_effects, stored_bits
from qcc.compiler.tune.output import lines, page, scheme_data, scheme_text
from qcc.compiler.tune.search import Tuning, tune
from qcc.quant_schemes.format import WeightFormat
from qcc.quant_schemes.format_text import format_of_text, text_of
from qcc.quant_schemes.packing import dequantize_codes
from qcc.quant_schemes.rounding import mse
from qcc.quant_schemes.scheme import load_scheme, parse_scheme
from qcc.runtime.errors import QccError

SHAPES = {
    "model.embed_tokens.weight": (361, 64),
    "l.0.q_proj.weight": (64, 64),
    "l.0.k_proj.weight": (32, 64),
    "l.0.[0]*?.weight": (64, 172),
    "lm_head.weight": (361, 64),
}
TEXTS = ("2/16k", "3/32a", "4/32k", "5/32", "8/row")
FORMATS = [format_of_text(text, "float16", "", lambda _: None) for text in TEXTS]


class Fake:
    """Its divergence is known: of each weight a power of its squared error times its own factor.

    Their sum, and `crossed` times its square, which makes effects not add.
    """

    def __init__(self, crossed: float = 0.0, power: float = 1.0) -> None:
        rng = np.random.default_rng(0)
        self.weights = {
            name: (0.1 * rng.standard_t(5, shape)).astype(np.float32)
            for name, shape in SHAPES.items()
        }
        self.factor = dict(zip(SHAPES, (0.02, 1.0, 0.3, 4.0, 0.5), strict=True))
        self.now = dict(self.weights)
        self.crossed, self.power = crossed, power

    def replace(self, name: str, weights: Any) -> None:
        assert weights.shape == self.weights[name].shape
        self.now[name] = weights

    def restore(self, name: str) -> None:
        self.now[name] = self.weights[name]

    def divergence(self) -> float:
        parts = [
            self.factor[name]
            * float(((self.now[name] - w).astype(np.float64) ** 2).mean()) ** self.power
            for name, w in self.weights.items()
        ]
        return sum(parts) + self.crossed * sum(parts) ** 2

    def units(self) -> list[Unit]:
        roles = {"model.embed_tokens.weight": "embedding", "lm_head.weight": "lm_head"}
        return [
            Unit(name, shape, roles.get(name, "linear"), lambda name=name: self.weights[name])
            for name, shape in SHAPES.items()
        ]


def silent(_done: int, _total: int) -> None:
    pass


def effects_of(model: Fake, probed: list[WeightFormat] = FORMATS) -> list[list[Effect]]:
    return measure_effects(model.units(), FORMATS, probed, mse.quantize, model, silent)


def test_effects_are_measured_one_weight_at_a_time() -> None:
    """Bits, relative squared error and divergence by their definitions; the model is as before."""
    model, told = Fake(crossed=3.0), []
    found = measure_effects(
        *(model.units(), FORMATS, FORMATS, mse.quantize, model),
        lambda done, total: told.append((done, total)),
    )
    assert told == [(i + 1, 25) for i in range(25)]
    assert model.divergence() == 0
    for unit, effects in zip(model.units(), found, strict=True):
        w = model.weights[unit.name].astype(np.float64)
        for fmt, effect in zip(FORMATS, effects, strict=True):
            off = dequantize_codes(mse.quantize(w.astype(np.float32), fmt), fmt) - w
            assert effect.measured
            assert effect.bits == round(fmt.bits_per_weight(*unit.shape) * w.size)
            assert effect.error == pytest.approx((off**2).sum() / (w**2).sum(), rel=1e-4)
            alone = model.factor[unit.name] * (off**2).mean()
            assert effect.divergence == pytest.approx(alone + 3 * alone**2, rel=1e-3)


@pytest.mark.parametrize("power", [0.7, 1.0, 1.6])
def test_what_is_not_probed_is_a_power_of_the_error(power: float) -> None:
    """Here it is one, so that interpolation is exact; from one probe the power is taken as 1."""
    model = Fake(power=power)
    every = effects_of(model)
    for probed in ([FORMATS[0], FORMATS[2], FORMATS[4]], [FORMATS[2]], [FORMATS[0], FORMATS[1]]):
        if len(probed) == 1 and power != 1:
            continue
        some = effects_of(model, probed)
        for a, b in zip(every, some, strict=True):
            for fmt, x, y in zip(FORMATS, a, b, strict=True):
                assert y.measured == (fmt in probed)
                assert y.divergence == pytest.approx(x.divergence, rel=1e-3)


def run(model: Fake, bits: float, curve: bool = True) -> Tuning:
    units = model.units()
    weights = sum(n * k for n, k in SHAPES.values())
    return tune(
        *(units, FORMATS, effects_of(model), int(bits * weights), mse.quantize, model, silent),
        curve,
    )


@pytest.mark.parametrize("crossed", [0.0, 50.0])
@pytest.mark.parametrize("bits", [3.5, 4.2, 4.8, 6.0, 9.0])
def test_the_chosen_point(bits: float, crossed: float) -> None:
    """Within the target; better than uniform points of as many bits, where not all are the best."""
    model = Fake(crossed)
    found = run(model, bits)
    assert found.bits_per_weight(found.chosen) <= bits
    uniform = [p for p in found.points if p.label.startswith("uniform")]
    assert {p.label for p in uniform} == {f"uniform {text}" for text in TEXTS}
    below = [p for p in uniform if found.bits_per_weight(p) <= bits]
    assert all(found.chosen.divergence <= p.divergence for p in below)
    assert below
    if bits < 9:
        assert found.chosen.divergence < 0.9 * min(p.divergence for p in below)
    # The curve: nothing uniform lies under it.
    frontier = found.frontier()
    for p in uniform:
        assert min(q.divergence for q in frontier if q.bits <= p.bits) <= p.divergence
    assert [p.bits for p in frontier] == sorted(p.bits for p in frontier)
    # A point is what it says: replaced once more it has the same bits and divergence.
    units = model.units()
    for unit, pick in zip(units, found.chosen.picks, strict=True):
        fmt = FORMATS[pick]
        model.replace(unit.name, dequantize_codes(mse.quantize(unit.read(), fmt), fmt))
    assert model.divergence() == pytest.approx(found.chosen.divergence)
    picked = zip(units, found.chosen.picks, strict=True)
    assert found.chosen.bits == sum(stored_bits(FORMATS[i], u.shape) for u, i in picked)
    if not crossed:
        assert found.chosen.predicted == pytest.approx(found.chosen.divergence, rel=1e-6)


def test_without_the_curve_only_the_target_is_measured() -> None:
    found = run(Fake(), 4.6, curve=False)
    labels = [point.label for point in found.points]
    assert labels.count("tuned") == 1
    assert all(found.bits_per_weight(point) <= 4.6 for point in found.points)


def test_a_target_below_the_least() -> None:
    with pytest.raises(QccError) as caught:
        run(Fake(), 2.0)
    assert str(caught.value).startswith("the target is 2.00 bits a weight; with these formats the")
    least = sum(min(f.bits_per_weight(*s) for f in FORMATS) * s[0] * s[1] for s in SHAPES.values())
    least /= sum(n * k for n, k in SHAPES.values())
    assert str(caught.value).endswith(f"least is {least:.2f}")


def test_the_scheme_file_gives_the_same_formats(tmp_path: Path) -> None:
    """Also for a name with wildcards in it; the role decides for embedding and lm_head."""
    for bits in (3.6, 4.8, 7.0):
        found = run(Fake(), bits)
        data = scheme_data(found, load_scheme("q0f16"), "by a test")
        scheme = parse_scheme("tuned", yaml.safe_load(scheme_text(data)), "tuned.yaml")
        assert (scheme.dtype, scheme.method, scheme.description) == ("float16", "mse", "by a test")
        for unit, pick in zip(found.units, found.chosen.picks, strict=True):
            assert scheme.format_of(unit.name, role=unit.role) == FORMATS[pick], unit.name
        names = [([unit.name], unit.role, 2) for unit in found.units]
        scheme.check(names)


def test_fixed_entries_are_kept() -> None:
    """With embedding and lm_head given, their formats stand in the file."""
    model = Fake()
    units = [unit for unit in model.units() if unit.role == "linear"]
    effects = measure_effects(units, FORMATS, FORMATS, mse.quantize, model, silent)
    found = tune(units, FORMATS, effects, 10**6, mse.quantize, model, silent, curve=False)
    fixed = load_scheme("q0f16").changed(embedding="8/row")
    data = scheme_data(found, fixed, "x")
    scheme = parse_scheme("tuned", data, "x")
    assert text_of(scheme.embedding) == "8/row" and scheme.lm_head.is_float


class Elements(html.parser.HTMLParser):
    """Refuses tags that do not close in order; collects what would be loaded from elsewhere."""

    VOID = frozenset({"meta", "br", "hr", "img", "input", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.loaded += [
            str(value)
            for key, value in attrs
            if key in ("src", "href", "xlink:href") and not str(value).startswith(("#", "data:"))
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}>"


def test_the_page_is_whole_and_loads_nothing() -> None:
    found = run(Fake(), 4.6)
    text = page(found, "a <model> & more", "about & so on")
    reader = Elements()
    reader.feed(text)
    reader.close()
    assert not reader.open and not reader.loaded
    assert {"html", "svg", "table", "title"} <= set(reader.seen)
    assert "a &lt;model&gt; &amp; more" in text and "<model>" not in text
    assert "@import" not in text and "url(" not in text
    for unit, pick in zip(found.units, found.chosen.picks, strict=True):
        assert unit.name in text and TEXTS[pick] in text


def test_the_table_marks_what_was_chosen() -> None:
    found = run(Fake(), 4.6)
    rows = list(lines(found))
    assert [row for row in rows if "<- chosen" in row] == [
        f"  {found.bits_per_weight(found.chosen):13.3f}  {found.chosen.divergence:9.5f}  "
        f"{found.chosen.predicted:9.5f}  tuned  <- chosen"
    ]
    assert len(rows) == 1 + len(SHAPES) + 2 + len(found.points)
    assert any(row.endswith("uniform 4/32k") for row in rows)
