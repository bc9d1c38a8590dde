"""SavedLogits: both sides of a comparison in an .npz file, window by window.

numpy.load reads it. Arrays of window i (of `windows`), V the vocabulary:
  tokens_i int32[n]   reference_i f32[n, V]   ours_i f32[n, V]
Of several artifacts ours_i, ours1_i, ours2_i, ... in the order of the command line. Rows of all
positions, the last included.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from qcc.runtime.files import os_errors, temporary_name


class SavedLogits:
    """A context manager; the file appears when it ends well."""

    def __init__(self, path: Path) -> None:
        """Begin the file under a temporary name."""
        self.path = path
        self.count = 0
        self._temporary = temporary_name(path)
        with os_errors(path, "write"):
            self._zip = zipfile.ZipFile(self._temporary, "w", allowZip64=True)

    def __enter__(self) -> SavedLogits:
        """Return self."""
        return self

    def add(
        self,
        ids: Sequence[int],
        ours: Sequence[npt.NDArray[Any]],
        reference: npt.NDArray[Any] | None,
    ) -> None:
        """Append one window."""
        index = self.count
        self._write(f"tokens_{index}", np.asarray(ids, np.int32))
        if reference is not None:
            self._write(f"reference_{index}", reference)
        for number, logits in enumerate(ours):
            self._write(f"ours{number or ''}_{index}", logits)
        self.count += 1

    def _write(self, name: str, array: npt.NDArray[Any]) -> None:
        with (
            os_errors(self.path, "write"),
            self._zip.open(f"{name}.npy", "w", force_zip64=True) as file,
        ):
            np.lib.format.write_array(file, np.asarray(array, order="C"), allow_pickle=False)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the file its name, or remove it after an error."""
        try:
            if kind is None:
                self._write("windows", np.array(self.count))
            with os_errors(self.path, "write"):
                self._zip.close()
                if kind is None:
                    os.replace(self._temporary, self.path)
        finally:
            with suppress(OSError):
                self._temporary.unlink(missing_ok=True)
