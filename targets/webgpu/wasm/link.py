"""One wasm module of a model's objects and the runtime: plain wasm-ld, well under a second."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from qcc.runtime.files import os_errors, write_file
from qcc.targets.spec import Tell
from qcc.targets.webgpu.wasm.contract import CALLED, START, check_contract
from qcc.targets.webgpu.wasm.runtime import is_cached, runtime_object
from qcc.targets.webgpu.wasm.tools import PACKAGES, find_tool, need_tool, run_tool

STACK = 5 << 20  # bytes
INITIAL_MEMORY = 160 << 20  # bytes of the module's memory at the start, and at most
MAX_MEMORY = 2 << 30
FLAGS = (
    *("--import-undefined", "--fatal-warnings", "--strip-all", "--gc-sections"),
    *("-z", f"stack-size={STACK}"),
    *(f"--initial-memory={INITIAL_MEMORY}", f"--max-memory={MAX_MEMORY}"),
    *(f"--entry={START}", *(f"--export={name}" for name in CALLED)),
)
# Many templates differ in a constant: merged, they are a tenth. -Oz would save 2 % more, in 70 s.
SMALLER = (
    *("--enable-exception-handling", "-O1"),
    *("--merge-similar-functions", "--duplicate-function-elimination"),
)


def link_wasm(
    objects: Sequence[bytes | Path], path: Path, opt: int = 2, tell: Tell = lambda _: None
) -> None:
    """Link a model's objects with the runtime into the library at `path`, and check its contract.

    Args:
        objects: relocatable wasm objects, or the paths of such.
        path: the library; it is there whole or, after an error, not at all.
        opt: from 3 on wasm-opt makes it a quarter smaller, in 15 s.
        tell: shows a text while something takes long.

    Raises:
        QccError: a program is missing or fails, a symbol that nobody has, the disk is full.
    """
    linker = need_tool("wasm-ld")
    optimizer = need_tool("wasm-opt") if opt >= 3 else None
    runtime = runtime_object(tell)
    with os_errors(path, "write"), tempfile.TemporaryDirectory(prefix="qcc-wasm-") as work:
        files = [_as_file(item, Path(work) / f"{index}.o") for index, item in enumerate(objects)]
        linked = Path(work) / "linked.wasm"
        run_tool([linker, "-o", linked, *files, runtime, *FLAGS])
        if optimizer is not None:
            tell("wasm: making it small, about 15 s")
            run_tool([optimizer, *SMALLER, linked, "-o", linked])
        wasm = linked.read_bytes()
        check_contract(wasm, path)
        write_file(path, wasm)


def lacks() -> str:
    """What must come before a library is linked in a moment, in one line; empty: nothing."""
    for tool in ("emcc", "wasm-ld"):
        if find_tool(tool) is None:
            return f"no {tool}; get it: apt-get install {PACKAGES[tool]}"
    return "" if is_cached() else "the first compile builds the wasm runtime, in about 2 minutes"


def _as_file(item: bytes | Path, path: Path) -> Path:
    if isinstance(item, Path):
        return item
    path.write_bytes(item)
    return path
