"""qcc doctor: what this machine can build and run, and how to get what is missing."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

from qcc.compiler.cli import _machine

HELP = "show what this machine can build and run, and how to get what is missing"
EXAMPLE = """
qcc doctor
qcc doctor --json
"""
# Other machines that a target can build for: architecture -> triple.
CROSS = {"aarch64": "aarch64-linux-gnu"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the verb's options."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Examine, print; 0 when the CPU target builds and runs, else 1."""
    report = examine()
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
    return 0 if report["ok"] else 1


def examine() -> dict[str, Any]:
    """All answers; `ok` says whether the CPU target builds and runs here."""
    targets = check_targets()
    return {
        "ok": any(row["target"] == "cpu" and row["builds"] and row["runs"] for row in targets),
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "system": platform.platform(terse=True),
        "packages": _machine.packages(),
        "llvm": check_llvm(),
        "cpu": _machine.cpu(),
        "memory": _machine.memory(),
        "storage": _machine.storage(),
        "tools": _machine.tools(),
        "wasm": check_wasm(),
        "gpus": _machine.gpus(),
        "targets": targets,
    }


def check_llvm() -> dict[str, Any] | None:
    """LLVM of the TVM wheel: version, back ends, processor and triple of this machine."""
    try:
        from tvm.target import codegen
    except (ImportError, OSError, RuntimeError):  # not installed, or it does not load
        return None
    return {
        "version": int(codegen.llvm_version_major()),
        "backends": sorted(str(name) for name in codegen.llvm_get_targets()),
        "processor": str(codegen.llvm_get_system_cpu()),
        "triple": str(codegen.llvm_get_system_triple()),
    }


def check_wasm() -> dict[str, str | None]:
    """Versions of the programs that make libraries for browsers; None: not installed."""
    from qcc.targets.webgpu.wasm.tools import version_of

    return {name: version_of(name) for name in ("emcc", "wasm-ld", "wasm-opt")}


def check_targets() -> list[dict[str, Any]]:
    """For each target, and each machine it can build for: does a small program build and run?"""
    from qcc.targets import list_targets

    rows = []
    for name in list_targets():
        rows.append({"target": name, "machine": "this one"} | _try(name, None))
        if name == "cpu":
            for machine, triple in CROSS.items():
                if platform.machine() != machine:
                    rows.append({"target": name, "machine": machine} | _try(name, triple))
    return rows


def _try(name: str, triple: str | None) -> dict[str, Any]:
    """Build and run x + x; whatever fails is the answer, in one line."""
    answer = {"builds": False, "runs": False, "note": ""}
    try:
        answer["builds"], answer["runs"], answer["note"] = try_target(name, triple)
    except Exception as err:  # noqa: BLE001 (a diagnosis reports every failure)
        lines = str(err).strip().splitlines() or [""]
        answer["note"] = f"{type(err).__name__}: {lines[-1]}"
    return answer


def try_target(name: str, triple: str | None) -> tuple[bool, bool, str]:
    """Build x + x with the target's own export; run it where its device exists.

    Returns (builds, runs, note).
    """
    from qcc.runtime.engine.device import open_device
    from qcc.runtime.errors import QccError
    from qcc.targets import find_target
    from qcc.targets.spec import BuildOptions

    spec = find_target(name)
    native = spec.library_extension == "so"
    if missing := spec.lacks() or (_machine.missing_linker(triple) if native else ""):
        return False, False, missing

    import numpy as np
    import tvm
    from tvm import relax

    options = BuildOptions(triple=triple) if triple is None else BuildOptions("generic", triple)
    target, suffix = spec.resolve(options)
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((4,), "float32"))
    with builder.function("main", [x]):
        builder.emit_func_output(builder.emit(relax.op.add(x, x)))
    with tempfile.TemporaryDirectory(prefix="qcc-doctor-") as folder:
        library = Path(folder) / f"{suffix}.{spec.library_extension}"
        with target:
            spec.export(relax.build(builder.get(), target), library, options, lambda _: None)
        if triple is not None:
            return True, False, "cross-compiled: copy the artifact there and run it"
        try:
            open_device(name)
        except QccError as err:
            return True, False, str(err)
        device = tvm.device(target.get_target_device_type(), 0)
        if not device.exist:
            return True, False, f"no {device} device"
        machine = relax.VirtualMachine(tvm.runtime.load_module(str(library)), device)
        data = np.arange(4, dtype="float32")
        doubled = machine["main"](tvm.runtime.tensor(data, device)).numpy()
        if not np.array_equal(doubled, data + data):
            return True, False, f"wrong numbers: {doubled.tolist()}"
    return True, True, ""


def show(report: dict[str, Any]) -> None:
    """Print the report for a person."""
    python, cpu, memory, storage = (report[k] for k in ("python", "cpu", "memory", "storage"))
    gib = 2.0**30
    _line("Python", f"{python['version']} ({python['executable']}), {report['system']}")
    for row in report["packages"]:
        mark = "BAD" if not row["ok"] else "ok" if row["installed"] else "-"
        have = row["installed"] or "not installed"
        text = f"{row['name']:<18}{have:<16}{row['needs']:<16}{row['for']}"
        _line(f"  {mark}", text if mark == "ok" else f"{text}; get it: {row['get']}")
    if report["llvm"]:
        llvm = report["llvm"]
        _line("LLVM", f"{llvm['version']} in the TVM wheel, {len(llvm['backends'])} back ends")
        _line("", f"takes this machine for {llvm['processor']}, {llvm['triple']}")
    _line("Processor", f"{cpu['name']}, {cpu['cores']} cores")
    _line("", " ".join(cpu["features"]) or "features unknown")
    available, total = memory["available"] / gib, memory["total"] / gib
    _line("Memory", f"{available:.1f} GiB available of {total:.1f}")
    _line("Disk", f"{storage['free'] / gib:.1f} GiB free")
    _line("Cache", f"{storage['cache']}, {storage['size'] / gib:.2f} GiB")
    for row in report["tools"]:
        where = row["path"] or f"not found; get it: {row['get']}"
        _line("Tool", f"{row['name']} for {row['for']}: {where}")
    versions = (f"{name} {version or '-'}" for name, version in report["wasm"].items())
    _line("Wasm", ", ".join(versions))
    for gpu in report["gpus"]:
        _line("GPU", f"{gpu['name']}, {gpu['memory']}, driver {gpu['driver']}")
    if not report["gpus"]:
        _line("GPU", "no NVIDIA driver found")
    for row in report["targets"]:
        builds, runs = ("yes" if row[key] else "no" for key in ("builds", "runs"))
        text = f"{row['target']}, {row['machine']}: builds: {builds}, runs here: {runs}"
        _line("Target", f"{text}; {row['note']}" if row["note"] else text)
    if not report["ok"]:
        print("The CPU target does not work here: see the lines with BAD, not found, or no.")


def _line(label: str, text: str) -> None:
    print(f"{label:<10}{text}")
