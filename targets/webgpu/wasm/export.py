"""From a compiled VM executable to a wasm library."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from qcc.targets.spec import BuildOptions, Tell
from qcc.targets.webgpu.wasm.link import link_wasm


def export_wasm(
    executable: Any, path: Path, options: BuildOptions, tell: Tell = lambda _: None
) -> None:
    """Write the compiled VM executable as a wasm library at `path`.

    Raises:
        QccError: as link_wasm's.
    """

    def link(_output: str, objects: list[str], **_: Any) -> None:
        link_wasm([Path(name) for name in objects], path, options.opt, tell)

    # export_library asks its link function what objects it takes: LLVM's bitcode is too new.
    link.object_format = "o"  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory(prefix="qcc-wasm-") as work:
        executable.export_library(str(Path(work) / path.name), fcompile=link, workspace_dir=work)
