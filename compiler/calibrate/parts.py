"""Parts: what a calibration has finished, on disk, so that an interrupted one goes on.

work/NAME.npz holds the stored parts of a weight by suffix (bfloat16 as uint16 of its bits), and
work/STAGE.json the names of all weights of a stage; it is written last. Both are whole or absent.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qcc.compiler.weights.spec import WeightSpec
from qcc.quant_schemes.packing import Array, float_dtype
from qcc.runtime.errors import QccError
from qcc.runtime.files import os_errors, read_json, remove_stale, write_file

Stored = Mapping[str, Array]


class Parts:
    """The folder `work`, which belongs to one calibration: same source, formats, method, text."""

    def __init__(self, work: Path) -> None:
        """Make the folder; remove what a killed process left half written."""
        self.work = work
        with os_errors(work, "make"):
            work.mkdir(parents=True, exist_ok=True)
        remove_stale(work)

    def save(self, spec: WeightSpec, parts: Stored) -> None:
        """Write a weight's parts, which are as its format stores them."""
        plain: dict[str, Any] = {
            suffix: part.view(np.uint16) if part.dtype == float_dtype("bfloat16") else part
            for suffix, part in parts.items()
        }
        write_file(self._path(spec), lambda file: np.savez(file, **plain))

    def load(self, spec: WeightSpec) -> dict[str, Array] | None:
        """A weight's parts; None where they are absent, damaged or of another format."""
        try:
            with np.load(self._path(spec), allow_pickle=False) as file:
                plain = {suffix: file[suffix] for suffix in file.files}
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
            return None
        parts = {}
        prefix = spec.name.removesuffix("weight")
        for stored in spec.stored:
            suffix = "weight" if spec.format.is_float else stored.name.removeprefix(prefix)
            part = plain.pop(suffix, None)
            if part is not None and stored.dtype == "bfloat16" and part.dtype == np.uint16:
                part = part.view(float_dtype("bfloat16"))
            if part is None or part.shape != stored.shape or part.dtype.name != stored.dtype:
                return None
            parts[suffix] = part
        return None if plain else parts

    def finish(self, stage: str, names: Iterable[str]) -> None:
        """Say that these weights are all that a stage makes."""
        write_file(self.work / f"{stage}.json", json.dumps({"stored": list(names)}))

    def finished(
        self, stage: str, specs: Mapping[str, WeightSpec]
    ) -> dict[str, dict[str, Array]] | None:
        """The parts by name of all weights of a stage; None: it must be made (again)."""
        path = self.work / f"{stage}.json"
        if not path.is_file():
            return None
        try:
            names = read_json(path, "").get("stored")
        except QccError:
            return None  # damaged: made again
        found = {}
        for name in names if isinstance(names, list) else [""]:
            parts = self.load(specs[name]) if name in specs else None
            if parts is None:
                return None
            found[name] = parts
        return found

    def _path(self, spec: WeightSpec) -> Path:
        return self.work / f"{spec.name}.npz"
