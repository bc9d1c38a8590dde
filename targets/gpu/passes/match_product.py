"""What one kernel of a linear layer takes over: the product, a norm before, sums and gates after.

Read off a function's bindings, last use first; knows no kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import tvm
from tvm import relax as rx
from tvm import tirx

from qcc.targets.matching import Bindings, Weight, is_op, match_linear
from qcc.targets.sources import Uses, match_gate, match_norm, uses_of

MAX_SUMMANDS = 2  # a bias and a residual; more buffers than a kernel may bind otherwise


@dataclass(frozen=True)
class Product:
    """x @ W.T and what happens to it before anything else sees it.

    Attributes:
        weight: W [n, k].
        x: the variable [..., k].
        ty: of the result.
        gate: silu or gelu_tanh of halves of the rows of W; "": none.
        summands: tensors added to the result, of its shape or of its last extent.
        absorbed: the variables that nothing else uses.
    """

    weight: Weight
    x: Any
    ty: Any
    gate: str = ""
    summands: tuple[Any, ...] = ()
    absorbed: tuple[Any, ...] = ()


@dataclass(frozen=True)
class NormedRow:
    """A norm of the row that a product multiplies: rms_norm(data, weight, eps)."""

    data: Any
    weight: Any
    eps: float


class Products:
    """The products of a function, each at the variable that it is bound to at last."""

    def __init__(self, mod: tvm.IRModule, func: rx.Function) -> None:
        """Read the function."""
        self.mod = mod
        self.uses: Uses = uses_of(func)
        self.bindings: Bindings = {
            binding.var: binding.value
            for block in func.body.blocks
            for binding in block.bindings
            if isinstance(binding, rx.VarBinding)
        }
        found = {}
        for var, value in self.bindings.items():
            product = self._product(value)
            if product is not None:
                found[var] = product
        inner = {var for product in found.values() for var in product.absorbed}
        self.at = {var: product for var, product in found.items() if var not in inner}
        self.norms = self._norms()
        self.absorbed = {var for product in self.at.values() for var in product.absorbed}
        self.absorbed |= set(self.norms)

    def _product(self, value: Any) -> Product | None:
        match = match_linear(self.mod, self.bindings, value)
        if match is not None:
            return Product(match, value.args[0], value.ty)
        if is_op(value, "relax.add"):
            for inner, other in (value.args, value.args[::-1]):
                found = self._sum(inner, other, value.ty)
                if found is not None:
                    return found
        if is_op(value, "relax.astype"):
            found = self._only_here(value.args[0])
            if found is not None:
                return replace(found, ty=value.ty)
        return self._gate(value)

    def _only_here(self, var: Any) -> Product | None:
        """The product that a variable of a single use is."""
        value = self.bindings.get(var) if isinstance(var, rx.Var) else None
        if value is None or len(self.uses[var]) != 1:
            return None
        found = self._product(value)
        return found and replace(found, absorbed=(*found.absorbed, var))

    def _sum(self, inner: Any, other: Any, ty: Any) -> Product | None:
        shape = list(other.ty.shape)
        if not isinstance(other, rx.Var) or not _is_float(other):
            return None
        whole = len(shape) == len(ty.shape) and all(map(_same, shape, ty.shape))
        if not whole and not (len(shape) == 1 and _same(shape[0], ty.shape[-1])):
            return None
        found = self._only_here(inner)
        if found is None or len(found.summands) == MAX_SUMMANDS or str(found.ty.dtype) != ty.dtype:
            return None
        return replace(found, summands=(*found.summands, other), ty=ty)

    def _gate(self, value: Any) -> Product | None:
        match = match_gate(self.bindings, value)
        if match is None or len(self.uses[match.pair]) != 2:
            return None
        if any(len(self.uses[var]) != 1 for var in match.after):
            return None
        found = self._only_here(match.both)
        if found is None or found.gate or found.summands:
            return None
        absorbed = (*found.absorbed, match.pair, *match.after)
        return replace(found, gate=match.activation, ty=value.ty, absorbed=absorbed)

    def _norms(self) -> dict[Any, NormedRow]:
        """The norms of single rows that only products use."""
        found = {}
        for var, value in self.bindings.items():
            norm = match_norm(self.bindings, var)
            if norm is None or not _is_row(value.ty.shape):
                continue
            consumers = [p for p in self.at.values() if p.x.same_as(var)]
            # A gated or summed product has its matmul among what it absorbed: uses count once.
            if consumers and len(self.uses[var]) == len(consumers):
                found[var] = NormedRow(*norm)
        return found


def _is_float(value: Any) -> bool:
    return str(value.ty.dtype) in ("float16", "float32", "bfloat16")


def _same(a: Any, b: Any) -> bool:
    return bool(tvm.sym.Analyzer().can_prove_equal(a, b))


def _is_row(shape: Any) -> bool:
    return all(isinstance(d, tirx.IntImm) and int(d) == 1 for d in list(shape)[:-1])
