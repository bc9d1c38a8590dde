"""After which layer do our activations depart from the original's, and is it a kernel's fault?

A library of the artifact's own formats and weights that also gives the hidden states after each
layer is compiled into a temporary folder and run beside transformers, twice: with the original's
weights, from which rounding departs gradually, and with our dequantized weights, from which only a
wrong kernel departs. Not a verb.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qcc.compiler.build import build_library
from qcc.compiler.models.architecture import Architecture
from qcc.compiler.reference import SHARE, Transformers
from qcc.compiler.steps import Steps
from qcc.compiler.stored_weights import StoredWeights
from qcc.runtime.artifact import Artifact, library_entry, read_manifest, write_manifest
from qcc.runtime.engine.model import CompiledModel
from qcc.runtime.engine.weights import cache_path
from qcc.runtime.errors import QccError
from qcc.runtime.eval.report import LayerFigures, TensorFigures
from qcc.runtime.machine import available_bytes
from qcc.targets import find_target
from qcc.targets.spec import BuildOptions

if TYPE_CHECKING:
    from qcc.runtime.engine.llm import LLM

Floats = npt.NDArray[np.float32]
PART_TOKENS = 1024  # of the text
# Relative, at the worst position. Another order of summation in f32 makes 1e-6 a layer, and 1e-5 at
# the end of deep models; a wrong code, scale, mask or rotation makes 1e-2 and more.
ALLOWED = 1e-3
LEAP = 3  # times the usual error that a layer adds, or that a weight has
SMALL = 0.05  # relative error that no layer is accused of
NAMED = 3  # weights in a finding


def layer_figures(
    llm: LLM,
    stored: StoredWeights,
    windows: Sequence[Sequence[int]],
    tensors: Sequence[TensorFigures],
    steps: Steps,
) -> tuple[list[LayerFigures], list[str]]:
    """The error after every layer and of the logits, and what it says, in words.

    Args:
        llm: the artifact, loaded: its own library gives the logits.
        stored: its weights.
        windows: a part of the text.
        tensors: relative errors of the weights.
        steps: is told what is under way.

    Raises:
        QccError: transformers is not installed, or the original does not fit the memory.
    """
    if stored.source.float_bytes > SHARE * available_bytes():
        raise QccError(
            f"--layers: {stored.source.folder} in f32 does not fit the memory, of which "
            f"{available_bytes() / 1e9:.1f} GB are free"
        )
    with steps.step("Build a library with layers"), _layer_library(stored) as model:
        llm.model.switch("high")  # int8 activations would depart on their own
        ours = [[*_outputs(model, ids), llm.logits(ids)] for ids in windows]
    with steps.step("Run transformers"):
        theirs = _stream(Transformers.load(stored.source), windows)
        on_ours = _stream(Transformers.load(stored.source, stored.by_source()), windows)
    count = len(ours[0]) - 2
    names = ["embedding", *(f"layer {i}" for i in range(count)), "logits"]
    names[-2] += " and norm"
    figures = []
    for row, name in enumerate(names):
        errors = []
        for reference in (theirs, on_ours):
            off = [
                _relative(window[row], other[row])
                for window, other in zip(ours, reference, strict=True)
            ]
            every = np.concatenate(off)
            errors += [float(every.mean()), float(every.max())]
        figures.append(LayerFigures(name, *errors))
    return figures, findings(figures, tensors, stored.plan.scheme.activations)


def findings(
    figures: Sequence[LayerFigures],
    tensors: Sequence[TensorFigures],
    activations: str = "none",
) -> list[str]:
    """What the figures say, a sentence each: of the kernels, then of the weights.

    Where activations are rounded too, that alone departs from transformers: no kernel is judged.
    """
    # `not <=`: what is no number is wrong.
    wrong = next((item for item in figures if not item.kernel_worst <= ALLOWED), None)
    found = []
    if activations != "none":
        found.append(
            f"activations are rounded to int8 ({activations}): departures from transformers on our "
            "own weights include that, so no kernel is judged by them"
        )
    elif wrong:
        found.append(
            f"WRONG KERNEL: {wrong.name} is the first whose output departs from transformers on "
            f"our own weights: {wrong.kernel_worst:.1e} at the worst position (rounding makes less "
            f"than {ALLOWED:g})"
        )
    else:
        worst = max(item.kernel_worst for item in figures)
        found.append(
            f"kernels are right: transformers on our own weights agrees to {worst:.1e} everywhere"
        )
    stream = figures[:-1]  # without the logits
    # Errors of layers are independent, so that their squares add up.
    added = [b.mean**2 - a.mean**2 for a, b in itertools.pairwise(stream)]
    if len(added) > 1:
        largest = max(range(len(added)), key=added.__getitem__)
        usual = statistics.median(max(x, 0.0) for i, x in enumerate(added) if i != largest)
        if added[largest] > max(LEAP**2 * usual, SMALL**2):
            before, item = stream[largest], stream[largest + 1]
            found.append(
                f"WEIGHTS: the error leaps at {item.name}, from {before.mean:.1e} to "
                f"{item.mean:.1e}; look at its weights"
            )
    if tensors:
        usual = statistics.median(item.error for item in tensors)
        odd = [item for item in tensors if not item.error <= LEAP * usual]
        for tensor in sorted(odd, key=lambda item: -item.error)[:NAMED]:
            found.append(
                f"WEIGHTS: {tensor.name} is off by {tensor.error:.2f} of its norm, usual are "
                f"{usual:.2f}"
            )
    return found


@contextmanager
def _layer_library(stored: StoredWeights) -> Iterator[CompiledModel]:
    """The artifact's weights under a library that has `layer_outputs`; gone afterwards."""
    plan = dataclasses.replace(stored.plan, architecture=_exporting(stored.plan.architecture))
    with tempfile.TemporaryDirectory(prefix="qcc-layers-") as name:
        folder = Path(name)
        for path in stored.artifact.folder.resolve().iterdir():
            if path.name not in ("lib", "qcc.json") and not path.name.startswith("."):
                (folder / path.name).symlink_to(path)
        (folder / "lib").mkdir()
        library = folder / "lib" / "cpu.so"
        build = BuildOptions(precision="high")
        build_library(plan, stored.specs, find_target("cpu"), build, library)
        manifest = read_manifest(stored.artifact.folder)
        fields = {key: manifest[key] for key in manifest if key not in ("format", "qcc", "tvm")}
        libraries = {"cpu": library_entry(folder, library)}
        write_manifest(folder, {**fields, "libraries": libraries})
        artifact = Artifact.open(folder)
        model = CompiledModel(artifact, "cpu", max_batch_size=1, precision="high")
        try:
            yield model
        finally:
            with suppress(OSError):
                cache_path(artifact, model.library).unlink()


