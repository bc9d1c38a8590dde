"""The parts of a self-contained HTML page: the document, figures, tables that sort."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from qcc.runtime.eval.plots import COLOURS
from qcc.runtime.eval.style import SCRIPT, STYLE


def document(title: str, parts: Iterable[str]) -> str:
    """A page of these parts, HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main><script>{SCRIPT}</script></body></html>\n"
    )


def figure(title: str, picture: str, caption: str, legend: Sequence[str] = ()) -> str:
    """A picture under a title, with a legend in the order of the colours, and a caption."""
    keys = "".join(
        f'<span><i class="key s{index % COLOURS}"></i>{escape(name)}</span>'
        for index, name in enumerate(legend)
    )
    legend_text = f'<p class="legend">{keys}</p>' if keys else ""
    return (
        f"<figure><h2>{escape(title)}</h2>{picture}{legend_text}"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def table(head: Sequence[str], rows: Sequence[str], words: int) -> str:
    """A table that sorts by a click on a column; the first `words` columns are no numbers."""
    cells = "".join(
        f'<th class="{"word" if at < words else "number"}"><button>{escape(name)}</button></th>'
        for at, name in enumerate(head)
    )
    return (
        f'<div class="wide"><table><thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def cell(value: float, text: str, raw: bool = False) -> str:
    """A number: its value to sort by, and its text (HTML where `raw`)."""
    return f'<td class="number" data-v="{value!r}">{text if raw else escape(text)}</td>'
