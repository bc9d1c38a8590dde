"""The outside programs that make wasm: where they are, their versions, how to get them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from qcc.runtime.errors import QccError

PACKAGES = {
    "emcc": "emscripten",
    "em-config": "emscripten",
    "wasm-ld": "lld",
    "wasm-opt": "binaryen",
}
_NEWEST_LLVM = 40  # LLVM's programs are also installed as NAME-VERSION


def find_tool(name: str) -> str | None:
    """The path of `emcc`, `wasm-ld` or `wasm-opt`, or None."""
    if found := shutil.which(name):
        return found
    if name == "wasm-ld":
        versions = range(_NEWEST_LLVM, 13, -1)
        return next((path for v in versions if (path := shutil.which(f"{name}-{v}"))), None)
    return None


def need_tool(name: str) -> str:
    """The path of a program.

    Raises:
        QccError: it is not installed; the message names Debian's package.
    """
    path = find_tool(name)
    if path is None:
        raise QccError(
            f"--target webgpu needs {name}, which is not installed: "
            f"apt-get install {PACKAGES[name]} (qcc doctor shows all that is missing)"
        )
    return path


def version_of(name: str) -> str | None:
    """The version that a program tells, as 3.1.6; None: not installed, or it does not run."""
    path = find_tool(name)
    if path is None:
        return None
    try:
        told = run_tool([path, "--version"])
    except QccError:
        return None
    found = re.search(r"\d+(\.\d+)+|\d+", told)
    return found[0] if found else None


def run_tool(command: Sequence[str | Path]) -> str:
    """Run a program to its end; what it printed.

    Raises:
        QccError: it cannot be started or it failed; in one line, with its first error.
    """
    try:
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, check=False
        )
    except OSError as err:
        raise QccError(f"{command[0]} does not start: {err.strerror}") from err
    if done.returncode:
        raise QccError(f"{command[0]} failed: {first_error(done.stderr, done.returncode)}")
    return done.stdout


def first_error(output: str, code: int) -> str:
    """The line of a program's output that tells why it failed with exit status `code`."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line or "No space left" in line]
    return (errors or lines or [f"exit status {code}, without a word"])[0]
