"""choose_codes: which codes are given before the conversion, and which method makes the others.

Codes are given by a calibration, whose finished weights lie in the cache until the artifact is
whole, so that an interrupted run goes on; or by the tool that the checkpoint comes from.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcc.compiler.imports.parts import imported_parts
from qcc.compiler.options import MIN_TOKENS, Calibration
from qcc.compiler.output_folder import locked
from qcc.compiler.steps import Steps, duration
from qcc.compiler.weights.checkpoint import Checkpoint
from qcc.compiler.weights.convert import Given
from qcc.compiler.weights.spec import INPUT_SCALE, WeightSpec
from qcc.quant_schemes.packing import Array
from qcc.quant_schemes.rounding.method import Method, find_method
from qcc.runtime.errors import QccError
from qcc.runtime.eval.protocol import read_text
from qcc.runtime.files import cache_dir

KEPT_DAYS = 7  # of weights that an interrupted run finished
# Rounds what a calibration leaves alone: the embedding.
WITHOUT_TEXT = "mse"
CONTEXT = 2048  # tokens of a window of calibration text at most
# Tokens where the user names none, of models with fewer weights and of others: on two cores a
# billion weights take a quarter of an hour for 8,000 tokens.
SMALL, TOKENS, FEWER_TOKENS = 100_000_000, 65536, 16384


@dataclass(frozen=True)
class Codes:
    """What convert_weights takes; `text` is the calibration text as qcc.json names it."""

    method: Method
    given: Given
    text: Mapping[str, Any] | None = None
    work: Path | None = None

    def forget(self) -> None:
        """Remove the finished weights: the artifact has them now."""
        if self.work is not None:
            shutil.rmtree(self.work, ignore_errors=True)


def check_text(
    name: str,
    folder: Path,
    specs: Sequence[WeightSpec],
    calibration: Calibration,
    max_positions: int,
) -> None:
    """Refuse a text file that `choose_codes` could not use, before anything is built.

    Raises:
        QccError: as `text_of_file`; or no text calibrates the model.
    """
    if calibration.tokens is not None and calibration.tokens < MIN_TOKENS:
        raise QccError(f"--calib-tokens {calibration.tokens}: must be {MIN_TOKENS} or more")
    if not str(calibration.text):
        raise QccError("--calib: give a FILE, or self")
    if not _wants_text(find_method(name), specs):
        return
    if reason := why_no_text(specs):
        raise QccError(
            f"{folder}: {reason}; use a method without text (--method rtn, mse or hqq) and no "
            "static scales of activations"
        )
    if calibration.text != "self":
        from qcc.compiler.calibrate.text import text_of_file

        context = min(max_positions, CONTEXT)
        text_of_file(folder, calibration.text, context, _tokens(specs, calibration))


def why_no_text(specs: Sequence[WeightSpec]) -> str | None:
    """Why no text chooses the codes of a model with these weights; None: one may."""
    if any(spec.whole for spec in specs):
        return "a mixture of experts is not calibrated, as few tokens of a text reach each of them"
    # A tensor of which two weights are made: their inputs are not those of its layer.
    users = Counter(source.name for spec in specs for source in spec.sources)
    for name, count in users.most_common(1):
        if count > 1:
            return f"latent attention takes {name!r} apart, so its inputs are not known"
    return None


def asked_text(name: str, specs: Sequence[WeightSpec], calibration: Calibration) -> str | None:
    """The calibration text in words that tell any two apart; None where none is used.

    Raises:
        QccError: a file that cannot be read.
    """
    if not _wants_text(find_method(name), specs):
        return None
    if calibration.text == "self":
        text = f"self, seed {calibration.seed}"
    else:
        found = read_text(calibration.text)
        text = f"{found.name}, sha256 {found.sha256[:8]}"
    return f"{text}, at most {_tokens(specs, calibration)} tokens"


def _wants_text(method: Method, specs: Sequence[WeightSpec]) -> bool:
    if any(spec.input_scale for spec in specs):
        return True
    return method.needs_text and not all(spec.format.is_float for spec in specs)


def _tokens(specs: Sequence[WeightSpec], calibration: Calibration) -> int:
    """How many tokens of the text are used at most."""
    weights = sum(math.prod(spec.shape) for spec in specs)
    return calibration.tokens or (TOKENS if weights < SMALL else FEWER_TOKENS)


def choose_codes(
    name: str,
    checkpoint: Checkpoint,
    specs: Sequence[WeightSpec],
    calibration: Calibration,
    source: str,
    max_positions: int,
    steps: Steps,
    held: ExitStack,
) -> Codes:
    """Run the calibration that a method needs, or the scales of inputs, if any.

    Args:
        name: of the method.
        checkpoint: open.
        specs: the weights.
        calibration: the text.
        source: checksum of the checkpoint.
        max_positions: tokens that the model was made for.
        steps: is told what is under way.
        held: gets the lock of the finished weights, which another compile may want as well.

    Raises:
        QccError, SchemeError: unusable text, a model that cannot run, a package that is missing.
    """
    method = find_method(name)

    def imported(spec: WeightSpec) -> Mapping[str, Array] | None:
        return imported_parts(checkpoint, spec)

    if not _wants_text(method, specs):
        return Codes(method, imported)
    from qcc.compiler.calibrate.text import text_of_file, text_of_model

    context = min(max_positions, CONTEXT)
    tokens = _tokens(specs, calibration)
    with steps.step("Read the calibration text") as step:
        if calibration.text == "self":

            def sampled(done: int, total: int) -> None:
                steps.count("Sample text", min(done, total), total, "tokens")

            text = text_of_model(
                checkpoint.folder,
                source,
                context,
                tokens,
                calibration.seed,
                checkpoint=checkpoint,
                progress=sampled,
            )
        else:
            text = text_of_file(checkpoint.folder, calibration.text, context, tokens)
        step.note = f"{text.name}, {text.tokens:,} tokens"
    if text.warning:
        steps.line(f"  warning: {text.warning}")
    from qcc.compiler.calibrate.run import quantize_layers

    work = cache_dir() / "quantizing" / _key(name, specs, source, text.windows)
    held.enter_context(locked(work, steps.line))
    _forget_old(work)

    def quantized(stage: int, stages: int, weight: str, seconds: float) -> None:
        left = f"{duration(seconds)} left"
        steps.transient(f"Quantize by {name}: layer {stage} of {stages}, {weight}, {left}")

    with steps.step(f"Quantize by {name}") as step:
        calibrated = quantize_layers(
            checkpoint.folder,
            specs,
            method,
            text.windows,
            work,
            quantized,
            checkpoint=checkpoint,
            original=method.original,
        )

    def given(spec: WeightSpec) -> Mapping[str, Array] | None:
        parts = calibrated(spec)
        if parts is not None and method.needs_text:
            return parts
        kept = imported(spec)
        if parts is None or kept is None:
            return parts or kept
        return {**kept, INPUT_SCALE: parts[INPUT_SCALE]}

    return Codes(
        find_method(WITHOUT_TEXT) if method.needs_text else method,
        given,
        {
            "name": text.name,
            "sha256": text.sha256,
            "tokens": text.tokens,
            "asked": asked_text(name, specs, calibration),
        },
        work,
    )


def _forget_old(work: Path) -> None:
    """Remove what runs left that nobody took up again: a large model's is gigabytes."""
    for folder in work.parent.glob("*"):
        if folder != work and folder.stat().st_mtime < time.time() - KEPT_DAYS * 86400:
            shutil.rmtree(folder, ignore_errors=True)


def _key(
    method: str, specs: Sequence[WeightSpec], source: str, windows: Sequence[Sequence[int]]
) -> str:
    """The name of the folder of finished weights: all that decides their numbers."""
    formats = [(spec.name, spec.format.as_dict(), spec.input_scale) for spec in specs]
    version = importlib.metadata.version("qcc")
    told = json.dumps([version, source, method, windows, formats], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:32]
