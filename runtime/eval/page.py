"""One self-contained HTML page of a report: no network, light and dark, tables that sort."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from qcc.runtime.eval.activations import HEAD, WORDS, ActivationFigures
from qcc.runtime.eval.html import cell, document, figure, table
from qcc.runtime.eval.plots import COLOURS, bars, curves, scatter
from qcc.runtime.eval.report import Evaluation, LayerFigures, Report, TensorFigures
from qcc.runtime.files import write_file

FLOOR = 1e-6  # a smaller KL divergence is drawn there: f32 itself makes no more


def write_page(path: Path, report: Report) -> None:
    """Write the page.

    Raises:
        QccError: the file cannot be written.
    """
    write_file(path, page(report))


def page(report: Report) -> str:
    """The page as HTML."""
    names = short_names(report)
    parts = [
        f"<header><h1>Quality of {escape(', '.join(names))}</h1>",
        f"<p>{escape(report.text.name)}, {report.windows.positions:,} positions in windows of "
        f"{report.windows.context:,} tokens. Reference: {escape(report.reference or 'none')}.</p>"
        "</header>",
        *_warnings(report, names),
        "<section><h2>Figures</h2>",
        _figures(report, names),
        "</section>",
        *_plots(report, names),
        *(
            part
            for item, name in zip(report.evaluations, names, strict=True)
            for part in _folded(item, name, len(names) == 1)
        ),
        *_protocol(report),
    ]
    return document(f"qcc eval: {', '.join(names)}", parts)


def short_names(report: Report) -> list[str]:
    """The folders' names; the whole paths where two are the same."""
    paths = [item.artifact for item in report.evaluations]
    names = [Path(path).resolve().name for path in paths]
    return names if len(set(names)) == len(names) else paths


def _warnings(report: Report, names: Sequence[str]) -> Iterable[str]:
    for item, name in zip(report.evaluations, names, strict=True):
        for text in item.warnings:
            yield f'<p class="warning"><b>{escape(name)}</b>: {escape(text)}</p>'


def _figures(report: Report, names: Sequence[str]) -> str:
    """The table of all artifacts, numbers to sort by in data-v."""
    with_kl = report.reference is not None
    head = ["artifact", "scheme", "method", "bits a weight", "without embedding", "MB"]
    head += ["perplexity"]
    head += ["KL mean (nats)", "± se", "median", "p99", "same top-1"] if with_kl else []
    rows = []
    for index, (item, name) in enumerate(zip(report.evaluations, names, strict=True)):
        figures, linear = item.figures, item.linear_bits
        cells = [
            f'<td><i class="key s{index % COLOURS}"></i>{escape(name)}</td>',
            f"<td>{escape(item.scheme)}</td><td>{escape(item.method)}</td>",
            cell(item.bits_per_weight, f"{item.bits_per_weight:.2f}"),
            cell(linear or 0.0, "-" if linear is None else f"{linear:.2f}"),
            cell(item.stored_bytes, f"{item.stored_bytes / 1e6:,.1f}"),
            cell(figures.perplexity, f"{figures.perplexity:.4f}"),
        ]
        if figures.kl is not None and figures.top1 is not None:
            kl = figures.kl
            cells += [cell(kl[key], f"{kl[key]:.3g}") for key in ("mean", "se", "median", "p99")]
            cells.append(cell(figures.top1, f"{figures.top1:.2%}"))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    theirs = report.evaluations[0].figures.reference_perplexity
    note = "" if theirs is None else f"<p>Perplexity of the reference: {theirs:.4f}.</p>"
    return table(head, rows, words=3) + note


def _plots(report: Report, names: Sequence[str]) -> Iterable[str]:
    pairs = list(zip(report.evaluations, names, strict=True))
    found = []
    points = [
        (name, item.bits_per_weight, item.figures.kl["mean"], item.figures.kl["se"])
        for item, name in pairs
        if item.figures.kl is not None
    ]
    if points:
        found.append(
            figure(
                "KL divergence and size",
                scatter(points, "bits a weight, all told", "mean KL divergence (nats)", FLOOR),
                "Bars are one standard error. Lower and further left is better; less than "
                f"{FLOOR:g} is drawn at {FLOOR:g}.",
            )
        )
        found.append(
            figure(
                "Where the divergence is",
                _distribution(pairs),
                "Share of the positions by their own KL divergence; less than 2e-8 is not drawn.",
                names,
            )
        )
    theirs = report.evaluations[0].figures.reference_perplexity
    rows = [(name, item.figures.perplexity) for item, name in pairs]
    found.append(figure("Perplexity", bars(rows, theirs, "reference"), "Lower is better, from 0."))
    layered = [(item, name) for item, name in pairs if item.layers]
    if layered:
        found.append(
            figure(
                "Activations against the original's",
                _layer_curves(layered),
                "Mean relative error of the residual stream after each layer.",
                [name for _, name in layered],
            )
        )
    yield f'<section class="plots">{"".join(found)}</section>'


def _distribution(pairs: Sequence[tuple[Evaluation, str]]) -> str:
    series = []
    for item, name in pairs:
        histogram = item.figures.histogram
        assert histogram is not None, "figures with a KL divergence have its histogram"
        edges, counts = histogram["edges"], histogram["counts"]
        xs = [10 ** ((a + b) / 2) for a, b in itertools.pairwise(edges)]
        # The first bin holds all that is smaller: of q0f32 everything.
        series.append((name, xs[1:], [100 * count / sum(counts) for count in counts[1:]]))
    return curves(series, "KL divergence of a position (nats)", "% of positions", log_x=True)