def _exporting(architecture: Architecture) -> Architecture:
    def module(config: Any) -> Any:
        model = architecture.module(config)
        model.exports_layers = True
        return model

    return dataclasses.replace(architecture, module=module)


def _outputs(model: CompiledModel, ids: Sequence[int]) -> list[Floats]:
    """[embedding, after each layer] of one window, f32[n, h] each."""
    tokens = np.asarray(ids, np.int32)
    parts = []
    model.add_sequence(0)
    for at in range(0, len(tokens), model.limits.prefill_chunk_size):
        chunk = tokens[at : at + model.limits.prefill_chunk_size]
        model.cache.begin([0], [len(chunk)])
        parts.append(model.library.layer_outputs(chunk, model.cache))
        model.cache.end()
    model.remove_sequence(0)
    return [np.concatenate(rows) for rows in zip(*parts, strict=True)]


def _stream(model: Transformers, windows: Sequence[Sequence[int]]) -> list[list[Floats]]:
    """The same of transformers' model, and the logits behind."""
    found = []
    for ids in windows:
        states, logits = model.hidden_states(ids)
        found.append([*states, logits])
    return found


def _relative(ours: Floats, theirs: Floats) -> npt.NDArray[np.float64]:
    """||ours - theirs|| / ||theirs|| of each position, f64[n]."""
    width = min(ours.shape[1], theirs.shape[1])
    a, b = ours[:, :width].astype(np.float64), theirs[:, :width].astype(np.float64)
    norm = np.linalg.norm(b, axis=1)
    found: npt.NDArray[np.float64] = np.linalg.norm(a - b, axis=1) / norm
    # Where the reference is no number either, its weights are to blame: nothing departs.
    found[~np.isfinite(norm) & ~np.isfinite(a).all(axis=1)] = 0.0
    return found
