"""The steps of a compile, in order, on one page."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from qcc.compiler.build import Plan, build_library, check_dtypes, weight_specs
from qcc.compiler.chat_config import fitting_vocabulary, write_chat_config
from qcc.compiler.codes import asked_text, check_text, choose_codes
from qcc.compiler.embedding import embedding_sizes, refuse_text
from qcc.compiler.imports.lora import with_lora
from qcc.compiler.imports.parts import import_notes
from qcc.compiler.imports.scheme import source_scheme
from qcc.compiler.models.architecture import Architecture
from qcc.compiler.options import CompileOptions
from qcc.compiler.output_folder import locked, publish, staging
from qcc.compiler.read_model import read_model
from qcc.compiler.sizes import SizeFlags, Sizes, choose_sizes, context_note
from qcc.compiler.source import checksum, locate, stamp
from qcc.compiler.steps import Steps
from qcc.compiler.weights.checkpoint import Checkpoint
from qcc.compiler.weights.convert import check_weights, convert_weights
from qcc.compiler.weights.spec import WeightSpec
from qcc.quant_schemes.rounding.method import find_method
from qcc.quant_schemes.scheme import Scheme, load_scheme
from qcc.runtime import artifact
from qcc.runtime.errors import QccError
from qcc.runtime.files import cache_dir
from qcc.targets import find_target
from qcc.targets.spec import BuildOptions, TargetSpec

DEFAULT_QUANT = "q4f16_1"
DEFAULT_CHUNK = 512  # tokens of a prefill chunk where no target says otherwise


def compile_model(
    model: str, out: Path, options: CompileOptions | None = None, steps: Steps | None = None
) -> Path:
    """Compile `model` into the artifact folder `out`; returns it.

    Raises:
        QccError, SchemeError: bad input, one line; the folder then holds nothing that loads, or
            what it held before.
    """
    options, steps = options or CompileOptions(), steps or Steps(quiet=True)
    with locked(out, steps.line):
        _compile(model, out, options, steps)
    return out


def _compile(model: str, out: Path, options: CompileOptions, steps: Steps) -> None:
    """compile_model, the folder being locked."""
    targets = [find_target(name) for name in options.targets]
    libraries = _libraries(targets, options.build)
    with steps.step("Read the checkpoint") as step:
        source = locate(model, options.allow_pickle)
        checkpoint = open_checkpoint(source, options)
        chunks = [target.default_prefill_chunk for target in targets]
        plan = make_plan(source, options, min(chunks, default=DEFAULT_CHUNK), checkpoint)
        plan = _with_sizes_of(out, plan, options)
        specs = weight_specs(plan)
        for target in targets:
            check_dtypes(plan, specs, target)
        ignored = ignored_tensors(plan)
        check_weights(checkpoint, specs, ignored)
        tokens = fitting_vocabulary(source, plan.config).size
        plan = dataclasses.replace(plan, active_vocab_size=tokens)
        method = plan.scheme.method if options.method is None else options.method
        calibrated = method if find_method(method).needs_text else None
        if options.lm_head is not None and all(spec.role != "lm_head" for spec in specs):
            raise QccError(
                "--lm-head: the model has no lm_head of its own, it multiplies by its embedding; "
                "give --embedding FORMAT"
            )
        positions = plan.config.max_position_embeddings
        check_text(method, checkpoint.folder, specs, options.calibration, positions)
        if plan.embedding and asked_text(method, specs, options.calibration) is not None:
            refuse_text(source)
        step.note = f"{plan.config.model_type}, {_parameters(specs):,} parameters"
    for note in (
        context_note(options.sizes, plan.sizes),
        *import_notes(checkpoint, specs, calibrated),
    ):
        if note:
            steps.line(f"  {note}")
    with checkpoint, ThreadPoolExecutor(1) as pool, staging(out) as work, ExitStack() as held:
        source_sum = pool.submit(checksum, source, options.lora)
        asked = asked_text(method, specs, options.calibration)
        before = _check_folder(out, plan, specs, method, asked, source_sum.result, options.force)
        built = {}
        for name, (target, machine, build) in libraries.items():
            with steps.step(f"Build the {target.name} library") as step:
                path = work / f"{name}.{target.library_extension}"
                dump = options.dump_ir
                dump = dump / name if dump and len(libraries) > 1 else dump
                needs = build_library(plan, specs, target, build, path, dump, steps.transient)
                built[name] = path, needs, target.rank(machine)
                step.note = f"{name}, {path.stat().st_size / 1e6:.1f} MB"
        manifest: dict[str, Any] = {
            "source": {
                "name": source.resolve().name,
                "sha256": source_sum.result(),
                "stamp": stamp(source, options.lora),
            },
            "scheme": plan.scheme.name,
            "method": method,
            "tensors": _formats(specs),
            "sizes": plan.sizes.as_dict(),
            "activations": plan.scheme.activations,
            "tuned_on": plan.scheme.tuned_on,
            "task": plan.task,
        }
        if before is None:
            codes = choose_codes(
                method,
                checkpoint,
                specs,
                options.calibration,
                source_sum.result(),
                positions,
                steps,
                held,
            )
            if codes.text:
                manifest["calibration"] = dict(codes.text)
            with steps.step("Convert the weights") as step:
                progress = partial(steps.progress, "Convert the weights")
                convert_weights(
                    checkpoint, specs, out, progress, ignored, codes.method, codes.given
                )
                step.note = _weights_note(specs)
        else:
            codes = None
            manifest |= {key: before[key] for key in ("quality", "calibration") if key in before}
        with steps.step("Write the configuration") as step:
            chat = write_chat_config(
                source,
                out,
                plan.config,
                plan.scheme.name,
                plan.sizes.as_dict(),
                plan.embedding,
            )
            step.note = str(chat.get("conv_template_note") or "")
            publish(out, before, built, manifest)
        if codes:
            codes.forget()


def _libraries(
    targets: Sequence[TargetSpec], build: BuildOptions
) -> dict[str, tuple[TargetSpec, Any, BuildOptions]]:
    """Name -> (target, its machine, how to build it) of each library to make, once each.

    Raises:
        QccError: a processor that is none, or two that would be one file.
    """
    found: dict[str, tuple[TargetSpec, Any, BuildOptions]] = {}
    for target in targets:
        for each in build.each():
            machine, name = target.resolve(each)
            if name in found and str(found[name][1]) != str(machine):
                raise QccError(
                    f"--mcpu {build.mcpu}: {found[name][2].mcpu} and {each.mcpu} are both "
                    f"{name} here; name one of them"
                )
            found[name] = target, machine, each
    return found


def open_checkpoint(source: Path, options: CompileOptions) -> Checkpoint:
    """The checkpoint in a folder, with the adapter that the options name merged into it."""
    checkpoint = Checkpoint.open(source, allow_pickle=options.allow_pickle)
    return checkpoint if options.lora is None else with_lora(checkpoint, options.lora)


def convert_model(
    model: str, out: Path, options: CompileOptions | None = None, steps: Steps | None = None
) -> Path:
    """Weights and configuration only, no library; `compile` adds libraries later."""
    options = options or CompileOptions()
    return compile_model(model, out, dataclasses.replace(options, targets=()), steps)


def compile_cached(model: str, steps: Steps | None = None) -> Path:
    """Compile with the defaults into the cache, once; returns the artifact folder."""
    steps = steps or Steps(quiet=True)
    source = locate(model).resolve()
    key = hashlib.sha256(str(source).encode()).hexdigest()[:16]
    out = cache_dir() / "compiled" / f"{source.name}-{key}"
    if not _is_current(out, source):
        with locked(out, steps.line):
            if not _is_current(out, source):  # another process may have compiled it meanwhile
                _compile(str(source), out, CompileOptions(force=True), steps)
    return out


def _is_current(out: Path, source: Path) -> bool:
    """Whether `out` is an artifact of the checkpoint as it is now."""
    try:
        origin = artifact.Artifact.open(out).manifest.source
    except QccError:
        return False  # not there, unfinished, or of another version
    return origin.get("stamp") == stamp(source) or origin.get("sha256") == checksum(source)


def make_plan(
    source: Path,
    options: CompileOptions,
    default_chunk: int,
    checkpoint: Checkpoint | None = None,
) -> Plan:
    """Read the config, the scheme and the sizes; a checkpoint may have a scheme of its own."""
    names = checkpoint.names if checkpoint is not None else None
    architecture, config, embedding = read_model(source, options.task, names)
    if embedding is None:
        sizes = choose_sizes(config, options.sizes, default_chunk)
    else:
        sizes = embedding_sizes(config, options.sizes, embedding.max_tokens)
    scheme = choose_scheme(options, architecture, checkpoint)
    return Plan(architecture, config, scheme, sizes, embedding=embedding)


def choose_scheme(
    options: CompileOptions, architecture: Architecture, checkpoint: Checkpoint | None
) -> Scheme:
    """The scheme that the options name, else an imported checkpoint's own, under their rules."""
    if options.quant is None and checkpoint is not None and checkpoint.label:
        scheme = source_scheme(checkpoint, architecture)
    else:
        scheme = load_scheme(DEFAULT_QUANT if options.quant is None else options.quant)
    return scheme.changed(options.rules, options.embedding, options.lm_head)


