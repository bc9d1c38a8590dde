"""SVG pictures for the report page: plain strings, coloured by the page's CSS (classes s0..s7)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 320
LEFT, RIGHT, TOP, BOTTOM = 72, 20, 16, 44
COLOURS = 8


@dataclass(frozen=True)
class Axis:
    """A range of values on a range of pixels; `log` axes are in decades."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value, clipped to the range."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = (math.log10(max(v, 1e-300)) for v in (value, low, high))
        share = (min(max(value, low), high) - low) / (high - low)
        return self.begin + share * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """Round values in the range, about five."""
        if self.log:
            first, last = round(math.log10(self.low)), round(math.log10(self.high))
            step = max(1, -(-(last - first) // 6))
            return [10.0**power for power in range(first, last + 1, step)]
        span = self.high - self.low
        size = 10.0 ** math.floor(math.log10(span / 4))
        size *= next(m for m in (1, 2, 5, 10) if span / (size * m) <= 6)
        first = math.ceil(self.low / size - 1e-9)
        return [n * size for n in range(first, math.floor(self.high / size + 1e-9) + 1)]


def decades(values: Sequence[float], floor: float) -> tuple[float, float]:
    """Powers of ten around positive values; what is below `floor` counts as it."""
    logs = [math.log10(max(value, floor)) for value in values]
    low, high = math.floor(min(logs)), math.ceil(max(logs))
    return 10.0**low, 10.0 ** max(high, low + 1)


def scatter(
    points: Sequence[tuple[str, float, float, float]], x_name: str, y_name: str, floor: float
) -> str:
    """(label, x, y, error of y) each as a dot with its bar and label, y in decades."""
    xs = [point[1] for point in points]
    room = max(0.5, 0.12 * (max(xs) - min(xs)))
    x = Axis(max(0.0, min(xs) - room), max(xs) + 2 * room, LEFT, WIDTH - RIGHT)
    low, high = decades([v for _, _, y, e in points for v in (y - e, y + e) if v > 0], floor)
    y = Axis(low, high, HEIGHT - BOTTOM, TOP, log=True)
    body = []
    taken: list[tuple[float, float]] = []
    order = sorted(range(len(points)), key=lambda i: points[i][2])
    for index in order:
        label, across, up, error = points[index]
        px, py = x.at(across), y.at(up)
        colour = f"s{index % COLOURS}"
        top, bottom = y.at(up + error), y.at(max(up - error, low))
        body.append(f'<path class="{colour} line" d="M{px:.1f} {top:.1f}V{bottom:.1f}"/>')
        title = f"<title>{escape(label)}: {up:.4g} at {across:.2f} bits</title>"
        body.append(
            f'<circle class="{colour} dot" cx="{px:.1f}" cy="{py:.1f}" r="5">{title}</circle>'
        )
        flip = px > WIDTH - RIGHT - 7 * len(label)
        ty = py + 4
        while any(abs(ty - v) < 14 and abs(px - u) < 110 for u, v in taken):
            ty -= 14
        taken.append((px, ty))
        tx, anchor = (px - 9, "end") if flip else (px + 9, "start")
        body.append(
            f'<text x="{tx:.1f}" y="{ty:.1f}" text-anchor="{anchor}">{escape(label)}</text>'
        )
    return _frame(x, y, x_name, y_name, body)


def curves(
    series: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    x_name: str,
    y_name: str,
    log_x: bool = False,
    log_y: bool = False,
    names: Sequence[str] | None = None,
) -> str:
    """(label, xs, ys) each as a line; `names`: of the xs 0, 1, ... instead of numbers."""
    every_x = [v for _, xs, _ in series for v in xs]
    every_y = [v for _, _, ys in series for v in ys if math.isfinite(v) and (v > 0 or not log_y)]
    x_range = decades(every_x, 1e-12) if log_x else (min(every_x), max(every_x))
    y_range = decades(every_y or [1.0], 1e-9) if log_y else (0.0, max([*every_y, 1e-9]) * 1.05)
    x = Axis(*x_range, LEFT, WIDTH - RIGHT, log_x)
    y = Axis(*y_range, HEIGHT - BOTTOM, TOP, log_y)
    body = []
    for index, (label, xs, ys) in enumerate(series):
        steps = [f"{x.at(a):.1f} {y.at(b):.1f}" for a, b in zip(xs, ys, strict=True)]
        body.append(
            f'<path class="s{index % COLOURS} line curve" d="M{"L".join(steps)}">'
            f"<title>{escape(label)}</title></path>"
        )
    return _frame(x, y, x_name, y_name, body, names)


def bars(rows: Sequence[tuple[str, float]], mark: float | None, mark_name: str) -> str:
    """(label, value) as horizontal bars from 0, with a line at `mark`."""
    pitch = min(max((HEIGHT - 40) / len(rows), 26.0), 56.0)
    thick = min(0.7 * pitch, 26.0)
    top = max([value for _, value in rows] + ([mark] if mark else [])) * 1.12
    x = Axis(0, top, 170, WIDTH - RIGHT - 40)
    body = []
    for index, (label, value) in enumerate(rows):
        at = pitch * index + (pitch - thick) / 2
        line = at + thick / 2 + 4
        body.append(
            f'<text x="162" y="{line:.1f}" text-anchor="end">{escape(shortened(label, 24))}</text>'
            f'<rect class="s{index % COLOURS} bar" x="170" y="{at:.1f}" rx="3" '
            f'width="{x.at(value) - x.begin:.1f}" height="{thick:.1f}"/>'
            f'<text x="{x.at(value) + 6:.1f}" y="{line:.1f}">{value:.3f}</text>'
        )
    end = pitch * len(rows) + 4
    if mark:
        px = x.at(mark)
        body.append(
            f'<path class="mark" d="M{px:.1f} 2V{end:.1f}"/><text class="quiet" x="{px:.1f}" '
            f'y="{end + 16:.1f}" text-anchor="middle">{escape(mark_name)} {mark:.3f}</text>'
        )
    return _svg(WIDTH, end + 30, body)


def shortened(text: str, length: int) -> str:
    """At most so many characters; the end of a name tells most."""
    return text if len(text) <= length else f"…{text[1 - length :]}"


def _frame(
    x: Axis,
    y: Axis,
    x_name: str,
    y_name: str,
    body: Sequence[str],
    names: Sequence[str] | None = None,
) -> str:
    """Axes, grid and names around a picture."""
    base = HEIGHT - BOTTOM
    found = []
    for value in y.ticks():
        py = y.at(value)
        found.append(f'<path class="grid" d="M{LEFT} {py:.1f}H{WIDTH - RIGHT}"/>')
        found.append(
            f'<text class="quiet" x="{LEFT - 8}" y="{py + 4:.1f}" text-anchor="end">'
            f"{_number(value)}</text>"
        )
    ticks = [float(n) for n in range(len(names))] if names else x.ticks()
    every = max(1, -(-len(ticks) // 10))
    for at, value in enumerate(ticks):
        if at % every:
            continue
        text = names[at] if names else _number(value)
        px = x.at(value)
        found.append(f'<path class="grid" d="M{px:.1f} {base}v4"/>')
        found.append(
            f'<text class="quiet" x="{px:.1f}" y="{base + 18}" text-anchor="middle">'
            f"{escape(text)}</text>"
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    found.append(
        f'<text class="quiet" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{escape(x_name)}</text>"
        f'<text class="quiet" transform="translate(14 {(TOP + base) / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_name)}</text>'
    )
    return _svg(WIDTH, HEIGHT, [*found, *body])


def _svg(width: float, height: float, body: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" xmlns="http://www.w3.org/2000/svg">'
        f"{''.join(body)}</svg>"
    )


def _number(value: float) -> str:
    """Few characters: 0.001, 25, 1e-5."""
    text = f"{value:.0e}" if 0 < value < 1e-3 else f"{value:.3g}"
    return text.replace("e-0", "e-")
