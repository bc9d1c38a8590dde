"""What is kept of an imported checkpoint's codes: the stored parts of a weight, and notes.

A weight is kept if all its sources have the format that is asked for, or one that differs only in
how scales are held: the two levels of a K-quant may be multiplied out, exactly in f32, rounded in
f16 and bf16. Anything else is quantized anew from the numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from qcc.compiler.weights.checkpoint import Checkpoint
from qcc.compiler.weights.spec import WeightSpec
from qcc.quant_schemes.format import WeightFormat
from qcc.quant_schemes.packing import (
    Array,
    Grid,
    Quantized,
    dequantize_codes,
    float_dtype,
    store,
)
from qcc.runtime.errors import QccError

MEASURED_ROWS = 256  # of a tensor, by which the error of rounded scales is measured


def imported_parts(checkpoint: Checkpoint, spec: WeightSpec) -> Mapping[str, Array] | None:
    """The stored parts of a weight with the codes of the checkpoint; None: convert its numbers.

    Raises:
        QccError: a scale is NaN, infinite, or out of range of the format.
    """
    if not _is_kept(checkpoint, spec):
        return None
    weight = Quantized.concatenate(
        [_held(checkpoint, source.name, spec.format) for source in spec.sources]
    )
    if spec.transform is not None:
        weight = _rows(weight, _row_order(spec))
    for numbers in (weight.grid.scale, weight.grid.bias):
        if numbers is not None and not np.isfinite(numbers).all():
            raise QccError(
                f"{spec.name}: a scale is beyond the range of {spec.format.dtype}; choose float32 "
                "scales, or the file's own format (no --quant)"
            )
    return store(weight, spec.format)


@dataclass
class _Tally:
    """What becomes of the tensors of one type."""

    kept: int = 0
    anew: int = 0
    rounded: int = 0
    why: set[str] = field(default_factory=set)


def import_notes(
    checkpoint: Checkpoint, specs: Sequence[WeightSpec], calibrated: str | None = None
) -> list[str]:
    """One line each: which codes are kept, what rounding their scales does, what is made anew.

    `calibrated` names a method that chooses the codes of all but the embedding by a text.
    """
    tallies: dict[str, _Tally] = {}
    formats: Counter[str] = Counter()
    error = total = 0.0
    for spec in specs:
        chosen = calibrated is not None and spec.role != "embedding"
        keeps = _is_kept(checkpoint, spec) and not chosen
        for source in spec.sources:
            origin = checkpoint.origin(source.name)
            if origin is None or (origin.format is None and origin.near is None):
                continue  # floating
            tally = tallies.setdefault(origin.kind, _Tally())
            if keeps:
                tally.kept += 1
                formats[f"{origin.kind} as {_described(spec.format)}"] += 1
                if _is_rounded(origin.format, spec.format):
                    tally.rounded += 1
                    added = _rounding(checkpoint, source.name, spec.format)
                    error, total = error + added[0], total + added[1]
            elif not spec.format.is_float:
                tally.anew += 1
                tally.why.add(
                    f"{calibrated} chooses codes anew"
                    if chosen
                    else origin.why or f"{_described(spec.format)} is asked for"
                )
    notes = []
    if formats:
        named = ", ".join(f"{count} {what}" for what, count in formats.most_common())
        notes.append(f"codes kept: tensors {named}")
    if rounded := {kind: t.rounded for kind, t in tallies.items() if t.rounded}:
        notes.append(
            f"scales rounded: tensors {_counts(rounded)}; a relative RMS error of "
            f"{(error / max(total, 1e-300)) ** 0.5:.1e} (two-level and float32 scales are exact)"
        )
    if anew := {kind: t.anew for kind, t in tallies.items() if t.anew}:
        reasons = [f"{kind}: {', '.join(sorted(tallies[kind].why))}" for kind in anew]
        notes.append(
            f"warning: requantized, which loses quality: tensors {_counts(anew)} "
            f"({'; '.join(reasons)})"
        )
    return notes


def _counts(of_kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in of_kinds.items())


def _described(fmt: WeightFormat) -> str:
    """A format in short: 4 bits, group 32, asymmetric, 6-bit scales under float16."""
    if fmt.grid == "mxfp4":
        return "[mxfp4]"
    words = [f"{fmt.bits} bits"]
    words.append(f"group {fmt.group}" if isinstance(fmt.group, int) else f"one scale a {fmt.group}")
    words.append(fmt.grid.replace("_", " "))
    scales = f"{fmt.scale_bits}-bit scales under " if fmt.two_level else ""
    return f"[{', '.join([*words, scales + fmt.dtype])}]"


def _is_kept(checkpoint: Checkpoint, spec: WeightSpec) -> bool:
    """Whether the sources' codes serve `spec.format`, and its transform only moves rows."""
    if spec.format.is_float or len(spec.shape) != 2:
        return False
    formats = [checkpoint.format(source.name) for source in spec.sources]
    if any(fmt is None or not _serves(fmt, spec.format) for fmt in formats):
        return False
    return spec.transform is None or _row_order(spec) is not None