def ignored_tensors(plan: Plan) -> tuple[str, ...]:
    """Wildcards of source tensors that no weight is made of, harmlessly.

    A tied model saved by torch holds its lm_head as well: the embedding once more.
    """
    architecture = plan.architecture
    tied = (architecture.lm_head,) if plan.config.tie_word_embeddings else ()
    return (*architecture.ignored, *tied)


def _with_sizes_of(out: Path, plan: Plan, options: CompileOptions) -> Plan:
    """Where no size is asked for, a library that is added takes those of its folder."""
    if options.force or options.sizes != SizeFlags() or not (out / artifact.QCC_JSON).exists():
        return plan
    try:
        sizes = Sizes(**artifact.read_manifest(out)["sizes"])
    except (KeyError, TypeError):
        return plan  # `_check_folder` says what is wrong with it
    return dataclasses.replace(plan, sizes=sizes)


def _parameters(specs: Sequence[WeightSpec]) -> int:
    return sum(math.prod(spec.shape) for spec in specs)


def _weights_note(specs: Sequence[WeightSpec]) -> str:
    size = sum(
        artifact.tensor_bytes(part.shape, part.dtype) for spec in specs for part in spec.stored
    )
    return f"{size / 1e6:.1f} MB, {8 * size / _parameters(specs):.2f} bits a weight"


