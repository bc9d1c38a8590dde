"""What this machine is, and whether a library's code runs on it."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

_NAMES = {"amd64": "x86_64", "arm64": "aarch64"}


def cpu_flags() -> set[str]:
    """Flags of the processor as Linux names them; empty where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return set()
    for line in text.splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.split(":", 1)[1].split())
    return set()


BROWSER = "wasm32"  # the machine of libraries that a browser runs


def missing(requires: Mapping[str, Any]) -> list[str]:
    """What a library needs and this machine lacks: {"machine": "x86_64", "flags": [...]}."""
    here = platform.machine().lower()
    machine = requires.get("machine")
    if machine is not None and machine != _NAMES.get(here, here):
        return [f"an {machine} processor"]
    have = cpu_flags()
    return sorted(set(requires.get("flags", ())) - have) if have else []


@cache
def enable_tiles() -> bool:
    """Whether this process may use AMX tiles of bf16; Linux wants to be asked once.

    arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA), Documentation/arch/x86/xstate.rst.
    """
    if not {"amx_tile", "amx_bf16"} <= cpu_flags():
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0)


def available_bytes() -> int:
    """Memory that this process can still take: the machine's, or its control group's if less."""
    import psutil

    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
        stat = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        # Files of the page cache count as used, though the kernel gives them up when asked.
        files = sum(int(line.split()[1]) for line in stat if line.startswith("inactive_file "))
    except (OSError, ValueError, IndexError):
        return free  # "max", or no control group
    return min(free, max(0, limit - used + files))
