"""Kernels beyond a GPU's limits are refused by name, those within say what they need."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tvm

from qcc.quant_schemes.format import WeightFormat
from qcc.runtime.errors import QccError
from qcc.targets.gpu.check import check_grids, check_shaders
from qcc.targets.gpu.kernels.epilogue import Epilogue
from qcc.targets.gpu.kernels.gemm import gemm
from qcc.targets.gpu.kernels.gemv import gemv
from qcc.targets.gpu.limits import Limits
from qcc.targets.gpu.shaders import Binding, Shader

FORMAT = WeightFormat(4, "float16", 32)
WITHIN = Shader(
    name="k",
    source="v = 1.0f;",
    threads=(256, 1, 1),
    workgroup_bytes=32768,
    storage=(Binding("x", "f32", False),) * 10,
    scalars=(),
    needs_f16=False,
)


def test_what_is_within_needs_features() -> None:
    assert check_shaders([WITHIN], Limits()) == []
    assert check_shaders([WITHIN, replace(WITHIN, needs_f16=True)], Limits()) == ["shader-f16"]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"threads": (257, 1, 1)}, "257 threads a workgroup; the limit is 256"),
        ({"workgroup_bytes": 32772}, "32772 bytes of workgroup memory"),
        ({"storage": WITHIN.storage * 2}, "20 storage buffers; the limit is 10"),
        ({"source": "let i : i64 = 0;"}, "64-bit numbers (i64)"),
        ({"source": "v = inff;"}, "an infinity or NaN"),
    ],
)
def test_what_is_beyond_is_named(change: dict[str, object], said: str) -> None:
    with pytest.raises(QccError) as caught:
        check_shaders([WITHIN, replace(WITHIN, name="other", **change)], Limits())
    assert str(caught.value).startswith("kernel other: ") and said in str(caught.value)


def test_too_many_workgroups() -> None:
    """Rows known when compiling, and rows bounded by a function's extents."""
    plain, limits = Epilogue("float32"), Limits()
    wide = gemv(FORMAT, 4_000_000, 4096, "float32", plain, None, limits)
    with pytest.raises(QccError, match="kernel lm_head: 125000 workgroups in a dimension"):
        check_grids(tvm.IRModule({"lm_head": wide}), limits)
    rows = gemm(FORMAT, 64, 64, "float32", plain, limits)
    check_grids(tvm.IRModule({"rows": rows}), limits)
    long = rows.with_attr("tir_var_upper_bound", {"n": 5_000_000})  # as a Relax function has it
    with pytest.raises(QccError, match="kernel rows: 78125 workgroups"):
        check_grids(tvm.IRModule({"rows": long}), limits)
