"""What `qcc eval` and `qcc compile --eval` do: artifacts, a text and a reference -> a Report.

Not a verb. Every artifact runs through its own compiled library.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qcc.compiler.cli._activations import Activations
from qcc.compiler.reference import Original, Stream, available, reference_logits
from qcc.compiler.source import locate
from qcc.compiler.steps import Steps
from qcc.compiler.stored_weights import StoredWeights
from qcc.compiler.tokenizer_files import tokenizer_folder
from qcc.runtime.artifact import Artifact, running_versions
from qcc.runtime.errors import QccError
from qcc.runtime.eval.figures import Collector, NotFiniteError
from qcc.runtime.eval.protocol import MAX_CONTEXT, Text, Windows, cut_windows, read_text
from qcc.runtime.eval.report import Evaluation, LayerFigures, Report
from qcc.runtime.eval.saved import SavedLogits

if TYPE_CHECKING:
    from qcc.compiler.cli._swap import SwappableModel
    from qcc.runtime.engine.llm import LLM
    from qcc.runtime.engine.tokenizer import Tokenizer

Floats = npt.NDArray[np.float32]
REFERENCES = ("auto", "transformers", "qcc")


@dataclass(frozen=True)
class EvalOptions:
    """What `qcc eval` takes besides the artifacts and the text."""

    against: str | None = None
    reference: str = "auto"
    context: int | None = None
    max_tokens: int | None = None
    save_logits: Path | None = None
    layers: bool = False
    tensors: bool = False
    allow_pickle: bool = False
    lora: Path | None = None
    threads: int | None = None
    precision: str | None = None
    kv: tuple[str, ...] = ()  # the first counts; with `activations` each is measured
    activations: bool = False

    @property
    def cache(self) -> str | None:
        """The KV cache of the usual figures; None: as the precision has it."""
        return self.kv[0] if self.kv else None


@dataclass(frozen=True)
class _Reference:
    """MODEL, the name of what runs it, and its logits."""

    source: Original
    name: str
    logits: Stream


def evaluate(
    artifacts: Sequence[Path | str],
    text: Path | str,
    options: EvalOptions | None = None,
    steps: Steps | None = None,
) -> Report:
    """Measure artifacts side by side, by the protocol of runtime/eval.

    Raises:
        QccError: an unfit text, artifact, reference or size; logits that are no numbers.
    """
    options, steps = options or EvalOptions(), steps or Steps(quiet=True)
    begun = time.perf_counter()
    content = read_text(text)
    opened = [Artifact.open(folder) for folder in artifacts]
    context = choose_context(opened, options.context)
    with steps.step("Load the artifacts"):
        llms = [_load(artifact, context, options) for artifact in opened]
    _check_vocabularies(llms)
    windows = windows_of(content, llms[0].tokenizer, context, options.max_tokens)
    original, stored = None, []
    if options.against is not None:
        with steps.step("Load the reference") as step:
            original = _reference(options, llms, context, steps)
            stored = [StoredWeights.open(artifact, original.source) for artifact in opened]
            step.note = original.name
    try:
        with steps.step("Run the windows") as step:
            ways = [
                Activations(llm, options.kv, windows.tokens, steps)
                for llm in (llms if options.activations else ())
            ]
            collectors = _run(llms, original, windows, options, ways, steps)
            step.note = f"{windows.tokens:,} tokens"
    except NotFiniteError as err:
        hint = "qcc eval --against MODEL --layers names the layer that they come from"
        if options.layers:
            rows = [_layers(*pair, windows, steps) for pair in zip(llms, stored, strict=True)]
            hint = "; ".join(text for _, found in rows for text in found)
        raise QccError(f"{err}; {hint}") from err
    evaluations = [
        _evaluation(llm, collector, content, original)
        for llm, collector in zip(llms, collectors, strict=True)
    ]
    if ways:
        evaluations = [
            replace(item, activations=measured.figures())
            for item, measured in zip(evaluations, ways, strict=True)
        ]
    if original:
        evaluations = _compared(evaluations, llms, stored, windows, options, steps)
    return Report(
        tuple(evaluations),
        original.name if original else None,
        content,
        windows,
        running_versions(),
        time.perf_counter() - begun,
    )


def choose_context(artifacts: Sequence[Artifact], wanted: int | None) -> int:
    """Tokens of a window, the same for all: as asked for, else the least context, at most 2048.

    Raises:
        QccError: more than an artifact was compiled for.
    """
    lengths = {a.folder: a.manifest.sizes.get("context_window_size", -1) for a in artifacts}
    bounded = {folder: length for folder, length in lengths.items() if length > 0}
    if wanted is None:
        return min([MAX_CONTEXT, *bounded.values()])
    for folder, length in bounded.items():
        if wanted > length:
            raise QccError(
                f"--context {wanted}: {folder} was compiled for {length} tokens; lower it, or "
                "compile with --context-window"
            )
    return wanted


def windows_of(text: Text, tokenizer: Tokenizer, context: int, max_tokens: int | None) -> Windows:
    """The windows of a text by a model's tokenizer.

    A model has no BOS where its tokenizer_config.json says null, whatever its other files say.
    """
    silent = tokenizer.config.get("bos_token", "") is None
    bos = None if silent else tokenizer.bos_id
    end = tokenizer.special_text("eos_token")
    return cut_windows(text, tokenizer.encode_rendered, bos, context, end, max_tokens)


def _load(artifact: Artifact, context: int, options: EvalOptions) -> LLM:
    from qcc.runtime.engine.llm import LLM

    bounded = artifact.manifest.sizes.get("context_window_size", -1) > 0
    return LLM(
        artifact.folder,
        threads=options.threads,
        context_window=context if bounded else None,
        max_batch_size=1,
        precision=options.precision,
        kv=options.cache,
    )


def _check_vocabularies(llms: Sequence[LLM]) -> None:
    """All artifacts must give the same tokens the same ids."""
    first = llms[0].tokenizer.backend.get_vocab(with_added_tokens=True)
    for llm in llms[1:]:
        if llm.tokenizer.backend.get_vocab(with_added_tokens=True) != first:
            raise QccError(
                f"{llm.artifact.folder}: another vocabulary than {llms[0].artifact.folder}'s; "
                "evaluate models of different tokenizers apart"
            )


def _reference(options: EvalOptions, llms: Sequence[LLM], context: int, steps: Steps) -> _Reference:
    """MODEL, of the artifacts' vocabulary, ready to run."""
    assert options.against is not None, "asked for only with --against"
    folder = locate(options.against, options.allow_pickle)
    _check_model(folder, llms[0])
    kind = options.reference
    if kind == "auto":
        kind = "transformers" if available() else "qcc"
    source = Original(folder, options.allow_pickle, options.lora)
    if kind == "transformers":
        return _Reference(source, *reference_logits(source))
    model = _swappable(source, context, steps)

    def stream(windows: Sequence[Sequence[int]]) -> Iterator[Floats]:
        return map(model.logits, windows)

    return _Reference(source, f"qcc {model.name}, {model.llm.artifact.folder}", stream)


