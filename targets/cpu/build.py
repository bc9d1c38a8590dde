"""Processor names, cross compiling and linking of the CPU target's shared library."""

from __future__ import annotations

import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from qcc.runtime.errors import QccError
from qcc.runtime.files import os_errors
from qcc.runtime.machine import cpu_flags
from qcc.targets.spec import BuildOptions, Tell

HOST_TRIPLES = {"x86_64": "x86_64-unknown-linux-gnu", "aarch64": "aarch64-unknown-linux-gnu"}
CROSS_LINKERS = {"x86_64": "x86_64-linux-gnu-gcc", "aarch64": "aarch64-linux-gnu-gcc"}
# LLVM's feature -> Linux's flag in /proc/cpuinfo, of what LLVM uses unasked where it may.
X86_64 = {
    "sse3": "pni", "ssse3": "ssse3", "sse4.1": "sse4_1", "sse4.2": "sse4_2", "popcnt": "popcnt",
    "lzcnt": "abm", "bmi": "bmi1", "bmi2": "bmi2", "movbe": "movbe", "gfni": "gfni",
    "avx": "avx", "avx2": "avx2", "fma": "fma", "f16c": "f16c", "fma4": "fma4", "xop": "xop",
    "avxvnni": "avx_vnni", "avxifma": "avx_ifma", "avxneconvert": "avx_ne_convert",
    "avxvnniint8": "avx_vnni_int8", "avx512f": "avx512f", "avx512bw": "avx512bw",
    "avx512vl": "avx512vl", "avx512dq": "avx512dq", "avx512cd": "avx512cd",
    "avx512vnni": "avx512_vnni", "avx512bf16": "avx512_bf16", "avx512fp16": "avx512_fp16",
    "avx512ifma": "avx512ifma", "avx512vbmi": "avx512vbmi", "avx512vbmi2": "avx512_vbmi2",
    "avx512bitalg": "avx512_bitalg", "avx512vpopcntdq": "avx512_vpopcntdq",
}  # fmt: skip
AARCH64 = {
    "neon": "asimd", "lse": "atomics", "rdm": "asimdrdm", "fullfp16": "asimdhp",
    "dotprod": "asimddp", "fp16fml": "asimdfhm", "rcpc": "lrcpc", "rcpc-immo": "ilrcpc",
    "complxnum": "fcma", "i8mm": "i8mm", "bf16": "bf16", "sha3": "sha3", "sve": "sve",
    "sve2": "sve2", "mops": "mops", "cssc": "cssc",
}  # fmt: skip
FEATURES = {"x86_64": X86_64, "aarch64": AARCH64}
# Tiles are used where the setting `precision` asks for them, which the runtime sets where they are.
HIGH_ONLY = "high-precision"  # a key of a target whose code computes in float32 only
AMX = {"amx-tile": "amx_tile", "amx-int8": "amx_int8", "amx-bf16": "amx_bf16"}


def resolve(options: BuildOptions) -> tuple[Any, str]:
    """(tvm Target, library suffix `cpu-<mcpu>`) for a host or a named processor.

    Raises:
        QccError: a processor or triple that LLVM does not know, a precision that cannot be.
    """
    import tvm

    triple = options.triple or tvm.target.codegen.llvm_get_system_triple()
    machine = _machine(triple)
    native = options.mcpu == "native"
    if native and machine != platform.machine():
        raise QccError(
            f"--mcpu native means this machine ({platform.machine()}); with --triple {triple} "
            "name a processor, as --mcpu cortex-a76"
        )
    mcpu = str(tvm.target.codegen.llvm_get_system_cpu()) if native else options.mcpu
    known = [str(name) for name in tvm.target.codegen.llvm_get_cpu_archlist(_probe(triple))]
    if mcpu not in known:
        from difflib import get_close_matches

        close = get_close_matches(mcpu, known, n=3)
        raise QccError(
            f"--mcpu {mcpu!r} is not a processor that LLVM knows for {triple}"
            + (f"; close: {', '.join(close)}" if close else "")
        )
    description: dict[str, Any] = {"kind": "llvm", "mcpu": mcpu}
    if options.triple or machine != platform.machine():
        description["mtriple"] = triple
    if options.precision not in ("both", "high"):
        raise QccError(f"--precision {options.precision}: a library has both, or high alone")
    if options.precision == "high":
        description["keys"] = ["cpu", HIGH_ONLY]
    if native:
        description["mattr"] = _host_attributes(mcpu)
        if not description["mattr"]:
            del description["mattr"]
    # `generic` says nothing without the machine.
    suffix = f"cpu-{machine}-{mcpu}" if mcpu == "generic" else f"cpu-{mcpu}"
    return tvm.target.Target(description), suffix


