"""What is chosen when a model is loaded, as the tensors that a library's kernels read."""

from __future__ import annotations

from typing import Any

import numpy as np

from qcc.runtime.errors import QccError
from qcc.runtime.machine import enable_tiles

PRECISIONS = ("high", "low")
DEFAULT_PRECISION = "low"
# Values of a CPU library's setting `precision`.
FLOAT, INT8, INT8_AND_TILES = 0, 1, 2


def choose_precision(wanted: str | None, compiled: str) -> str:
    """The precision of a run; None: low, where the library has both.

    Raises:
        QccError: an unknown precision, or low of a library compiled for high alone.
    """
    if wanted is not None and wanted not in PRECISIONS:
        raise QccError(f"--precision {wanted}: must be one of {', '.join(PRECISIONS)}")
    if compiled == "high" and wanted == "low":
        raise QccError(
            "--precision low: the library was compiled with --precision high; compile it again "
            "without"
        )
    return wanted or ("high" if compiled == "high" else DEFAULT_PRECISION)


def default_kv(precision: str) -> str:
    """How the KV cache keeps keys and values, if no one says."""
    return "f32" if precision == "high" else "f16"


def settings(precision: str, tiles: bool = True) -> dict[str, np.ndarray[Any, Any]]:
    """The settings of a library by name.

    high: activations stay float32. low: int8 with a scale for each token and group, or bf16 where
    the processor multiplies tiles of it and a run has many tokens, unless `tiles` says no.
    """
    low = INT8_AND_TILES if tiles and enable_tiles() else INT8
    return {"precision": np.array([FLOAT if precision == "high" else low], np.int32)}
