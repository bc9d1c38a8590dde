"""DumpIR: an instrument that writes the module after every pass, for `qcc compile --dump-ir`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import tvm
from tvm.ir.instrument import pass_instrument


@pass_instrument
class DumpIR:
    """Writes NNN-<pass>.txt and times.txt; kernels whose script cannot be printed are named."""

    def __init__(self, folder: Path) -> None:
        """Make the folder."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.count = 0
        self.started: list[float] = []

    def run_before_pass(self, _mod: tvm.IRModule, _info: Any) -> None:
        """Start the clock of a pass."""
        self.started.append(time.perf_counter())

    def run_after_pass(self, mod: tvm.IRModule, info: Any) -> None:
        """Write the module and the pass's time."""
        seconds = time.perf_counter() - self.started.pop()
        if info.name == "sequential":
            return
        self.count += 1
        name = f"{self.count:03d}-{str(info.name).replace('/', '.')}"
        (self.folder / f"{name}.txt").write_text(mod.script(show_meta=False), encoding="utf-8")
        with (self.folder / "times.txt").open("a", encoding="utf-8") as times:
            times.write(f"{seconds:9.3f} s  {name}\n")