def _layer_curves(pairs: Sequence[tuple[Evaluation, str]]) -> str:
    rows = [layer.name for layer in pairs[0][0].layers[:-1]]
    ticks = [_tick(name) for name in rows]
    series = [
        (name, [float(i) for i in range(len(item.layers) - 1)], [x.mean for x in item.layers[:-1]])
        for item, name in pairs
    ]
    return curves(series, "after layer", "relative error", log_y=True, names=ticks)


def _tick(name: str) -> str:
    """embedding -> emb, "layer 12 and norm" -> 12."""
    words = name.split()
    return words[1] if words[0] == "layer" else "emb"


def _folded(item: Evaluation, name: str, alone: bool) -> Iterable[str]:
    """The details of an artifact, open only where it is the only one."""
    if item.layers or item.tensors or item.activations:
        yield f"<details{' open' if alone else ''}><summary>{escape(name)}: details</summary>"
        yield from _details(item, name)
        yield "</details>"


def _details(item: Evaluation, name: str) -> Iterable[str]:
    """What is known of one artifact's precision, weights and layers."""
    if item.activations:
        yield f"<section><h2>{escape(name)}: what low precision costs</h2>"
        yield f"<p>{escape('; '.join(item.activations.notes()))}.</p>"
        yield _activation_table(item.activations)
        yield "</section>"
    if item.layers:
        yield f"<section><h2>{escape(name)}: layers</h2>"
        for text in item.findings:
            bad = ' class="warning"' if text.startswith(("WRONG", "WEIGHTS")) else ""
            yield f"<p{bad}>{escape(text)}</p>"
        yield _layer_table(item.layers)
        yield "</section>"
    if item.tensors:
        yield f"<section><h2>{escape(name)}: weights</h2>"
        if item.tensors[0].share is not None:
            yield (
                "<p>KL divergence of the original with this weight alone replaced by ours, and its "
                "share of the sum over all weights.</p>"
            )
        yield _tensor_table(item.tensors)
        yield "</section>"


def _activation_table(activations: ActivationFigures) -> str:
    rows = []
    for row in activations.rows():
        texts = row.cells()
        words = "".join(f"<td>{escape(text)}</td>" for text in texts[:WORDS])
        numbers = zip(row.values(), texts[WORDS:], strict=True)
        rows.append(f"<tr>{words}{''.join(cell(*number) for number in numbers)}</tr>")
    return table(HEAD, rows, words=WORDS)


def _layer_table(layers: Sequence[LayerFigures]) -> str:
    head = ["after", "mean", "worst position", "kernels: mean", "kernels: worst position"]
    rows = []
    for index, layer in enumerate(layers):
        figures = (layer.mean, layer.worst, layer.kernel_mean, layer.kernel_worst)
        cells = "".join(cell(value, f"{value:.2e}") for value in figures)
        rows.append(f'<tr><td data-v="{index}">{escape(layer.name)}</td>{cells}</tr>')
    note = (
        "<p>Relative error of the activations: against the original; kernels: against transformers "
        "on our own dequantized weights, where only a wrong kernel departs.</p>"
    )
    return table(head, rows, words=1) + note


def _tensor_table(tensors: Sequence[TensorFigures]) -> str:
    measured = tensors[0].share is not None
    head = ["weight", "format", "shape", "bits", "relative error"]
    head += ["KL (nats)", "share"] if measured else []
    if measured:
        top = max(tensor.share or 0.0 for tensor in tensors)
        order = sorted(tensors, key=lambda tensor: -(tensor.share or 0.0))
    else:
        top = max(tensor.error for tensor in tensors)
        order = sorted(tensors, key=lambda tensor: -tensor.error)
    rows = []
    for tensor in order:
        shape = ", ".join(map(str, tensor.shape))
        value = (tensor.share or 0.0) if measured else tensor.error
        bar = f'<i class="share" style="width:{100 * value / (top or 1.0):.1f}%"></i>'
        error = "" if measured else bar
        cells = [
            f"<td><code>{escape(tensor.name)}</code></td><td>{escape(tensor.format)}</td>",
            f"<td>[{shape}]</td>",
            cell(tensor.bits, f"{tensor.bits:.2f}"),
            cell(tensor.error, f"{tensor.error:.4f}{error}", raw=True),
        ]
        if tensor.kl is not None and tensor.share is not None:
            cells.append(cell(tensor.kl, f"{tensor.kl:.3g}"))
            cells.append(cell(tensor.share, f"{tensor.share:.1%}{bar}", raw=True))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return table(head, rows, words=3)


def _protocol(report: Report) -> Iterable[str]:
    yield "<section><h2>How it was measured</h2><ul>"
    yield from (f"<li>{escape(line)}</li>" for line in report.windows.describe())
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    facts = [
        ("text", report.text.name),
        ("sha256", report.text.sha256),
        ("reference", report.reference or "none: perplexity alone"),
        ("versions", versions),
        ("time", f"{report.seconds:.0f} s"),
    ]
    yield "</ul><dl>"
    yield from (f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    yield "</dl></section>"