def _swappable(source: Original, context: int, steps: Steps) -> SwappableModel:
    """MODEL as our own float library."""
    from qcc.compiler.cli._swap import SwappableModel

    return SwappableModel(source.folder, steps, None, context, source.allow_pickle, source.lora)


def _check_model(folder: Path, llm: LLM) -> None:
    """Refuse a MODEL whose tokens have other ids than the artifact's."""
    import tokenizers

    path = tokenizer_folder(folder) / "tokenizer.json"
    if not path.is_file():
        return  # a .gguf has its tokenizer in its metadata; the widths of logits are compared
    try:
        found = tokenizers.Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as err:
        raise QccError(f"{path}: the tokenizers library cannot read it: {err}") from err
    ours = llm.tokenizer.backend.get_vocab(with_added_tokens=True)
    if found != ours:
        raise QccError(
            f"--against {folder}: another vocabulary ({len(found)} tokens) than "
            f"{llm.artifact.folder}'s ({len(ours)}); give the model it was compiled from"
        )


def _run(
    llms: Sequence[LLM],
    original: _Reference | None,
    windows: Windows,
    options: EvalOptions,
    ways: Sequence[Activations],
    steps: Steps,
) -> list[Collector]:
    """All windows through all artifacts and the reference, in step: one window in memory."""
    collectors = [Collector(str(llm.artifact.folder)) for llm in llms]
    theirs = original.logits(windows.ids) if original else None
    with ExitStack() as stack:
        saved = (
            stack.enter_context(SavedLogits(options.save_logits)) if options.save_logits else None
        )
        done = 0
        for ids in windows.ids:
            steps.count("Run the windows", done, windows.tokens, "tokens")
            reference = next(theirs) if theirs else None
            ours = [llm.logits(ids) for llm in llms]
            if reference is not None and original is not None:
                _check_width(reference, ids, original)
            for collector, logits in zip(collectors, ours, strict=True):
                collector.add(ids, logits, reference)
            if saved:
                saved.add(ids, ours, reference)
            for measured in ways:
                measured.add(ids, reference)
                measured.llm.model.switch(options.precision, options.cache)
            done += len(ids)
    return collectors


