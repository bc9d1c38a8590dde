"""The choice of a precision, and libraries that leave none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qcc.compiler import CompileOptions, compile_model
from qcc.runtime import LLM
from qcc.runtime.engine.settings import (
    FLOAT,
    INT8,
    INT8_AND_TILES,
    choose_precision,
    default_kv,
    settings,
)
from qcc.runtime.errors import QccError
from qcc.targets.cpu.kernels.activations import HIGH, LOW, TILES
from qcc.targets.spec import BuildOptions


def test_low_is_the_default_where_there_is_a_choice() -> None:
    assert choose_precision(None, "both") == "low" and choose_precision("high", "both") == "high"
    assert choose_precision(None, "high") == "high"
    assert default_kv("low") == "f16" and default_kv("high") == "f32"
    with pytest.raises(QccError, match="--precision medium: must be one of high, low"):
        choose_precision("medium", "both")
    with pytest.raises(QccError, match="compiled with --precision high"):
        choose_precision("low", "high")


def test_settings_are_what_kernels_read() -> None:
    """The runtime imports no target, so these numbers stand in both."""
    assert (FLOAT, INT8, INT8_AND_TILES) == (HIGH, LOW, TILES)
    assert settings("high")["precision"].tolist() == [FLOAT]
    assert settings("low")["precision"][0] > FLOAT


def test_a_library_of_high_precision(bundled: Path, tmp_path: Path) -> None:
    """It has no kernels for int8, and gives what a library with both gives in high precision."""
    made = {}
    for name in ("both", "high"):
        options = CompileOptions(quant="q4f16_1", build=BuildOptions(precision=name))
        folder = compile_model(str(bundled), tmp_path / name, options)
        made[name] = LLM(folder, precision="high")
    assert made["high"].model.library.metadata.precision == "high"
    sizes = {name: llm.model.library.path.stat().st_size for name, llm in made.items()}
    assert sizes["high"] < 0.8 * sizes["both"], sizes
    ids = list(range(20, 60))
    np.testing.assert_array_equal(made["high"].logits(ids), made["both"].logits(ids))
    assert LLM(made["high"].artifact.folder).model.precision == "high"
    with pytest.raises(QccError, match="compiled with --precision high"):
        LLM(made["high"].artifact.folder, precision="low")
