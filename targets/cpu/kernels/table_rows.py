"""Rows of a repacked table, as an embedding reads them."""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qcc.quant_schemes.attributes import ROLE, TABLE_ROWS
from qcc.quant_schemes.format import WeightFormat
from qcc.targets.cpu.isa import Isa
from qcc.targets.cpu.kernels.layout import packed_parts
from qcc.targets.cpu.kernels.steps import scalar_weight
from qcc.targets.cpu.kernels.tir import parallel, serial
from qcc.targets.kernel import kernel


@cache
def table_rows(fmt: WeightFormat, n: int, k: int, isa: Isa) -> tirx.PrimFunc:
    """PrimFunc (parts, ids int32[m]) -> f32[m, k]: rows of a repacked table, ids clipped."""
    rows = tirx.Var("m", "int64")

    def body(*args: Any) -> None:
        *parts, ids, out = args
        with parallel(rows) as i:
            clipped = T.bind(T.cast(T.max(T.min(ids[i], n - 1), 0), "int64"))
            block = T.bind(tirx.floordiv(clipped, isa.lanes))
            lane = T.bind(tirx.floormod(clipped, isa.lanes))
            with serial(k) as column:
                value = scalar_weight(fmt, k, parts, block, lane, column)
                T.buffer_store(out, value, [i, column])

    args = [
        *packed_parts(fmt, n, k, isa),
        ("ids", (rows,), "int32"),
        ("rows", (rows, k), "float32"),
    ]
    return kernel("table_rows", args, body, {ROLE: TABLE_ROWS})
