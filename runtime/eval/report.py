"""The report: figures of one or several artifacts on one text, as text lines and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qcc.runtime.eval.activations import HEAD, WORDS, ActivationFigures
from qcc.runtime.eval.figures import Figures
from qcc.runtime.eval.protocol import Text, Windows

SHOWN_TENSORS = 12  # lines of a table in the terminal; JSON and the page have all


@dataclass(frozen=True)
class TensorFigures:
    """A quantized weight against the original.

    `error` is ||W - W'|| / ||W|| (Frobenius), `bits` are those a weight, scales included. `kl` is
    the KL divergence (nats) of the original with this weight alone replaced, `share` its part of
    the sum over all weights; None where that was not measured.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    bits: float
    error: float
    kl: float | None = None
    share: float | None = None


@dataclass(frozen=True)
class LayerFigures:
    """How far our activations after a layer are from a reference, relative to its norm.

    Of the residual stream at each position: `mean` and `worst` against the original's, and
    `kernel_mean`, `kernel_worst` against transformers on our own dequantized weights, where only
    the order of summation differs.
    """

    name: str
    mean: float
    worst: float
    kernel_mean: float
    kernel_worst: float


@dataclass(frozen=True)
class Evaluation:
    """The figures of one artifact. `bits_per_weight` counts all stored bytes, `linear_bits` those
    of linear layers only (no embedding, no norms); None where the original is not at hand."""

    artifact: str
    scheme: str
    method: str
    bits_per_weight: float
    stored_bytes: int
    figures: Figures
    linear_bits: float | None = None
    tensors: tuple[TensorFigures, ...] = ()
    layers: tuple[LayerFigures, ...] = ()
    findings: tuple[str, ...] = ()  # what --layers says
    activations: ActivationFigures | None = None
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The JSON object of this artifact."""
        found: dict[str, Any] = {
            **self.figures.as_dict(),
            "artifact": self.artifact,
            "scheme": self.scheme,
            "method": self.method,
            "bits_per_weight": self.bits_per_weight,
            "linear_bits_per_weight": self.linear_bits,
            "stored_bytes": self.stored_bytes,
            "warnings": list(self.warnings),
        }
        if self.tensors:
            found["tensors"] = [asdict(item) for item in self.tensors]
        if self.layers:
            found["layers"] = [asdict(item) for item in self.layers]
            found["findings"] = list(self.findings)
        if self.activations is not None:
            found["activations"] = self.activations.as_dict()
        return found


@dataclass(frozen=True)
class Report:
    """Several artifacts on one text, with one reference (None: perplexity alone)."""

    evaluations: tuple[Evaluation, ...]
    reference: str | None
    text: Text
    windows: Windows
    versions: Mapping[str, str]
    seconds: float
    notes: tuple[str, ...] = field(default=())

    def common(self) -> dict[str, Any]:
        """What all artifacts share."""
        return {
            "reference": self.reference,
            "tokens": self.windows.tokens,
            "text": {"name": self.text.name, "sha256": self.text.sha256},
            "protocol": self.windows.as_dict(),
            "versions": dict(self.versions),
            "seconds": self.seconds,
        }

    def quality(self, index: int = 0) -> dict[str, Any]:
        """The object that qcc.json keeps under `quality`: one artifact's figures."""
        return {**self.evaluations[index].as_dict(), **self.common()}

    def as_dict(self) -> dict[str, Any]:
        """The object of --json: the first artifact's figures, and all under `artifacts`."""
        each = [item.as_dict() for item in self.evaluations]
        return {**each[0], **self.common(), "artifacts": each}

    def lines(self) -> Iterable[str]:
        """The report for a terminal."""
        yield f"text         {self.text.name} (sha256 {self.text.sha256[:16]}...)"
        for number, line in enumerate(self.windows.describe()):
            yield f"{'' if number else 'protocol':<13}{line}"
        yield f"reference    {self.reference or 'none: perplexity alone (--against MODEL)'}"
        yield ""
        yield from _table([item.as_dict() for item in self.evaluations])
        theirs = self.evaluations[0].figures.reference_perplexity
        if theirs is not None:
            yield f"perplexity of the reference: {theirs:.4f}"
        for item in self.evaluations:
            # Of several artifacts the comparison shall stay on the screen.
            yield from _details(item, len(self.evaluations) == 1)
        for item in self.evaluations:
            yield from (f"warning: {item.artifact}: {text}" for text in item.warnings)
        yield from (f"note: {text}" for text in self.notes)