def _check_width(reference: Floats, ids: Sequence[int], original: _Reference) -> None:
    if reference.shape[1] <= max(ids):
        raise QccError(
            f"--against {original.source.folder}: logits of {reference.shape[1]} tokens, the text "
            f"has token {max(ids)}; give the model that the artifact was compiled from"
        )


def _evaluation(
    llm: LLM,
    collector: Collector,
    text: Text,
    original: _Reference | None,
) -> Evaluation:
    artifact = llm.artifact
    warnings = [*_calibrated_on(artifact, text)]
    if original is not None:
        warnings += _other_source(artifact, original.source)
    bits, nbytes = stored_bits(artifact)
    return Evaluation(
        str(artifact.folder),
        artifact.manifest.scheme,
        artifact.manifest.method,
        bits,
        nbytes,
        collector.figures(),
        warnings=tuple(warnings),
    )


def _compared(
    evaluations: Sequence[Evaluation],
    llms: Sequence[LLM],
    stored: Sequence[StoredWeights],
    windows: Windows,
    options: EvalOptions,
    steps: Steps,
) -> list[Evaluation]:
    """Evaluations with what comparing the weights themselves, and the layers, tells."""
    from qcc.compiler.cli._damage import linear_bits, measured, tensor_figures

    with steps.step("Compare the weights"):
        tensors = [tensor_figures(weights, steps) for weights in stored]
    if options.tensors:
        with steps.step("Measure each weight"):
            swappable = _swappable(stored[0].source, windows.context, steps)
            tensors = measured(stored, tensors, swappable, windows, steps)
    found = []
    for item, llm, weights, each in zip(evaluations, llms, stored, tensors, strict=True):
        item = replace(item, linear_bits=linear_bits(weights.specs), tensors=tuple(each))
        if options.layers:
            layers, findings = _layers(llm, weights, windows, steps)
            item = replace(item, layers=tuple(layers), findings=tuple(findings))
        found.append(item)
    return found


def _layers(
    llm: LLM, stored: StoredWeights, windows: Windows, steps: Steps
) -> tuple[list[LayerFigures], list[str]]:
    """What the layers say, in figures and in words."""
    from qcc.compiler.cli._damage import tensor_figures
    from qcc.compiler.cli._divergence import part_of
    from qcc.compiler.cli._layers import PART_TOKENS, layer_figures

    part, tensors = part_of(windows.ids, PART_TOKENS), tensor_figures(stored, steps)
    return layer_figures(llm, stored, part, tensors, steps)


def stored_bits(artifact: Artifact) -> tuple[float, int]:
    """Bits a weight of all that is stored, and its bytes."""
    data = json.loads((artifact.folder / "tensor-cache.json").read_text(encoding="utf-8"))
    nbytes = sum(record.nbytes for record in artifact.records.values())
    return float(data["metadata"]["BitsPerParam"]), nbytes


def _calibrated_on(artifact: Artifact, text: Text) -> Iterator[str]:
    found: Any = artifact.manifest.calibration
    if isinstance(found, dict) and found.get("sha256") == text.sha256:
        yield (
            f"its method was calibrated on this very text ({found.get('name')}): the figures are "
            "better than on other texts; evaluate on another one"
        )
    tuned_on = artifact.manifest.tuned_on
    if text.sha256 in tuned_on:
        yield (
            f"its scheme was tuned on this very text ({tuned_on.split(', ')[0]}): the figures are "
            "better than on other texts; evaluate on another one"
        )


def _other_source(artifact: Artifact, source: Original) -> Iterator[str]:
    if not source.is_source(artifact.manifest.source):
        yield (
            f"it was compiled from {artifact.manifest.source.get('name')}, not from "
            f"{source.folder} as it is now: if an adapter was merged (give it with --lora) or "
            "weights were changed on purpose, the figures include that; else they compare "
            "different models"
        )


def check_store(folder: Path) -> None:
    """Refuse to replace a stored comparison with the original by a perplexity alone."""
    from qcc.runtime.manifest import read_manifest

    if (read_manifest(folder).get("quality") or {}).get("kl_divergence"):
        raise QccError(
            f"--store: {folder} holds a comparison with its original, which this would replace by "
            "the perplexity alone; give --against MODEL as well"
        )


def store(folder: Path, report: Report, index: int = 0) -> None:
    """Write an artifact's part of a report into its qcc.json, under `quality`."""
    from qcc.runtime.manifest import read_manifest, write_manifest

    found = read_manifest(folder)
    content = {key: value for key, value in found.items() if key not in ("format", "qcc", "tvm")}
    write_manifest(folder, {**content, "quality": report.quality(index)})
