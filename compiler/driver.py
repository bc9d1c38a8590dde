"""The steps of a compile, in order, on one page."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from qcc.compiler.build import Plan, build_library, weight_specs
from qcc.compiler.chat_config import fitting_vocabulary, write_chat_config
from qcc.compiler.config import read_json
from qcc.compiler.models import find_architecture
from qcc.compiler.sizes import SizeFlags, choose_sizes
from qcc.compiler.source import checksum, locate
from qcc.compiler.steps import Steps
from qcc.compiler.weights.checkpoint import Checkpoint
from qcc.compiler.weights.convert import check_weights, convert_weights
from qcc.compiler.weights.spec import WeightSpec
from qcc.quant_schemes.scheme import load_scheme
from qcc.runtime import artifact
from qcc.runtime.errors import QccError
from qcc.runtime.files import cache_dir, os_errors, remove_stale
from qcc.targets import find_target
from qcc.targets.spec import BuildOptions

METHOD = "rtn"
DEFAULT_CHUNK = 512  # tokens of a prefill chunk where no target says otherwise


@dataclass(frozen=True)
class CompileOptions:
    """What `qcc compile` takes besides the model and the output folder."""

    quant: str = "q4f16_1"
    targets: tuple[str, ...] = ("cpu",)
    sizes: SizeFlags = field(default_factory=SizeFlags)
    build: BuildOptions = field(default_factory=BuildOptions)
    allow_pickle: bool = False
    force: bool = False
    dump_ir: Path | None = None


def compile_model(
    model: str, out: Path, options: CompileOptions | None = None, steps: Steps | None = None
) -> Path:
    """Compile `model` into the artifact folder `out`; returns it.

    Raises:
        QccError, SchemeError: bad input, one line; the folder then holds nothing that loads, or
            what it held before.
    """
    options, steps = options or CompileOptions(), steps or Steps(quiet=True)
    specs_of_targets = [find_target(name) for name in options.targets]
    resolved = [spec.resolve(options.build) for spec in specs_of_targets]
    with steps.step("Read the checkpoint") as step:
        source = locate(model, options.allow_pickle)
        chunks = [target.default_prefill_chunk for target in specs_of_targets]
        plan = make_plan(source, options, min(chunks, default=DEFAULT_CHUNK))
        checkpoint = Checkpoint.open(source, allow_pickle=options.allow_pickle)
        specs = weight_specs(plan)
        check_weights(checkpoint, specs, plan.architecture.ignored)
        tokens = fitting_vocabulary(source, plan.config).size
        plan = dataclasses.replace(plan, active_vocab_size=tokens)
        step.note = f"{plan.config.model_type}, {_parameters(specs):,} parameters"
    with checkpoint, ThreadPoolExecutor(1) as pool, _staging(out) as staging:
        source_sum = pool.submit(checksum, source)
        before = _check_folder(out, plan, specs, source_sum.result, options.force)
        built = {}
        for spec, (target, suffix) in zip(specs_of_targets, resolved, strict=True):
            with steps.step(f"Build the {spec.name} library") as step:
                path = staging / f"{suffix}.{spec.library_extension}"
                build_library(plan, specs, spec, options.build, path, options.dump_ir)
                built[suffix] = path, spec.requires(target)
                step.note = f"{suffix}, {path.stat().st_size / 1e6:.1f} MB"
        if before is None:
            with steps.step("Convert the weights") as step:
                progress = partial(steps.progress, "Convert the weights")
                ignored = plan.architecture.ignored
                convert_weights(checkpoint, specs, out, progress, ignored)
                step.note = _weights_note(specs)
        with steps.step("Write the configuration") as step:
            sizes = plan.sizes.as_dict()
            chat = write_chat_config(source, out, plan.config, plan.scheme.name, sizes)
            step.note = str(chat.get("conv_template_note") or "")
            origin = {"name": source.resolve().name, "sha256": source_sum.result()}
            _publish(out, plan, origin, specs, before, built)
    return out


def convert_model(
    model: str, out: Path, options: CompileOptions | None = None, steps: Steps | None = None
) -> Path:
    """Weights and configuration only, no library; `compile` adds libraries later."""
    options = options or CompileOptions()
    return compile_model(model, out, dataclasses.replace(options, targets=()), steps)


def compile_cached(model: str, steps: Steps | None = None) -> Path:
    """Compile with the defaults into the cache, once; returns the artifact folder."""
    source = locate(model).resolve()
    key = hashlib.sha256(str(source).encode()).hexdigest()[:16]
    out = cache_dir() / "compiled" / f"{source.name}-{key}"
    try:
        found = artifact.Artifact.open(out).manifest
        if found.source.get("sha256") == checksum(source):
            return out
    except QccError:
        pass  # not there, unfinished, or of another version: compile
    return compile_model(str(source), out, CompileOptions(force=True), steps)


def make_plan(source: Path, options: CompileOptions, default_chunk: int) -> Plan:
    """Read the config, the scheme and the sizes."""
    where = source / "config.json"
    raw = read_json(where)
    if not isinstance(raw, dict):
        raise QccError(f"{where}: not a JSON object")
    architecture = find_architecture(raw, str(where))
    config = architecture.config(raw, str(where))
    return Plan(
        architecture,
        config,
        load_scheme(options.quant),
        choose_sizes(config, options.sizes, default_chunk),
    )


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
    for key, old, new in (
        ("checkpoint", found.get("source", {}).get("sha256"), source_sum()),
        ("scheme", found.get("scheme"), plan.scheme.name),
        ("scheme of that name", _digest(found.get("tensors")), _digest(_formats(specs))),
        ("method", found.get("method"), METHOD),
        ("sizes", found.get("sizes"), plan.sizes.as_dict()),
    ):
        if old != new:
            raise QccError(
                f"{out} holds an artifact with another {key} ({old}, now {new}); choose another "
                "folder with -o, or replace it with --force"
            )
    return found


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A folder inside `out` for what is under way; gone afterwards, as is `out` if it is empty."""
    if out.exists() and not out.is_dir():
        raise QccError(f"-o {out}: that is a file; give a folder")
    staging = out / ".building"
    with os_errors(out, "write"):
        out.mkdir(parents=True, exist_ok=True)
        remove_stale(out)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if not any(out.iterdir()):
            out.rmdir()


def _publish(
    out: Path,
    plan: Plan,
    source: Mapping[str, str],
    specs: Sequence[WeightSpec],
    before: Mapping[str, Any] | None,
    built: Mapping[str, tuple[Path, Mapping[str, Any]]],
) -> None:
    """Move the libraries to their places and write qcc.json last: only then the folder loads."""
    libraries = dict(before["libraries"]) if before else {}
    if before is None:
        (out / artifact.QCC_JSON).unlink(missing_ok=True)
        shutil.rmtree(out / "lib", ignore_errors=True)
    for suffix, (path, requires) in built.items():
        (out / "lib").mkdir(exist_ok=True)
        final = out / "lib" / path.name
        path.replace(final)
        libraries[suffix] = artifact.library_entry(out, final, requires)
    manifest = {
        "source": source,
        "scheme": plan.scheme.name,
        "method": METHOD,
        "tensors": _formats(specs),
        "sizes": plan.sizes.as_dict(),
        "libraries": libraries,
    }
    artifact.write_manifest(out, manifest)
