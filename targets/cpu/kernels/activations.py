"""Activations as the low-precision kernels take them, made once for all weights they multiply.

Few rows, as int8. Of each row and each GROUP columns (the last group padded with 0):
    scale = max|x| / 127,  code = round_half_even(x * 127 / max|x|)
The sums of the codes of each piece of columns go with them, for what a weight's zero or bias adds:
int32 sums, or f32 sums times the scale. A piece lies within one group of x and one of the weight.
Many rows, where the processor has tiles: as bf16 tiles of 16 rows and 32 columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import gcd
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qcc.quant_schemes.attributes import QUANTIZE_ACTIVATION, ROLE
from qcc.quant_schemes.format import UNIT, WeightFormat
from qcc.targets.cpu.isa import Isa, vector
from qcc.targets.cpu.kernels import vectors as vx
from qcc.targets.cpu.kernels.amx import COLUMNS, ROWS, WORDS
from qcc.targets.cpu.kernels.row_sources import RowSource, Stored
from qcc.targets.cpu.kernels.steps import steps_of
from qcc.targets.cpu.kernels.tir import lanes_from, parallel, serial, splat, tree_sum
from qcc.targets.kernel import i64, kernel

GROUP = UNIT  # columns under one scale
TOP = 127
FEW_ROWS = 4  # so few rows are not worth a parallel region
TILES_FROM = 13  # rows of x for which expanding weights to tiles pays
# Values of `mode`: float activations; int8; int8, and bf16 tiles for many rows.
HIGH, LOW, TILES = 0, 1, 2
Prepared = tuple[list[Any], Any | None, list[Any]]


@dataclass(frozen=True)
class Activations:
    """How the activations of weights with k columns are prepared; equal ones are shared.

    `piece` columns under one sum, `sums` the dtype of the sums; None: a float weight takes no
    codes. `tiles`: many rows become tiles.
    """

    k: int
    piece: int
    sums: str | None
    tiles: bool

    @classmethod
    def none(cls, k: int) -> Activations:
        """Nothing: of use where `prepare` has a source, whose rows it writes."""
        return cls(k, GROUP, None, False)

    @classmethod
    def of(cls, fmt: WeightFormat, k: int, single: bool, isa: Isa) -> Activations | None:
        """What the kernels of a format need for one row or for any number; None: only x."""
        tiles = isa.tiles and not single and fmt.bits < 32
        if fmt.is_float or isa.dot is None:
            return cls(k, GROUP, None, True) if tiles else None
        exact = fmt.grid in ("symmetric", "mxfp4")
        piece = gcd(steps_of(fmt, k).segment, GROUP)
        return cls(k, piece, "int32" if exact else "float32", tiles)

    @property
    def groups(self) -> int:
        """Groups of a row, which is padded to whole ones."""
        return -(-self.k // GROUP)

    def parts(self, rows: Any) -> list[tuple[str, tuple[Any, ...], str]]:
        """(name, shape, dtype) of what `prepare` writes."""
        found: list[tuple[str, tuple[Any, ...], str]] = []
        if self.sums is not None:
            found = [
                ("codes", (rows, self.groups * GROUP), "int8"),
                ("scales", (rows, self.groups), "float32"),
                ("sums", (rows, self.groups * GROUP // self.piece), self.sums),
            ]
        if self.tiles:
            row_tiles = tirx.floordiv(rows + ROWS - 1, ROWS)
            found.append(("tiles", (row_tiles, self.groups, WORDS), "uint32"))
        return found


def arguments(kind: Activations | None, k: int, rows: Any) -> list[tuple[str, Any, str]]:
    """(name, shape, dtype) of what a kernel takes before the parts of a weight.

    x f32[rows, k]; where x is prepared, what `prepare` makes of it and mode int32[1].
    """
    found: list[tuple[str, Any, str]] = [("x", (rows, k), "float32")]
    return found if kind is None else [*found, *kind.parts(rows), ("mode", (1,), "int32")]


def split(kind: Activations | None, given: Sequence[Any]) -> Prepared:
    """(prepared, mode, parts) of the buffers after x; no mode: x is always taken as it is."""
    if kind is None:
        return [], None, list(given)
    count = len(kind.parts(1))
    return list(given[:count]), given[count], list(given[count + 1 :])


@cache
def prepare(
    kind: Activations,
    rows: int | None,
    isa: Isa,
    source: RowSource | None = None,
    keeps: bool = True,
) -> tirx.PrimFunc:
    """PrimFunc (x f32[m, k], mode int32[1]) -> `kind.parts`; nothing in mode HIGH.

    `rows` None: any m. With a `source` the arguments are the source's and mode, and x comes before
    the parts. What a run does not multiply with is not written; x always, if it `keeps` it.
    """
    m = tirx.Var("m", "int64") if rows is None else rows
    given = source or Stored(kind.k)
    inputs, written = given.args(m), kind.parts(m)
    if source:
        written = [("y", (m, kind.k), "float32"), *written]

    def body(*buffers: Any) -> None:
        sources, mode = list(buffers[: len(inputs)]), buffers[len(inputs)]
        outputs = list(buffers[len(inputs) + 1 :])
        x = outputs.pop(0) if source else None
        emit_prepare(kind, isa, given, sources, mode, m, x, outputs, keeps, kind.tiles)

    args = [*inputs, ("mode", (1,), "int32"), *written]
    attrs = {ROLE: QUANTIZE_ACTIVATION}
    return kernel("quantize_activation", args, body, attrs, outputs=len(written))


def emit_prepare(
    kind: Activations,
    isa: Isa,
    source: RowSource,
    buffers: list[Any],
    mode: Any,
    m: Any,
    x: Any | None,
    found: list[Any],
    keeps: bool = False,
    tiles: bool = True,
) -> None:
    """The body of `prepare`: `x` is where rows are written, `found` the buffers of `kind.parts`.

    Without `tiles` many rows are no case of their own.
    """
    work = _Prepare(kind, isa, source, buffers)

    def few() -> None:
        """Codes; a float weight's kernels take x for few rows."""
        codes = found[:3] if kind.sums is not None else None
        kept = x if keeps or codes is None else None
        if codes is not None or kept is not None:
            _for_rows(m, lambda row: work.row(row, codes, kept))

    def choose() -> None:
        if not tiles:
            few()
            return
        with T.If(tirx.all(mode[0] == TILES, m >= TILES_FROM)):
            with T.Then():
                work.tiles(found[-1], m, x if keeps else None)
            with T.Else():
                few()

    with T.If(mode[0] != HIGH):
        with T.Then():
            choose()
        if x is not None:
            with T.Else():
                _for_rows(m, lambda row: work.row(row, None, x))