def quality_lines(quality: Mapping[str, Any]) -> list[str]:
    """The stored report of an artifact (`Report.quality`) for `qcc show`."""
    text, protocol = quality["text"], quality["protocol"]
    lines = [
        f"  text           {text['name']} (sha256 {text['sha256'][:16]}...), "
        f"{quality['positions']:,} positions in windows of {protocol['context']:,} tokens",
        f"  reference      {quality['reference'] or 'none'}",
        f"  perplexity     {quality['perplexity']:.4f}",
    ]
    if kl := quality.get("kl_divergence"):
        lines[-1] += f" (reference {quality['reference_perplexity']:.4f})"
        lines.append(
            f"  KL divergence  {kl['mean']:.5g} +- {kl['se']:.2g} (median {kl['median']:.3g}, "
            f"p99 {kl['p99']:.3g}) nats"
        )
        lines.append(f"  same top-1     {quality['top1']:.2%}")
    return lines + [f"  warning: {text}" for text in quality.get("warnings", ())]


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """Aligned figures, a line an artifact."""
    with_kl = rows[0].get("kl_divergence") is not None
    head = ["artifact", "scheme", "method", "bits", "linear", "perplexity"]
    head += ["KL mean", "se", "median", "p99", "top-1"] if with_kl else []
    cells = [head]
    for row in rows:
        linear = row["linear_bits_per_weight"]
        line = [row["artifact"], row["scheme"], row["method"], f"{row['bits_per_weight']:.2f}"]
        line += ["-" if linear is None else f"{linear:.2f}", f"{row['perplexity']:.4f}"]
        if with_kl:
            kl = row["kl_divergence"]
            line += [f"{kl[key]:.3g}" for key in ("mean", "se", "median", "p99")]
            line += [f"{row['top1']:.2%}"]
        cells.append(line)
    yield from _aligned(cells, left=3)


def _aligned(cells: Sequence[Sequence[str]], left: int) -> Iterable[str]:
    """Columns, the first `left` of them flush left."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        padded = [
            cell.ljust(width) if at < left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        yield "  ".join(padded).rstrip()


def _details(item: Evaluation, alone: bool) -> Iterable[str]:
    """The tables of one artifact: low precision, its worst tensors where measured or `alone`, its
    layers."""
    if item.activations is not None:
        yield ""
        yield f"{item.artifact}: what low precision costs"
        rows = [HEAD, *(row.cells() for row in item.activations.rows())]
        yield from _aligned([[f"  {first}", *rest] for first, *rest in rows], left=WORDS)
        yield from (f"  {text}" for text in item.activations.notes())
    measured = bool(item.tensors) and item.tensors[0].share is not None
    if item.tensors and (measured or alone):
        order = sorted(item.tensors, key=lambda t: -((t.share or 0.0) if measured else t.error))
        yield ""
        what = "share of the damage" if measured else "relative error"
        yield f"{item.artifact}: weights by {what}" + (
            f", the first {SHOWN_TENSORS} of {len(order)}" if len(order) > SHOWN_TENSORS else ""
        )
        head = ["  weight", "format", "bits", "error", *(["KL", "share"] if measured else [])]
        cells = [head]
        for tensor in order[:SHOWN_TENSORS]:
            line = [f"  {tensor.name}", tensor.format, f"{tensor.bits:.2f}", f"{tensor.error:.4f}"]
            if tensor.kl is not None and tensor.share is not None:
                line += [f"{tensor.kl:.3g}", f"{tensor.share:.1%}"]
            cells.append(line)
        yield from _aligned(cells, left=2)
    if item.layers:
        yield ""
        yield f"{item.artifact}: relative error of the activations, layer by layer"
        cells = [["  after", "mean", "worst", "kernels: mean", "kernels: worst"]]
        for layer in item.layers:
            figures = (layer.mean, layer.worst, layer.kernel_mean, layer.kernel_worst)
            cells.append([f"  {layer.name}", *(f"{value:.2e}" for value in figures)])
        yield from _aligned(cells, left=1)
        yield "  mean, worst: against the original; kernels: against transformers on our weights"
        yield from (f"  {text}" for text in item.findings)
