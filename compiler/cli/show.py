"""qcc show: what an artifact holds and what memory it needs; of a checkpoint, what it would."""

from __future__ import annotations

import argparse
import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcc.runtime.artifact import Artifact

HELP = "show an artifact's or a checkpoint's sizes, formats and memory budget"
EXAMPLE = "qcc show ./llama-q4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `show`."""
    parser.add_argument("model", metavar="ARTIFACT|MODEL", help="artifact, checkpoint or hub id")
    parser.add_argument(
        "--quant",
        default=None,
        metavar="SCHEME",
        help="scheme to estimate a checkpoint with (default: as compile chooses it)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")


def run(args: argparse.Namespace) -> int:
    """Print the facts as a table or as JSON."""
    from qcc.runtime.artifact import QCC_JSON

    folder = Path(args.model)
    # What is no folder may be a hub id, so a checkpoint.
    is_checkpoint = not folder.is_dir() or (folder / "config.json").exists()
    is_artifact = (folder / QCC_JSON).exists() or not is_checkpoint
    facts = _artifact(folder) if is_artifact else _checkpoint(args.model, args.quant)
    if args.json:
        print(json.dumps(facts))
    else:
        _print(facts)
    return 0


def _artifact(folder: Path) -> dict[str, Any]:
    """Facts of an artifact: of each library those that it holds, and in `note` what it needs."""
    from qcc.runtime.artifact import Artifact, stored_metadata
    from qcc.runtime.engine.memory import report
    from qcc.runtime.engine.metadata import Metadata
    from qcc.runtime.errors import QccError
    from qcc.runtime.machine import BROWSER, missing

    artifact = Artifact.open(folder)
    artifact.verify()
    manifest = artifact.manifest
    libraries: dict[str, dict[str, Any]] = {}
    taken = _taken(artifact)
    for name, entry in manifest.libraries.items():
        facts = libraries[name] = {
            "file": entry.file,
            "bytes": entry.bytes,
            "isa": entry.isa,
            "default": folder / entry.file in taken,
        }
        lacking = ", ".join(missing(entry.requires))
        if entry.requires.get("machine") == BROWSER:
            needs = "".join(f", {name}" for name in entry.requires.get("features", ()))
            facts["note"] = f"for browsers with WebGPU{needs}: qcc package web makes a page of it"
        elif lacking:
            facts["note"] = f"this machine lacks {lacking}"
        path = folder / entry.file
        try:
            facts |= report(Metadata.parse(stored_metadata(path), str(path)))
        except QccError as err:
            # Of another version of qcc, maybe; the rest of the folder can be shown.
            facts.setdefault("note", str(err))
    weights = sum(record.nbytes for record in artifact.records.values())
    return {
        "artifact": str(folder),
        "model_type": artifact.chat_config.get("model_type"),
        "task": manifest.task,
        "source": dict(manifest.source),
        "scheme": manifest.scheme,
        "method": manifest.method,
        "calibration": (manifest.calibration or {}).get("asked"),
        "activations": None if manifest.activations == "none" else manifest.activations,
        "stored_bytes": weights,
        "sizes": dict(manifest.sizes),
        "libraries": libraries,
        "quality": manifest.quality,
    }


def _taken(artifact: Artifact) -> set[Path]:
    """The libraries that running takes here unless another is named: one of each target."""
    from qcc.runtime.errors import QccError

    found = set()
    for target in {name.split("-")[0] for name in artifact.manifest.libraries}:
        with suppress(QccError):  # none that this machine can run, as the notes say
            found.add(artifact.library(target))
    return found


