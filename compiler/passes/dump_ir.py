"""DumpIR: an instrument that writes the module after every pass, for `qcc compile --dump-ir`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import tvm
from tvm import tirx
from tvm.ir.instrument import pass_instrument

from qcc.quant_schemes.attributes import SCHEDULED


@pass_instrument
class DumpIR:
    """Writes NNN-<pass>.txt (all but the kernels), kernels/<name>.txt and times.txt."""

    def __init__(self, folder: Path) -> None:
        """Make the folder."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.count = len(list(folder.glob("[0-9]*.txt")))  # two runs may share the folder
        self.started: list[float] = []

    def run_before_pass(self, _mod: tvm.IRModule, _info: Any) -> None:
        """Start the clock of a pass."""
        self.started.append(time.perf_counter())

    def run_after_pass(self, mod: tvm.IRModule, info: Any) -> None:
        """Write the module and the pass's time."""
        seconds = time.perf_counter() - self.started.pop()
        if len(self.started) != 1:  # the sequence itself, or a pass within a pass
            return
        self.count += 1
        name = f"{self.count:03d}-{str(info.name).replace('/', '.')}"
        # A scheduled kernel is long and no pass changes it: it is written once, by its name.
        kernels = {gv: func for gv, func in mod.functions_items() if _is_kernel(func)}
        for gv, func in kernels.items():
            path = self.folder / "kernels" / f"{gv.name_hint}.txt"
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                path.write_text(func.script(), encoding="utf-8")
        rest = {gv: func for gv, func in mod.functions_items() if gv not in kernels}
        text = "\n\n".join(
            f"# {gv.name_hint}\n{func.script(show_meta=False)}" for gv, func in rest.items()
        )
        (self.folder / f"{name}.txt").write_text(text, encoding="utf-8")
        with (self.folder / "times.txt").open("a", encoding="utf-8") as times:
            times.write(f"{seconds:9.3f} s  {name}\n")


def _is_kernel(func: Any) -> bool:
    return isinstance(func, tirx.PrimFunc) and bool(func.attrs) and SCHEDULED in func.attrs
