"""qcc.targets: how a device runs a compiled model; one folder a target, its name after --target.

  spec.py   TargetSpec, the questions that the compiler asks of every target
  matching.py  the linear layers and table rows that a lowering looks for, of any target
  sources.py   the norms and gates around them
  kernel.py    a PrimFunc written by hand, of any target; attention.py  those that a KV cache calls
  cpu/      LLVM CPU: x86-64 and aarch64
  gpu/      the kernels that GPU targets share
  webgpu/   browsers: wasm and WGSL; vulkan/  the same shaders, natively

A target's folder defines one object, TARGET; discovery lists the folders and imports one only when
it is asked for.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from qcc.quant_schemes.errors import did_you_mean
from qcc.runtime.errors import QccError

if TYPE_CHECKING:
    from qcc.targets.spec import TargetSpec

# Folders that several targets share; they define no TARGET.
_SHARED = {"gpu"}


def list_targets() -> list[str]:
    """Names of the targets, sorted; imports none of them."""
    folders = (init.parent.name for init in Path(__file__).parent.glob("*/__init__.py"))
    return sorted(name for name in folders if name not in _SHARED and not name.startswith("_"))


def find_target(name: str) -> TargetSpec:
    """The TARGET of folder `name`.

    Raises:
        QccError: there is no such target.
    """
    known = list_targets()
    if name not in known:
        raise QccError(
            f"--target: unknown target {name!r}{did_you_mean(name, known)}; "
            f"targets: {', '.join(known)} (qcc list targets)"
        )
    spec: TargetSpec = importlib.import_module(f"{__name__}.{name}").TARGET
    return spec