def _checkpoint(model: str, quant: str | None) -> dict[str, Any]:
    """Facts of a checkpoint, and what its weights and KV cache would take with a scheme."""
    import dataclasses
    import math
    from contextlib import nullcontext

    from qcc.compiler.build import weight_specs
    from qcc.compiler.driver import DEFAULT_CHUNK, make_plan, open_checkpoint
    from qcc.compiler.options import CompileOptions
    from qcc.compiler.source import locate
    from qcc.runtime.artifact import tensor_bytes
    from qcc.runtime.errors import QccError

    source, options = locate(model), CompileOptions(quant=quant)
    try:
        checkpoint = open_checkpoint(source, options) if quant is None else None
    except QccError:
        checkpoint = None  # a config.json alone tells the sizes
    with checkpoint or nullcontext():
        plan = make_plan(source, options, DEFAULT_CHUNK, checkpoint)
    specs = weight_specs(plan)
    parts = [part for spec in specs for part in spec.stored]
    config = plan.config
    per_token = 2 * len(config.cache_layers) * config.num_key_value_heads * config.head_dim * 4
    per_token = 0 if plan.embedding else per_token
    parameters = sum(math.prod(spec.shape) for spec in specs)
    stored = sum(tensor_bytes(part.shape, part.dtype) for part in parts)
    return {
        "checkpoint": model,
        "model_type": config.model_type,
        "task": plan.task,
        "parameters": parameters,
        "config": dataclasses.asdict(config),
        "scheme": plan.scheme.name,
        "stored_bytes": stored,
        "bits_per_weight": 8 * stored / parameters,
        "sizes": plan.sizes.as_dict(),
        "kv_bytes_per_token": per_token,
        "state_bytes_per_sequence": 4 * sum(math.prod(s.shape) for s in config.states) or None,
        "kv_bytes": per_token * plan.sizes.max_positions,
    }


def _print(facts: dict[str, Any]) -> None:
    """Facts as aligned lines, the budget of each library as a block."""
    megabytes = "stored_bytes", "kv_bytes"
    for key, value in facts.items():
        if key in ("libraries", "quality") or value is None:
            continue
        if key in megabytes:
            text = f"{value / 1e6:,.1f} MB"
        elif isinstance(value, dict):
            simple = {k: v for k, v in value.items() if not isinstance(v, dict | list)}
            text = ", ".join(f"{k} {v}" for k, v in simple.items())
        elif isinstance(value, float):
            text = f"{value:.2f}"
        else:
            text = f"{value:,}" if isinstance(value, int) else str(value)
        print(f"{key.removesuffix('_bytes').replace('_', ' '):<20}{text}")
    if facts.get("quality"):
        print("\nquality")
        print("\n".join(_quality(facts["quality"], facts["artifact"])))
    for name, library in facts.get("libraries", {}).items():
        more = f", {library['isa']}" if library["isa"] else ""
        if library["default"] and len(facts["libraries"]) > 1:
            more += ", the one taken here"
        print(f"\nlibrary {name}  ({library['file']}, {library['bytes'] / 1e6:.1f} MB{more})")
        if "note" in library:
            print(f"  note: {library['note']}")
        if "budget" not in library:
            continue
        budget = library["budget"]
        print(f"  weights              {budget['weights'] / 1e6:10,.1f} MB")
        if facts["task"] != "embedding":
            each = f"{library['kv_bytes_per_token'] / 1e3:,.1f} kB"
            tokens = f"{library['kv_tokens']:,} tokens at {each}"
            print(f"  KV cache in full     {budget['kv_cache'] / 1e6:10,.1f} MB  ({tokens})")
            others = list(library["kv_caches"].items())[1:]
            for kv, size in others:
                print(f"    with --kv {kv:<9}{size / 1e6:10,.1f} MB")
        if budget["states"]:
            each = f"{library['state_bytes_per_sequence'] / 1e3:,.1f} kB a sequence"
            print(f"  states               {budget['states'] / 1e6:10,.1f} MB  ({each})")
        print(f"  temporaries          {budget['temporaries'] / 1e6:10,.1f} MB  of these:")
        for function, size in library["memory_usage"].items():
            print(f"    {function:<19}{size / 1e6:10,.1f} MB")
        print(f"  total                {budget['total'] / 1e6:10,.1f} MB")


def _quality(stored: Any, folder: str) -> list[str]:
    """The report that `qcc compile --eval` left, as lines."""
    from qcc.runtime.errors import QccError
    from qcc.runtime.eval.report import quality_lines
    from qcc.runtime.manifest import MALFORMED, QCC_JSON, what

    try:
        return quality_lines(stored)
    except MALFORMED as err:
        raise QccError(
            f"{folder}/{QCC_JSON}: quality: {what(err)}; measure again with qcc eval --store"
        ) from err