def _serves(own: WeightFormat, asked: WeightFormat) -> bool:
    """Whether codes of format `own` are codes of `asked`, scales aside."""
    held = replace(own, layout=asked.layout, dtype=asked.dtype)
    if own.grid == "mxfp4":
        return asked == held
    return asked in (held, replace(held, scale_bits=None))


def _is_rounded(own: WeightFormat | None, asked: WeightFormat) -> bool:
    """Whether `asked`, which `own` serves, holds scales with fewer digits."""
    assert own is not None
    return (
        asked.dtype != "float32"
        and own.grid != "mxfp4"
        and (asked.dtype, asked.scale_bits)
        != (
            own.dtype,
            own.scale_bits,
        )
    )


def _held(checkpoint: Checkpoint, name: str, asked: WeightFormat) -> Quantized:
    """A tensor's codes with its scales as `asked` holds them."""
    own, found = checkpoint.format(name), checkpoint.quantized(name)
    assert own is not None
    if own.grid == "mxfp4":
        return found
    dtype, grid = float_dtype(asked.dtype), found.grid
    with np.errstate(over="ignore"):  # what becomes infinite is refused
        if not own.two_level:
            bias = None if grid.bias is None else grid.bias.astype(dtype)
            return Quantized(found.codes, Grid(grid.scale.astype(dtype), bias, grid.zero))
        if asked.two_level:
            assert grid.block_scale is not None
            bias = None if grid.block_bias is None else grid.block_bias.astype(dtype)
            blocks = grid.block_scale.astype(dtype)
            return Quantized(found.codes, Grid(grid.scale, grid.bias, None, blocks, bias))
        scale, bias = grid.numbers(own)
        kept_bias = bias.astype(dtype) if asked.grid == "asymmetric" else None
        return Quantized(found.codes, Grid(scale.astype(dtype), kept_bias))


def _rounding(checkpoint: Checkpoint, name: str, asked: WeightFormat) -> tuple[float, float]:
    """Sums of squares over some rows: of what rounded scales change, and of the weights."""
    own, exact = checkpoint.format(name), checkpoint.quantized(name)
    assert own is not None
    n = len(exact.codes)
    some = np.linspace(0, n - 1, min(n, MEASURED_ROWS)).astype(int)
    before = dequantize_codes(_rows(exact, some), own).astype(np.float64)
    after = dequantize_codes(_rows(_held(checkpoint, name, asked), some), asked)
    scale = n / len(some)
    return scale * float(((after - before) ** 2).sum()), scale * float((before**2).sum())


def _row_order(spec: WeightSpec) -> Array | None:
    """From which row of the sources each row of the weight comes; None: it is no matter of rows."""
    assert spec.transform is not None
    n, k = spec.stacked_shape
    order = spec.transform(np.broadcast_to(np.arange(n, dtype=np.int32)[:, None], (n, k)))
    return order[:, 0] if (order == order[:, :1]).all() else None


def _rows(weight: Quantized, order: Array | None) -> Quantized:
    """A weight's rows in another order, or some of them."""
    assert order is not None
    grid = weight.grid
    parts = (grid.scale, grid.bias, grid.zero, grid.block_scale, grid.block_bias)
    return Quantized(
        weight.codes[order],
        Grid(*(None if part is None else part[order] for part in parts)),  # type: ignore[arg-type]
    )
