"""The steps of a compile, in order, on one page."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qcc.compiler.build import Plan, build_library, weight_specs
from qcc.compiler.chat_config import write_chat_config
from qcc.compiler.config import read_json
from qcc.compiler.models import find_architecture
from qcc.compiler.sizes import SizeFlags, choose_sizes
from qcc.compiler.source import checksum, locate
from qcc.compiler.steps import Steps
from qcc.compiler.weights.checkpoint import Checkpoint
from qcc.compiler.weights.convert import convert_weights
from qcc.compiler.weights.spec import WeightSpec
from qcc.quant_schemes.scheme import load_scheme
from qcc.runtime import artifact
from qcc.runtime.errors import QccError
from qcc.targets import find_target
from qcc.targets.spec import BuildOptions

METHOD = "rtn"


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
        QccError, SchemeError: bad input, one line; the folder then holds nothing that loads, or what
        it held before.
    """
    options, steps = options or CompileOptions(), steps or Steps(None)
    specs_of_targets = [find_target(name) for name in options.targets]
    with steps.step("Read the checkpoint") as step:
        source = locate(model, options.allow_pickle)
        plan = make_plan(source, options, min(t.default_prefill_chunk for t in specs_of_targets))
        checkpoint = Checkpoint.open(source, allow_pickle=options.allow_pickle)
        specs = weight_specs(plan)
        step.note = f"{plan.config.model_type}, {_parameters(specs):,} parameters"
    with checkpoint, ThreadPoolExecutor(1) as pool:
        source_sum = pool.submit(checksum, source)
        out.mkdir(parents=True, exist_ok=True)
        identity = _identity(source, plan, options)
        have_weights = _check_folder(out, identity, source_sum.result, options.force)
        libraries = {}
        with _unfinished_removed(out) as staging:
            for spec in specs_of_targets:
                with steps.step(f"Build the {spec.name} library") as step:
                    _, suffix = spec.resolve(options.build)
                    name = f"{suffix}.{spec.library_extension}"
                    build_library(
                        plan, specs, spec, options.build, staging / name, options.dump_ir
                    )
                    libraries[suffix] = staging / name
                    step.note = f"{(staging / name).stat().st_size / 1e6:.1f} MB"
            if not have_weights:
                with steps.step("Convert the weights") as step:
                    convert_weights(
                        checkpoint,
                        specs,
                        out,
                        lambda done, total, _: steps.progress("Convert the weights", done, total),
                        ignored=plan.architecture.ignored,
                    )
                    step.note = _weights_note(specs)
            with steps.step("Write the configuration") as step:
                chat = write_chat_config(
                    source, out, plan.config, plan.scheme.name, plan.sizes.as_dict()
                )
                step.note = str(chat.get("conv_template_note") or "")
                _publish(out, identity, source_sum.result(), specs, libraries)
    return out


def convert_model(
    model: str, out: Path, options: CompileOptions | None = None, steps: Steps | None = None
) -> Path:
    """Weights and configuration only, no library; `compile` adds libraries later."""
    options = options or CompileOptions()
    return compile_model(
        model, out, CompileOptions(**{**vars(options), "targets": ()}), steps
    )


def compile_cached(model: str, steps: Steps | None = None) -> Path:
    """Compile with the defaults into the cache, once; returns the artifact folder."""
    source = locate(model).resolve()
    key = hashlib.sha256(f"{source}".encode()).hexdigest()[:16]
    out = artifact.cache_dir() / "compiled" / f"{source.name}-{key}"
    if (out / artifact.QCC_JSON).is_file():
        current = artifact.read_manifest(out)
        if current.get("source", {}).get("sha256") == checksum(source):
            try:
                artifact.Artifact.open(out)
                return out
            except QccError:
                pass  # another version made it: compile again
        shutil.rmtree(out)
    return compile_model(str(source), out, CompileOptions(force=True), steps)


def make_plan(source: Path, options: CompileOptions, default_chunk: int = 512) -> Plan:
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
    total = 0
    for spec in specs:
        size = 1
        for extent in spec.shape:
            size *= extent
        total += size
    return total


def _weights_note(specs: Sequence[WeightSpec]) -> str:
    size = sum(artifact.tensor_bytes(p.shape, p.dtype) for spec in specs for p in spec.stored)
    return f"{size / 1e6:.1f} MB, {8 * size / _parameters(specs):.2f} bits a weight"


def _identity(source: Path, plan: Plan, options: CompileOptions) -> dict[str, Any]:
    """What all libraries of one folder share."""
    return {
        "source": {"name": source.resolve().name},
        "scheme": plan.scheme.name,
        "method": METHOD,
        "sizes": plan.sizes.as_dict(),
    }


def _check_folder(out: Path, identity: dict[str, Any], source_sum: Any, force: bool) -> bool:
    """Whether `out` already holds these weights; a folder with another artifact is refused."""
    if not (out / artifact.QCC_JSON).exists():
        return False
    if force:
        (out / artifact.QCC_JSON).unlink()
        return False
    found = artifact.read_manifest(out)
    for key in ("scheme", "method", "sizes"):
        if found.get(key) != identity[key]:
            raise QccError(
                f"{out} holds an artifact with another {key} ({found.get(key)}, now "
                f"{identity[key]}); choose another folder with -o, or replace it with --force"
            )
    if found.get("source", {}).get("sha256") != source_sum():
        raise QccError(
            f"{out} holds an artifact of another checkpoint; choose another folder with -o, or "
            "replace it with --force"
        )
    artifact.check_versions(found, out)
    return True


@contextmanager
def _unfinished_removed(out: Path) -> Iterator[Path]:
    """A folder inside `out` for libraries under way; it is gone afterwards."""
    staging = out / ".building"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(
    out: Path,
    identity: dict[str, Any],
    source_sum: str,
    specs: Sequence[WeightSpec],
    built: dict[str, Path],
) -> None:
    """Move the libraries to their places and write qcc.json last: only then the folder loads."""
    libraries: dict[str, Any] = {}
    if (out / artifact.QCC_JSON).exists():
        libraries.update(artifact.read_manifest(out).get("libraries", {}))
    (out / "lib").mkdir(exist_ok=True)
    for suffix, path in built.items():
        final = out / "lib" / path.name
        path.replace(final)
        libraries[suffix] = artifact.library_entry(out, final)
    tensors = {
        part.name: spec.format.as_dict() for spec in specs for part in spec.stored
    }
    artifact.write_manifest(
        out,
        {
            **identity,
            "source": {**identity["source"], "sha256": source_sum},
            "tensors": tensors,
            "libraries": libraries,
        },
    )