def _for_rows(rows: Any, body: Callable[[Any], None]) -> None:
    """A loop over rows, parallel where there are more than FEW_ROWS."""
    if isinstance(rows, int):
        with serial(rows) if rows <= FEW_ROWS else parallel(rows) as row:
            body(row)
        return
    with T.If(rows > FEW_ROWS):
        with T.Then(), parallel(rows) as row:
            body(row)
        with T.Else(), serial(rows) as row:
            body(row)


@dataclass(frozen=True)
class _Prepare:
    """What the rows of one call have in common."""

    kind: Activations
    isa: Isa
    source: RowSource
    buffers: list[Any]

    def row(self, row: Any, codes: Sequence[Any] | None, x: Any | None) -> None:
        """Write a row's codes, scales and sums, or its numbers, or both."""

        def group(values: list[Any], number: Any) -> None:
            if codes is not None:
                _group(self.kind, self.isa, values, codes, row, number)

        self._groups(row, x, group)

    def tiles(self, tiles: Any, rows: Any, x: Any | None) -> None:
        """Round all rows to bf16 tiles; what pads the last tile is left as it is."""
        isa = self.isa
        with parallel(tirx.floordiv(rows + ROWS - 1, ROWS)) as tile:
            first = tile * ROWS
            with serial(T.min(i64(ROWS), rows - first)) as inside:

                def group(values: list[Any], number: Any, inside: Any = inside) -> None:
                    low, high = values
                    name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
                    both = T.call_llvm_pure_intrin("bfloat16x32", name, high, low)
                    words = T.reinterpret("uint32x16", both)
                    at = lanes_from(inside * (COLUMNS // 2), isa.lanes)
                    T.buffer_store(tiles, words, [tile, number, at])

                self._groups(first + inside, x, group)

    def _groups(self, row: Any, x: Any | None, body: Callable[[list[Any], Any], None]) -> None:
        """body(f32 vectors of GROUP columns, the group's number) over a row, also written to x."""
        lanes, whole = self.isa.lanes, self.kind.k // GROUP
        rest, offsets = self.kind.k % GROUP, range(0, GROUP, lanes)
        found = self.source.row(self.isa, self.buffers, row)
        if whole:
            with serial(whole) as number:
                values = [vx.keep(found.at(number * GROUP + at, lanes), lanes) for at in offsets]
                if x is not None:
                    for at, value in zip(offsets, values, strict=True):
                        index = lanes_from(number * GROUP + at, lanes)
                        T.buffer_store(x, value, [row, index])
                body(values, number)
        if rest:
            tail = T.alloc_buffer((GROUP,), "float32", scope="local", layout=None)
            for at in offsets:
                T.buffer_store(tail, splat(T.float32(0), lanes), [lanes_from(at, lanes)])
            with serial(rest) as i:
                value = vx.keep(found.at(whole * GROUP + i, 1), 1)
                T.buffer_store(tail, value, [i])
                if x is not None:
                    T.buffer_store(x, value, [row, whole * GROUP + i])
            body([tail[lanes_from(at, lanes)] for at in offsets], i64(whole))


def _group(
    kind: Activations,
    isa: Isa,
    values: list[Any],
    parts: Sequence[Any],
    row: Any,
    number: Any,
) -> None:
    """Write the codes, scale and sums of group `number` of a row, given as f32 vectors."""
    codes, scales, sums = parts
    vtype, wide = vector(isa, "float32"), vector(isa, "int32")
    sizes = [T.bind(T.call_llvm_pure_intrin(vtype, "llvm.fabs", value)) for value in values]
    while len(sizes) > 1:
        pairs = zip(sizes[::2], sizes[1::2], strict=True)
        sizes = [T.bind(T.call_llvm_pure_intrin(vtype, "llvm.maximum", a, b)) for a, b in pairs]
    # This maximum keeps a NaN: damaged weights must still show as logits that are not finite.
    top = T.bind(T.call_llvm_pure_intrin("float32", "llvm.vector.reduce.fmaximum", sizes[0]))
    scale = T.bind(top / T.float32(TOP))
    T.buffer_store(scales, scale, [row, number])
    zero = T.float32(0)
    inverse = T.bind(T.Select(top > zero, T.float32(TOP) / top, zero))
    first, found = number * GROUP, []
    for i, value in enumerate(values):
        near = T.call_llvm_pure_intrin(vtype, "llvm.rint", value * splat(inverse, isa.lanes))
        code = T.bind(T.cast(near, wide))
        found.append(code)
        at = lanes_from(first + i * isa.lanes, isa.lanes)
        T.buffer_store(codes, T.cast(code, vector(isa, "int8")), [row, at])
    pieces = GROUP // kind.piece
    for i in range(pieces):
        if kind.piece % isa.lanes == 0:
            each = len(found) // pieces
            total = _lane_sum(wide, tree_sum(found[i * each : (i + 1) * each]))
        else:
            columns = range(i * kind.piece, (i + 1) * kind.piece)
            total = tree_sum([T.cast(codes[row, first + c], "int32") for c in columns])
        if kind.sums == "float32":
            total = T.cast(total, "float32") * scale
        T.buffer_store(sums, total, [row, number * pieces + i])


def _lane_sum(wide: str, values: Any) -> Any:
    return T.call_llvm_pure_intrin("int32", "llvm.vector.reduce.add", T.reinterpret(wide, values))
