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


def default_kv(precision: str | None) -> str:
    """How the KV cache keeps keys and values, if no one says."""
    return "f32" if precision == "high" else "f16"


def settings(precision: str | None, tiles: bool = True) -> dict[str, np.ndarray[Any, Any]]:
    """The settings of a library by name; None: the default.

    high: activations stay float32. low: int8 with a scale for each token and group, or bf16 where
    the processor multiplies tiles of it and a run has many tokens, unless `tiles` says no.

    Raises:
        QccError: an unknown precision.
    """
    precision = precision or DEFAULT_PRECISION
    if precision not in PRECISIONS:
        raise QccError(f"--precision {precision}: must be one of {', '.join(PRECISIONS)}")
    low = INT8_AND_TILES if tiles and enable_tiles() else INT8
    return {"precision": np.array([FLOAT if precision == "high" else low], np.int32)}
