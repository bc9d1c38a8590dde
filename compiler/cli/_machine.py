"""What `qcc doctor` asks of the machine: packages, processor, memory, tools. Not a verb.

Every answer is plain data for JSON; nothing here imports TVM, and nothing raises when a thing is
missing: that is the answer.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

# What our kernels look for, under the names of /proc/cpuinfo: x86-64, then aarch64.
CPU_FEATURES = (
    *("avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2", "sme"),
)
# Optional packages: what they are for, and the extra of qcc that brings them.
OPTIONAL = {
    "torch": ("calibrated quantization methods, pickled checkpoints", "torch"),
    "transformers": ("tests only", "test"),
    "huggingface_hub": ("downloading models by hub id", "hub"),
}
# A tool: the commands of which one suffices, what it is for, the Debian package that brings it.
TOOLS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "linker": (("cc", "gcc", "clang"), "libraries for this machine", "gcc"),
    "aarch64 cross linker": (
        ("aarch64-linux-gnu-gcc",),
        "libraries for ARM machines",
        "gcc-aarch64-linux-gnu",
    ),
    "emcc": (("emcc",), "browser libraries (--target webgpu), once", "emscripten"),
    "wasm-ld": (
        ("wasm-ld", *(f"wasm-ld-{version}" for version in range(40, 13, -1))),
        "browser libraries (--target webgpu)",
        "lld",
    ),
    "wasm-opt": (("wasm-opt",), "small browser libraries (--opt O3)", "binaryen"),
    "node": (("node",), "web sites (qcc package web)", "nodejs"),
    "npm": (("npm",), "web sites (qcc package web), once", "npm"),
}


def packages() -> list[dict[str, Any]]:
    """qcc's dependencies and the optional packages: installed version, need, whether it is met."""
    from importlib.metadata import PackageNotFoundError, requires, version

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    rows = []
    for line in requires("qcc") or ():
        if ";" in line:
            continue  # an extra's
        name, need = re.fullmatch(r"([\w.-]+)\s*(.*)", line).groups()  # type: ignore[union-attr]
        have = installed(name)
        rows.append(
            {"name": name, "installed": have, "needs": need, "ok": satisfies(have, need)}
            | {"for": "required", "get": f"pip install '{name}{need}'"}
        )
    for name, (purpose, extra) in OPTIONAL.items():
        rows.append(
            {"name": name, "installed": installed(name), "needs": "optional", "ok": True}
            | {"for": purpose, "get": f"pip install 'qcc[{extra}]'"}
        )
    return rows


def satisfies(have: str | None, need: str) -> bool:
    """Whether version `have` meets `==X` exactly or `>=X` by its numbers; other needs pass."""
    if have is None:
        return False
    if need.startswith("=="):
        return have.split("+")[0] == need[2:]
    if need.startswith(">="):
        return _numbers(have) >= _numbers(need[2:])
    return True


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def cpu() -> dict[str, Any]:
    """Name, architecture, cores that this process may use, and the features that kernels use."""
    name, flags = platform.processor() or platform.machine(), set[str]()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            if key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    except OSError:
        pass  # not Linux: no feature list
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "name": name,
        "architecture": platform.machine(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "features": [feature for feature in CPU_FEATURES if feature in flags],
    }


def memory() -> dict[str, int]:
    """Bytes of memory: all, and available."""
    import psutil

    state = psutil.virtual_memory()
    return {"total": state.total, "available": state.available}


def storage() -> dict[str, Any]:
    """The cache folder, its size and what is free on its disk, in bytes."""
    from qcc.runtime.files import cache_dir

    folder = cache_dir()
    existing = folder
    while not existing.exists():
        existing = existing.parent
    size = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                size += os.lstat(os.path.join(root, name)).st_size
            except OSError:
                pass  # gone meanwhile
    return {"cache": str(folder), "size": size, "free": shutil.disk_usage(existing).free}


def tools() -> list[dict[str, Any]]:
    """Outside programs: where they are, what they are for, how to get them."""
    rows = []
    for name, (commands, purpose, package) in TOOLS.items():
        found = next((path for path in map(shutil.which, commands) if path), None)
        rows.append(
            {"name": name, "path": found, "for": purpose, "get": f"apt-get install {package}"}
        )
    return rows


def missing_linker(triple: str | None) -> str:
    """What to install before a library for `triple` (None: this machine) links; empty: nothing."""
    name = "linker" if triple is None else f"{triple.split('-')[0]} cross linker"
    for row in tools():
        if row["name"] == name and row["path"] is None:
            return f"no {name}; get it: {row['get']}"
    return ""


def gpus() -> list[dict[str, str]]:
    """NVIDIA GPUs with memory and driver, as nvidia-smi tells; none without it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = (line.split(", ") for line in done.stdout.strip().splitlines())
    return [dict(zip(("name", "memory", "driver"), row, strict=False)) for row in rows]
