"""What a kernel of a linear layer does with its sums before it writes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from qcc.targets.kernel import Arg

GELU_CUBE = 0.044715
GELU_SCALE = 2 * 0.7978845608028654  # 2 sqrt(2 / pi)


@dataclass(frozen=True)
class Epilogue:
    """y = act(first half) * second half, or the sum itself; then summands; then rounded.

    Attributes:
        out_dtype: of y.
        gate: silu or gelu_tanh, of halves of the rows of W; "": no gate.
        summands: (dtype, whole) of each tensor that is added: [m, n] where whole, else [n].
    """

    out_dtype: str
    gate: str = ""
    summands: tuple[tuple[str, bool], ...] = ()

    @property
    def halves(self) -> int:
        """Rows of W for an output."""
        return 2 if self.gate else 1

    def rows(self, n: int) -> int:
        """Outputs of a W of n rows."""
        return n // self.halves

    def args(self, m: Any, n: int) -> list[Arg]:
        """The last arguments of a kernel: summands, y."""
        width = self.rows(n)
        found: list[Arg] = [
            (f"added{i}", (m, width) if whole else (width,), dtype)
            for i, (dtype, whole) in enumerate(self.summands)
        ]
        return [*found, ("y", (m, width), self.out_dtype)]

    def write(self, buffers: Sequence[Any], row: Any, column: Any, sums: Sequence[Any]) -> None:
        """Emit y[row, column] from its sums f32, one a half; `buffers` as `args` has them."""
        *added, y = buffers
        value = gated(self.gate, *sums) if self.gate else sums[0]
        for buffer, (_, whole) in zip(added, self.summands, strict=True):
            other = buffer[row, column] if whole else buffer[column]
            value = value + T.cast(other, "float32")
        T.buffer_store(y, T.cast(value, self.out_dtype), [row, column])


def gated(activation: str, gate: Any, up: Any) -> Any:
    """f32 act(gate) * up.

    silu: x * sigmoid(x). gelu_tanh: x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)), which is
    0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
    """
    inner = gate
    if activation == "gelu_tanh":
        inner = (gate + gate * gate * gate * T.float32(GELU_CUBE)) * T.float32(GELU_SCALE)
    # exp of a large number is infinity or undefined: the fraction is 0 long before
    power = T.exp(T.min(T.float32(0) - inner, T.float32(80)))
    return gate / (T.float32(1) + power) * up
