"""Linear layers of experts: each pair of a token and one of its experts is a row of y.

The weights are `experts` matrices [n, k], each in the layout of the other kernels. A pair reads the
weights of its own expert, so what no pair uses is never read. `ids` are below `experts`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qcc.quant_schemes.attributes import EXPERT_ORDER, LINEAR, ROLE
from qcc.quant_schemes.format import WeightFormat
from qcc.targets.cpu.isa import Isa
from qcc.targets.cpu.kernels.activations import HIGH, Activations, arguments, split
from qcc.targets.cpu.kernels.gemm import Rows, multiply_panel
from qcc.targets.cpu.kernels.gemv import products, store_lanes, sums_of
from qcc.targets.cpu.kernels.integer import integer_products
from qcc.targets.cpu.kernels.layout import packed_parts, row_blocks
from qcc.targets.cpu.kernels.tir import parallel, serial
from qcc.targets.kernel import i64, kernel

FEW = 3  # pairs of an expert
AT_ONCE = 4  # pairs of an expert that share unpacked codes


@cache
def experts_gemv(
    fmt: WeightFormat, experts: int, n: int, k: int, rows: int, pairs: int, isa: Isa
) -> tirx.PrimFunc:
    """PrimFunc (x f32[rows, k], [prepared, mode], parts, ids int32[pairs]) -> y f32[pairs, n].

    Pair p multiplies row p // (pairs / rows) of x with expert ids[p].
    """
    blocks = -(-n // isa.lanes)

    def for_blocks(ids: Any, out: Any, value: Callable[[Any, Any], Any]) -> None:
        """Store value(row of x, block) for every pair and block of rows of its expert."""
        with parallel(pairs * blocks) as i:
            pair = T.bind(tirx.floordiv(i, blocks))
            within = T.bind(tirx.floormod(i, blocks))
            block = T.bind(T.cast(ids[pair], "int64") * row_blocks(n, isa) + within)
            row = T.bind(tirx.floordiv(pair, pairs // rows))
            store_lanes(isa, out, pair, within * isa.lanes, n, value(row, block))

    def body(x: Any, *rest: Any) -> None:
        *given, ids, out = rest
        prepared, mode, parts = split(Activations.of(fmt, k, True, isa), given)

        def high() -> None:
            sums = sums_of(fmt, x, i64(0), rows, k)
            for_blocks(
                ids,
                out,
                lambda row, block: products(isa, fmt, k, parts, block, x, row, sums, row),
            )

        def low() -> None:
            def value(row: Any, block: Any) -> Any:
                return integer_products(isa, fmt, k, parts, block, prepared, [row])[0]

            for_blocks(ids, out, value)

        _by_precision(mode, high, low)

    args = [
        *arguments(Activations.of(fmt, k, True, isa), k, rows),
        *packed_parts(fmt, n, k, isa, experts),
        ("ids", (pairs,), "int32"),
        ("y", (pairs, n), "float32"),
    ]
    return kernel("experts_gemv", args, body, {ROLE: LINEAR})


def _by_precision(mode: Any | None, high: Callable[[], None], low: Callable[[], None]) -> None:
    if mode is None:
        high()
        return
    with T.If(mode[0] == HIGH):
        with T.Then():
            high()
        with T.Else():
            low()


@cache
def expert_order(experts: int) -> tirx.PrimFunc:
    """PrimFunc (ids int32[p]) -> (starts int32[experts + 1], order int32[p]).

    The pairs of expert e are order[starts[e]], ..., order[starts[e + 1] - 1], in rising order.
    """
    pairs = tirx.Var("p", "int64")

    def body(ids: Any, starts: Any, order: Any) -> None:
        # Counts of e at e + 2, which become the starts at e + 1, which end as those of e + 1.
        with serial(experts + 1) as e:
            T.buffer_store(starts, 0, [e])
        with serial(pairs) as p:
            slot = T.bind(T.cast(ids[p], "int64") + 2)
            with T.If(slot <= experts), T.Then():
                T.buffer_store(starts, starts[slot] + 1, [slot])
        with serial(experts) as e:
            T.buffer_store(starts, starts[e + 1] + starts[e], [e + 1])
        with serial(pairs) as p:
            slot = T.bind(T.cast(ids[p], "int64") + 1)
            at = T.bind(starts[slot])
            T.buffer_store(order, T.cast(p, "int32"), [at])
            T.buffer_store(starts, at + 1, [slot])

    args = [
        ("ids", (pairs,), "int32"),
        ("starts", (experts + 1,), "int32"),
        ("order", (pairs,), "int32"),
    ]
    return kernel("expert_order", args, body, {ROLE: EXPERT_ORDER}, outputs=2)


@cache
def experts_gemm(
    fmt: WeightFormat, experts: int, n: int, k: int, each: int, isa: Isa
) -> tirx.PrimFunc:
    """PrimFunc (x f32[r, k], [prepared, mode], parts, starts, order) -> y f32[p, n], any r and p.

    `starts` and `order` are those of `expert_order`. Pair p multiplies row p // each of x. The
    threads share the panels of every expert, so that they have equal work however the tokens
    choose. In high precision an expert of FEW pairs or less is read once for each, as by a GEMV: a
    panel is worth expanding only for more. Codes are unpacked for AT_ONCE pairs.
    """
    rows, pairs = tirx.Var("r", "int64"), tirx.Var("p", "int64")

    def body(x: Any, *rest: Any) -> None:
        *given, starts, order, out = rest
        prepared, mode, parts = split(Activations.of(fmt, k, True, isa), given)
        with parallel(row_blocks(n, isa) // isa.tile_n * experts) as i:
            panel = T.bind(tirx.floordiv(i, experts))
            expert = T.bind(tirx.floormod(i, experts))
            first = T.bind(starts[expert])
            count = T.bind(T.cast(starts[expert + 1] - first, "int64"))

            def pair(number: Any) -> Any:
                return T.cast(order[first + number], "int64")

            found = Rows(count, lambda number: tirx.floordiv(pair(number), each), pair)
            block = expert * row_blocks(n, isa) + panel * isa.tile_n

            def low() -> None:
                with serial(isa.tile_n) as v:
                    column = T.bind((panel * isa.tile_n + v) * isa.lanes)
                    with T.If(column < n), T.Then():
                        by_codes(prepared, parts, out, found, block + v, column)

            _by_precision(mode, lambda: high(x, parts, out, panel, block, found), low)

    def by_codes(
        prepared: list[Any], parts: list[Any], out: Any, found: Rows, block: Any, column: Any
    ) -> None:
        with serial(tirx.floordiv(found.count + AT_ONCE - 1, AT_ONCE)) as tile:
            numbers = [tile * AT_ONCE + i for i in range(AT_ONCE)]
            last = found.count - 1
            sources = [T.bind(found.source(T.min(number, last))) for number in numbers]
            values = integer_products(isa, fmt, k, parts, block, prepared, sources)
            for number, value in zip(numbers, values, strict=True):
                with T.If(number <= last), T.Then():
                    store_lanes(isa, out, found.target(number), column, n, value)

    def high(x: Any, parts: list[Any], out: Any, panel: Any, block: Any, found: Rows) -> None:
        count = found.count
        with T.If(count > FEW):
            with T.Then():
                multiply_panel(isa, fmt, n, k, parts, x, out, panel, block, found)
            with T.Else(), serial(count) as number:
                row = T.bind(found.source(number))
                sums = sums_of(fmt, x, row, 1, k)
                with serial(isa.tile_n) as v:
                    column = T.bind((panel * isa.tile_n + v) * isa.lanes)
                    with T.If(column < n), T.Then():
                        value = products(isa, fmt, k, parts, block + v, x, row, sums, i64(0))
                        store_lanes(isa, out, found.target(number), column, n, value)

    args = [
        *arguments(Activations.of(fmt, k, True, isa), k, rows),
        *packed_parts(fmt, n, k, isa, experts),
        ("starts", (experts + 1,), "int32"),
        ("order", (pairs,), "int32"),
        ("y", (pairs, n), "float32"),
    ]
    return kernel("experts_gemm", args, body, {ROLE: LINEAR})
