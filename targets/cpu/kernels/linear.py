"""y = x @ W.T over repacked weights: GEMV for one row, GEMM for many, rows of a table.

All arithmetic is f32. A GEMV unrolls one group with eight independent accumulator chains and
applies the scale once a group. A GEMM expands a panel of L * tile_n rows and CHUNK columns to f32
in cache, then runs a register tile over all rows of x.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qcc.quant_schemes.attributes import LINEAR, ROLE, TABLE_ROWS
from qcc.quant_schemes.scheme import WeightFormat
from qcc.targets.cpu.isa import Isa, vector
from qcc.targets.cpu.kernels.decode import code_vector, float_vector
from qcc.targets.cpu.kernels.layout import packed_parts, row_blocks
from qcc.targets.cpu.kernels.tir import (
    extents,
    fma,
    i64,
    kernel,
    lanes_from,
    parallel,
    registers,
    serial,
    splat,
    tree_sum,
    zeros,
)

CHAINS = 8  # independent accumulators: FMA latency 4 x 2 ports
FLOAT_STEP = 32  # columns of a float weight that one step of a GEMV unrolls
CHUNK = 128  # columns of a GEMM's panel: 128 x 64 f32 is 32 KiB


def _weight_args(fmt: WeightFormat, n: int, k: int, isa: Isa) -> list[Any]:
    return list(packed_parts(fmt, n, k, isa))


def _step(fmt: WeightFormat) -> int:
    """Columns that are unrolled together: a group, or FLOAT_STEP."""
    return fmt.group if fmt.group is not None else FLOAT_STEP


def _numbers(
    isa: Isa, fmt: WeightFormat, parts: list[Any], block: Any, step: Any, count: int
) -> Any:
    """Yield (column in the step, f32 vector before the scale) for `count` columns of a step."""
    size = _step(fmt)
    lanes = lanes_from(0, isa.lanes)
    if fmt.is_float:
        for column in range(count):
            yield column, float_vector(isa, fmt, parts[0][block, step * size + column, lanes])
        return
    per_word = fmt.codes_per_word
    for word in range(-(-count // per_word)):
        loaded = T.bind(parts[0][block, step * (size // per_word) + word, lanes])
        for element in range(min(per_word, count - word * per_word)):
            yield word * per_word + element, code_vector(isa, fmt, loaded, element)


def _scale(isa: Isa, fmt: WeightFormat, parts: list[Any], block: Any, group: Any) -> Any:
    value = parts[1][block, group, lanes_from(0, isa.lanes)]
    return T.cast(value, vector(isa, "float32")) if fmt.dtype == "float16" else value


def store_lanes(isa: Isa, out: Any, row: Any, column: Any, n: int, value: Any) -> None:
    """Store a vector of L outputs, or its first lanes where it reaches past column n."""
    if n % isa.lanes == 0:
        T.buffer_store(out, value, [row, lanes_from(column, isa.lanes)])
        return
    with T.If(column + isa.lanes <= n):
        with T.Then():
            T.buffer_store(out, value, [row, lanes_from(column, isa.lanes)])
        with T.Else():
            spill = T.alloc_buffer((isa.lanes,), "float32", scope="local", layout=None)
            T.buffer_store(spill, value, [lanes_from(0, isa.lanes)])
            with serial(isa.lanes) as lane:
                with T.If(column + lane < n):
                    with T.Then():
                        T.buffer_store(out, spill[lane], [row, column + lane])


@cache
def gemv(fmt: WeightFormat, n: int, k: int, isa: Isa) -> tirx.PrimFunc:
    """PrimFunc (x f32[1, k], parts) -> y f32[1, n]."""
    vtype, step = vector(isa, "float32"), _step(fmt)

    def body(x: Any, *rest: Any) -> None:
        *parts, out = rest
        with parallel(-(-n // isa.lanes)) as block:
            (total,) = registers(1, isa.lanes)
            T.buffer_store(total, zeros(isa.lanes), [0])

            def one_step(index: Any, count: int) -> None:
                sums = [zeros(isa.lanes)] * CHAINS
                for column, number in _numbers(isa, fmt, parts, block, index, count):
                    xk = splat(x[0, index * step + column], isa.lanes)
                    chain = column % CHAINS
                    sums[chain] = T.bind(fma(number, xk, sums[chain], vtype))
                whole = tree_sum(sums)
                if fmt.is_float:
                    T.buffer_store(total, total[0] + whole, [0])
                else:
                    scale = _scale(isa, fmt, parts, block, index)
                    T.buffer_store(total, fma(whole, scale, total[0], vtype), [0])

            if k >= step:
                with serial(k // step) as index:
                    one_step(index, step)
            if k % step:
                one_step(i64(k // step), k % step)
            store_lanes(isa, out, i64(0), block * isa.lanes, n, total[0])

    args = [("x", (1, k), "float32"), *_weight_args(fmt, n, k, isa), ("y", (1, n), "float32")]
    return kernel("gemv", args, body, {ROLE: LINEAR})


@cache
def gemm(fmt: WeightFormat, n: int, k: int, isa: Isa) -> tirx.PrimFunc:
    """PrimFunc (x f32[m, k], parts) -> y f32[m, n], any m."""
    rows = tirx.Var("m", "int64")
    step = _step(fmt)
    chunk = max(CHUNK // step, 1) * step
    panel_columns = isa.lanes * isa.tile_n

    def body(x: Any, *rest: Any) -> None:
        *parts, out = rest
        with parallel(row_blocks(n, isa) // isa.tile_n) as panel:
            expanded = T.alloc_buffer(
                extents((chunk, panel_columns)), "float32", scope="global", layout=None
            )  # [column of the chunk, row of the panel]

            def one_chunk(index: Any, columns: int) -> None:
                for v in range(isa.tile_n):
                    block = panel * isa.tile_n + v
                    if columns >= step:
                        with serial(columns // step) as s:
                            _expand(isa, fmt, parts, expanded, block, v, index, s, chunk, step)
                    if columns % step:
                        s = i64(columns // step)
                        _expand(
                            isa, fmt, parts, expanded, block, v, index, s, chunk, columns % step
                        )
                with serial(tirx.floordiv(rows + isa.tile_m - 1, isa.tile_m)) as tile:
                    _micro_tile(
                        isa,
                        x,
                        expanded,
                        out,
                        tile * isa.tile_m,
                        rows,
                        panel,
                        index,
                        chunk,
                        columns,
                        n,
                    )

            if k >= chunk:
                with serial(k // chunk) as index:
                    one_chunk(index, chunk)
            if k % chunk:
                one_chunk(i64(k // chunk), k % chunk)

    args = [("x", (rows, k), "float32"), *_weight_args(fmt, n, k, isa), ("y", (rows, n), "float32")]
    return kernel("gemm", args, body, {ROLE: LINEAR})


def _expand(
    isa: Isa,
    fmt: WeightFormat,
    parts: list[Any],
    expanded: Any,
    block: Any,
    v: int,
    chunk_index: Any,
    s: Any,
    chunk: int,
    count: int,
) -> None:
    """Expand `count` columns of step `s` of a chunk, rows of `block`, to f32."""
    step = _step(fmt)
    group = chunk_index * (chunk // step) + s
    scale = None if fmt.is_float else T.bind(_scale(isa, fmt, parts, block, group))
    for column, number in _numbers(isa, fmt, parts, block, group, count):
        value = number if scale is None else number * scale
        T.buffer_store(expanded, value, [s * step + column, lanes_from(v * isa.lanes, isa.lanes)])


def _micro_tile(
    isa: Isa,
    x: Any,
    expanded: Any,
    out: Any,
    first: Any,
    rows: Any,
    panel: Any,
    chunk_index: Any,
    chunk: int,
    columns: int,
    n: int,
) -> None:
    """tile_m rows of x times one chunk of a panel, added to out (set in the first chunk)."""
    vtype = vector(isa, "float32")
    clipped = [T.bind(T.min(first + i, rows - 1)) for i in range(isa.tile_m)]
    sums = registers(isa.tile_m * isa.tile_n, isa.lanes)
    for acc in sums:
        T.buffer_store(acc, zeros(isa.lanes), [0])
    with serial(columns) as column:
        weights = [
            T.bind(expanded[column, lanes_from(v * isa.lanes, isa.lanes)])
            for v in range(isa.tile_n)
        ]
        for i in range(isa.tile_m):
            xk = T.bind(splat(x[clipped[i], chunk_index * chunk + column], isa.lanes))
            for v in range(isa.tile_n):
                acc = sums[i * isa.tile_n + v]
                T.buffer_store(acc, fma(xk, weights[v], acc[0], vtype), [0])
    for i in range(isa.tile_m):
        with T.If(first + i < rows):
            with T.Then():
                for v in range(isa.tile_n):
                    target = (panel * isa.tile_n + v) * isa.lanes
                    _accumulate(
                        isa, out, first + i, target, n, sums[i * isa.tile_n + v][0], chunk_index
                    )


def _accumulate(
    isa: Isa, out: Any, row: Any, column: Any, n: int, value: Any, chunk_index: Any
) -> None:
    """out[row, column:] += value where the columns exist; the first chunk stores."""
    with T.If(column + isa.lanes <= n):
        with T.Then():
            index = [row, lanes_from(column, isa.lanes)]
            before = out[tuple(index)]
            with T.If(chunk_index == 0):
                with T.Then():
                    T.buffer_store(out, value, index)
                with T.Else():
                    T.buffer_store(out, before + value, index)
        with T.Else():
            spill = T.alloc_buffer((isa.lanes,), "float32", scope="local", layout=None)
            T.buffer_store(spill, value, [lanes_from(0, isa.lanes)])
            with serial(isa.lanes) as lane:
                with T.If(column + lane < n):
                    with T.Then():
                        with T.If(chunk_index == 0):
                            with T.Then():
                                T.buffer_store(out, spill[lane], [row, column + lane])
                            with T.Else():
                                T.buffer_store(
                                    out, out[row, column + lane] + spill[lane], [row, column + lane]
                                )


@cache
def table_rows(fmt: WeightFormat, n: int, k: int, isa: Isa) -> tirx.PrimFunc:
    """PrimFunc (parts, ids int32[m]) -> f32[m, k]: rows of a repacked table, ids clipped."""
    rows = tirx.Var("m", "int64")
    step = _step(fmt)

    def body(*args: Any) -> None:
        *parts, ids, out = args
        with parallel(rows) as i:
            clipped = T.bind(T.cast(T.max(T.min(ids[i], n - 1), 0), "int64"))
            block = T.bind(tirx.floordiv(clipped, isa.lanes))
            lane = T.bind(tirx.floormod(clipped, isa.lanes))
            with serial(k) as column:
                value = _scalar(fmt, parts, block, lane, column, step)
                T.buffer_store(out, value, [i, column])

    args = [
        *_weight_args(fmt, n, k, isa),
        ("ids", (rows,), "int32"),
        ("rows", (rows, k), "float32"),
    ]
    return kernel("table_rows", args, body, {ROLE: TABLE_ROWS})


def _scalar(
    fmt: WeightFormat, parts: list[Any], block: Any, lane: Any, column: Any, step: int
) -> Any:
    """One f32 number of the repacked layout."""
    if fmt.is_float:
        value = parts[0][block, column, lane]
        if fmt.dtype == "bfloat16":
            return T.reinterpret("float32", T.cast(value, "uint32") << T.uint32(16))
        return T.cast(value, "float32")
    per_word = fmt.codes_per_word
    word = parts[0][block, tirx.floordiv(column, per_word), lane]
    shift = T.cast(tirx.floormod(column, per_word) * fmt.bits, "uint32")
    code = T.cast((word >> shift) & T.uint32(2**fmt.bits - 1), "float32")
    scale = T.cast(parts[1][block, tirx.floordiv(column, step), lane], "float32")
    return (code - T.float32(fmt.max_code)) * scale
