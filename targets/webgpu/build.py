"""The WebGPU target, and a library's wasm from what TVM compiled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qcc.runtime.errors import QccError
from qcc.runtime.machine import BROWSER
from qcc.targets.spec import BuildOptions, Tell

HOST = {
    "kind": "llvm",
    "mtriple": "wasm32-unknown-unknown-wasm",
    "mcpu": "mvp",
    "vector-width": 128,
}
SUFFIX = "webgpu"


def resolve(options: BuildOptions) -> tuple[Any, str]:
    """(tvm Target, library suffix `webgpu`).

    Raises:
        QccError: a processor or triple, which a browser does not have.
    """
    import tvm

    if options.mcpu != "native" or options.triple is not None:
        raise QccError("--mcpu and --triple are for --target cpu; a browser's library has neither")
    return tvm.target.Target({"kind": "webgpu"}, host=HOST), SUFFIX


def requires(_target: Any) -> dict[str, Any]:
    """No machine of Linux's names runs it."""
    return {"machine": BROWSER, "flags": []}


def export(executable: Any, path: Path, options: BuildOptions, tell: Tell) -> Mapping[str, Any]:
    """Check the kernels and link the wasm at `path`; returns the features that they need.

    Raises:
        QccError: a kernel beyond WebGPU's portable limits, or no linker.
    """
    from qcc.targets.gpu.check import check_shaders
    from qcc.targets.gpu.limits import Limits
    from qcc.targets.gpu.shaders import shaders
    from qcc.targets.webgpu.wasm.export import export_wasm

    features = check_shaders(shaders(executable.mod), Limits())
    export_wasm(executable, path, options, tell)
    return {"features": features}
