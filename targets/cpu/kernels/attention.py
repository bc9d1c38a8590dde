"""What the CPU's attention kernels share: tile sizes, scores, sums of products, softmax state.

Scores are kept in base 2 (scale * log2 e is folded into the query), f32 throughout. A row that sees
no key gives zeros and a log-sum-exp of NO_KEY, so that merging with another part leaves that one.
Of q and of the output every kernel uses the first [n, hq, d] numbers, whatever shape is declared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from qcc.targets.cpu.kernels import vectors as vx
from qcc.targets.spec import KVCacheConfig

NO_KEY = -1.0e30  # log-sum-exp of a row without keys, and the running maximum before the first key
EVERYTHING = 1 << 30  # more than any position
MASKED = -3.0e38  # a masked score: below NO_KEY by more than any exponent, so its weight is 0


@dataclass(frozen=True)
class Tile:
    """Sizes of one step of a kernel, chosen by the registers of the processor.

    In prefill a row is one (token, head of a group). A task takes `rows` of them, and for each tile
    of `keys` keys goes over its blocks of `block` rows.
    """

    registers: vx.Registers
    dim: int
    keys: int = 128

    @property
    def lanes(self) -> int:
        return self.registers.lanes

    @property
    def dim_lanes(self) -> int:
        return vx.lanes_dividing(self.dim, self.lanes)

    @property
    def vectors(self) -> int:
        """Vectors of a row that are summed at once; with `block` they fill 3/4 of the registers."""
        return 4 if self.registers.count == 32 and self.lanes < 16 else 2

    @property
    def block(self) -> int:
        return 3 * self.registers.count // 4 // self.vectors

    @property
    def rows(self) -> int:
        return 16 * self.block

    def at_once(self, heads: int) -> int:
        """Vectors for each of `heads` in decode: within 3/4 of the registers; a power of two."""
        limit = 3 * self.registers.count // 4 // heads
        return max(n for n in (1, 2, 4) if n <= max(limit, 1))


@dataclass(frozen=True)
class ScoreRule:
    """From q . k to a score, and how far back a layer sees; of both, a call says `sm_scale`."""

    config: KVCacheConfig
    sm_scale: Any

    def factor(self) -> Any:
        """What queries are multiplied by, so that `capped` turns q . k into a score in base 2."""
        cap = self.config.logit_soft_cap
        scale = self.sm_scale
        if self.config.layer_window:
            scale = T.max(scale, vx.splat(0.0, 1) - scale)
        return T.bind(scale * vx.splat(1 / cap if cap else vx.LOG2_E, 1))

    def capped(self, score: Any, lanes: int) -> Any:
        """The soft cap: in base 2, c * log2 e * tanh(score / c)."""
        cap = self.config.logit_soft_cap
        if not cap:
            return score
        return vx.tanh(vx.keep(score, lanes), lanes) * vx.splat(cap * vx.LOG2_E, lanes)

    def oldest(self, position: Any) -> Any:
        """The first position that a query sees; far below 0 in a layer without a window."""
        windowed = self.sm_scale < vx.splat(0.0, 1)
        reach = T.Select(windowed, self.config.layer_window, EVERYTHING)
        return position - reach + 1


def emit_products(
    block: int,
    vectors: int,
    lanes: int,
    steps: tuple[Any, Any],
    a: Callable[[Any, int], Any],
    b: Callable[[Any, int], Any],
    start: Callable[[int, int], Any],
    done: Callable[[int, int, Any], None],
) -> None:
    """For a block of rows and some vectors: start + sum over the steps of a(step, row) b(step, v).

    `a` gives scalars, `b` vectors of `lanes`; `start` and `done` take (row, v).
    """
    cells = [(r, i) for r in range(block) for i in range(vectors)]
    sums = {cell: vx.Reg(lanes, start(*cell)) for cell in cells}
    with T.serial(*steps) as step:
        columns = [T.bind(b(step, i)) for i in range(vectors)]
        for r in range(block):
            value = T.bind(vx.splat(a(step, r), lanes))
            for i, column in enumerate(columns):
                sums[r, i].set(vx.fma(value, column, sums[r, i].get(), lanes))
    for cell in cells:
        done(*cell, sums[cell].get())


def emit_normalizer(top: Any, mass: Any, inverse: Any, at: Any, lanes: int) -> None:
    """inverse = 1 / mass and top = log-sum-exp; 0 and NO_KEY where no key was seen."""
    total = T.bind(vx.load(mass, at, lanes))
    seen = total > vx.splat(0.0, lanes)  # not bound: TVM's simplifier trips over bound bool vectors
    safe = vx.keep(T.Select(seen, total, vx.splat(1.0, lanes)), lanes)
    lse = vx.load(top, at, lanes) + vx.log2(safe, lanes)
    one, zero, none = (vx.splat(x, lanes) for x in (1.0, 0.0, NO_KEY))
    vx.store(inverse, at, T.Select(seen, one / safe, zero), lanes)
    vx.store(top, at, T.Select(seen, lse, none), lanes)


def emit_carried(config: KVCacheConfig, out: Any, first: Any, member: Any, lse: Any) -> None:
    """Put the log-sum-exp (base 2) of a head of a group into the group's carrier.

    Args:
        config: of a cache that returns them.
        out: the output, flat.
        first: its row of the group's first head.
        member: the head's number in the group; head 0 clears what no head fills.
        lse: a scalar.
    """
    base = T.bind((first + config.group) * config.head_dim)
    vx.store(out, base + member, lse * vx.splat(vx.LN_2, 1), 1)
    if config.group < config.head_dim:
        with when(member == 0):
            with T.serial(config.group, config.head_dim) as d:
                vx.store(out, base + d, vx.splat(0.0, 1), 1)


@contextmanager
def when(condition: Any) -> Iterator[None]:
    """Emit the body under a condition."""
    with T.If(condition):
        with T.Then():
            yield