def _machine(triple: str) -> str:
    machine = triple.split("-")[0]
    machine = {"arm64": "aarch64", "amd64": "x86_64"}.get(machine, machine)
    if machine not in HOST_TRIPLES:
        raise QccError(f"--triple {triple!r}: supported processors are x86_64 and aarch64")
    return machine


def _probe(triple: str) -> Any:
    import tvm

    return tvm.target.Target({"kind": "llvm", "mtriple": triple})


def _host_attributes(mcpu: str) -> list[str]:
    """Features where this machine differs from LLVM's description of `mcpu`, as +name or -name.

    LLVM tells a processor by its model number; a virtual machine may show an older number than its
    features, or hide features, and code for the bare name would then stop with SIGILL.
    """
    import tvm

    flags = cpu_flags()
    if not flags:
        return []
    named = tvm.target.Target({"kind": "llvm", "mcpu": mcpu})
    attributes = []
    for feature, flag in (FEATURES[platform.machine()] | AMX).items():
        described = tvm.target.codegen.llvm_cpu_has_features(feature, named)
        if (flag in flags) != described:
            attributes.append(f"{'-' if described else '+'}{feature}")
    return attributes


def requires(target: Any) -> dict[str, Any]:
    """The machine and the processor flags that code for `target` may use."""
    import tvm

    machine = _machine(str(target.attrs.get("mtriple", "")) or platform.machine())
    flags = [
        flag
        for feature, flag in FEATURES[machine].items()
        if tvm.target.codegen.llvm_cpu_has_features(feature, target)
    ]
    return {"machine": machine, "flags": flags}


def find_linker(machine: str) -> str | None:
    """A program that links shared objects for `machine`, or None."""
    names = ["cc", "gcc", "clang"] if machine == platform.machine() else [CROSS_LINKERS[machine]]
    return next((path for name in names if (path := shutil.which(name))), None)


def export(executable: Any, path: Path, options: BuildOptions, _tell: Tell) -> dict[str, Any]:
    """Write the compiled VM executable as a shared library at `path`; it needs nothing besides.

    Raises:
        QccError: no linker, or the linker failed; the message says which package has it.
    """
    machine = _machine(options.triple) if options.triple else platform.machine()
    linker = find_linker(machine)
    if linker is None:
        needed = (
            "gcc" if machine == platform.machine() else f"gcc-{machine.replace('_', '-')}-linux-gnu"
        )
        raise QccError(f"no linker for {machine} shared objects: install Debian's package {needed}")

    def link(output: str, objects: list[str], **_: Any) -> None:
        command = [linker, "-shared", "-fPIC", "-s", "-o", output, *objects]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = "; ".join(line.strip() for line in done.stderr.splitlines() if line.strip())
            raise QccError(f"{path}: {linker} failed: {reason}")

    with tempfile.TemporaryDirectory() as work, os_errors(path, "write"):
        linked = Path(work) / path.name
        executable.export_library(str(linked), fcompile=_with_format(link), workspace_dir=work)
        shutil.move(linked, path)
    return {}


def _with_format(link: Any) -> Any:
    """export_library asks its link function what objects it takes."""
    link.object_format = "o"
    return link