def _formats(specs: Sequence[WeightSpec]) -> dict[str, Any]:
    """Stored tensor -> its format, as qcc.json has it."""
    return {part.name: spec.format.as_dict() for spec in specs for part in spec.stored}


def _digest(formats: Any) -> str:
    """A short name for formats, to tell two schemes of one name apart."""
    return hashlib.sha256(json.dumps(formats, sort_keys=True).encode()).hexdigest()[:8]


def _check_folder(
    out: Path,
    plan: Plan,
    specs: Sequence[WeightSpec],
    method: str,
    asked: str | None,
    source_sum: Callable[[], str],
    force: bool,
) -> dict[str, Any] | None:
    """The manifest of `out` if it holds these very weights, None if it holds no artifact.

    Raises:
        QccError: it holds another artifact, and `force` is not given.
    """
    if not (out / artifact.QCC_JSON).exists():
        return None
    if force:
        return None
    found = artifact.read_manifest(out)
    artifact.check_versions(found, out)
    artifact.Artifact.open(out)  # every field of its kind
    for key, old, new in (
        ("checkpoint", found.get("source", {}).get("sha256"), source_sum()),
        ("scheme", found.get("scheme"), plan.scheme.name),
        ("scheme of that name", _digest(found.get("tensors")), _digest(_formats(specs))),
        ("method", found.get("method"), method),
        ("calibration", (found.get("calibration") or {}).get("asked"), asked),
        ("rounding of inputs", found.get("activations", "none"), plan.scheme.activations),
        ("task", found.get("task", "chat"), plan.task),
        ("sizes", found.get("sizes"), plan.sizes.as_dict()),
    ):
        if old != new:
            raise QccError(
                f"{out} holds an artifact with another {key} ({old}, now {new}); choose another "
                "folder with -o, or replace it with --force"
            )
    return found
