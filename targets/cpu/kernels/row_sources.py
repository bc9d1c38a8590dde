"""Where the rows of x come from that a linear layer multiplies: memory, a norm, a gated activation.

`prepare` computes a norm or an activation while it rounds, so that in low precision its f32 result
is never written. A source is frozen: it is part of the kernel's key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from tvm.tirx.script.builder import ir as T

from qcc.targets.cpu.isa import Isa, vector
from qcc.targets.cpu.kernels import vectors as vx
from qcc.targets.cpu.kernels.tir import (
    fma,
    lanes_from,
    serial,
    splat,
    tree_sum,
    zeros,
)

GELU_CUBE = 0.044715
GELU_SCALE = 2 * 0.7978845608028654  # 2 sqrt(2 / pi)
CHAINS = 4  # independent sums


class Row(Protocol):
    """A row whose columns can be asked for."""

    def at(self, column: Any, lanes: int) -> Any:
        """f32 vector of `lanes` columns."""
        ...


@dataclass(frozen=True)
class Stored:
    """x f32[m, k] itself."""

    k: int

    def args(self, rows: Any) -> list[tuple[str, tuple[Any, ...], str]]:
        """(name, shape, dtype) of what the rows are computed from."""
        return [("x", (rows, self.k), "float32")]

    def row(self, isa: Isa, buffers: list[Any], row: Any) -> Row:
        """Emit what comes once a row."""
        return _StoredRow(buffers[0], row)


@dataclass(frozen=True)
class _StoredRow:
    x: Any
    number: Any

    def at(self, column: Any, lanes: int) -> Any:
        return self.x[self.number, lanes_from(column, lanes)]


@dataclass(frozen=True)
class Gated:
    """act(gate) * up, with gate and up the halves of the rows of a f32[m, 2 k].

    `activation`: silu, x * sigmoid(x), or gelu_tanh, x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)),
    which is 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
    """

    k: int
    activation: str

    def args(self, rows: Any) -> list[tuple[str, tuple[Any, ...], str]]:
        """See Stored."""
        return [("gate_up", (rows, 2 * self.k), "float32")]

    def row(self, isa: Isa, buffers: list[Any], row: Any) -> Row:
        """See Stored."""
        return _GatedRow(self, buffers[0], row)

    def apply(self, gate: Any, up: Any, lanes: int) -> Any:
        """The vector of a vector of each half."""
        gate = vx.keep(gate, lanes)
        inner = gate
        if self.activation == "gelu_tanh":
            cube = gate * gate * gate
            inner = (gate + cube * _const(GELU_CUBE, lanes)) * _const(GELU_SCALE, lanes)
            inner = vx.keep(inner, lanes)
        return gate * _sigmoid(inner, lanes) * up


@dataclass(frozen=True)
class _GatedRow:
    source: Gated
    both: Any
    number: Any

    def at(self, column: Any, lanes: int) -> Any:
        gate = self.both[self.number, lanes_from(column, lanes)]
        up = self.both[self.number, lanes_from(column + self.source.k, lanes)]
        return self.source.apply(gate, up, lanes)


def _const(value: float, lanes: int) -> Any:
    return splat(T.float32(value), lanes)


def _sigmoid(x: Any, lanes: int) -> Any:
    """1 / (1 + e) where x >= 0, else e / (1 + e), with e = exp(-|x|); a NaN stays one."""
    zero, one = _const(0.0, lanes), _const(1.0, lanes)
    size = T.max(x, zero - x)
    power = vx.exp(vx.keep(zero - size, lanes), lanes)
    top = T.Select(x < zero, power, one)
    return top / (one + power) + (x - x)


@dataclass(frozen=True)
class Normed:
    """x / sqrt(mean(x^2) + eps) * weight, of x f32[m, k] and weight f32[k]."""

    k: int
    eps: float

    def args(self, rows: Any) -> list[tuple[str, tuple[Any, ...], str]]:
        """See Stored."""
        return [("x", (rows, self.k), "float32"), ("weight", (self.k,), "float32")]

    def row(self, isa: Isa, buffers: list[Any], row: Any) -> Row:
        """See Stored."""
        x, weight = buffers
        total = T.bind(self._squares(isa, x, row))
        mean = total / T.float32(self.k) + T.float32(self.eps)
        root = T.call_llvm_pure_intrin("float32", "llvm.sqrt", mean)
        return _NormedRow(x, weight, vx.keep(T.float32(1) / root, 1), row)

    def _squares(self, isa: Isa, x: Any, row: Any) -> Any:
        """The sum of the squares of a row."""
        vtype, width = vector(isa, "float32"), CHAINS * isa.lanes
        rest = vx.Reg(1, T.float32(0))
        start = self.k // width * width
        with serial(self.k - start) as i:
            value = T.bind(x[row, start + i])
            rest.set(rest.get() + value * value)
        if not start:
            return rest.get()
        sums = [vx.Reg(isa.lanes, zeros(isa.lanes)) for _ in range(CHAINS)]
        with serial(start // width) as i:
            for number, chain in enumerate(sums):
                at = lanes_from(i * width + number * isa.lanes, isa.lanes)
                value = T.bind(x[row, at])
                chain.set(fma(value, value, chain.get(), vtype))
        whole = tree_sum([chain.get() for chain in sums])
        return T.call_llvm_pure_intrin("float32", "llvm.vector.reduce.fadd", rest.get(), whole)


@dataclass(frozen=True)
class _NormedRow:
    x: Any
    weight: Any
    factor: Any
    number: Any

    def at(self, column: Any, lanes: int) -> Any:
        value = self.x[self.number, lanes_from(column, lanes)] * splat(self.factor, lanes)
        return value * self.weight[lanes_from(column, lanes)]


RowSource = Stored | Gated | Normed
