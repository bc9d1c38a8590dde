"""LowerLinear: linear layers become GEMV and GEMM kernels over the weights as they are stored.

Before:  n = rms_norm(x, w)                                              # of one row
         y = matmul(n, permute_dims(call_tir(dequantize, (q, s))))
         z = add(r, add(y, bias))
After:   z = call_tir(gemv, (x, w, q, s, bias, r))

Many rows take gemm, whose norms stay operators. A gate, act(first half of y) * second half, is
taken over the same way, and so is a cast of y, whose sums are then rounded once.

Layers of experts:  y = call_tir(experts_gemv, (x, q, s, ids))
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax as rx
from tvm import tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from qcc.targets.gpu.kernels.epilogue import Epilogue
from qcc.targets.gpu.kernels.gemm import gemm
from qcc.targets.gpu.kernels.gemv import Norm, experts_gemv, gemv
from qcc.targets.gpu.limits import Limits
from qcc.targets.gpu.passes.match_product import Product, Products
from qcc.targets.matching import (
    ExpertLayer,
    is_one,
    match_experts,
    product_of,
    weighted_functions,
)


@tvm.transform.module_pass(opt_level=0, name="LowerLinear")
class LowerLinear:
    """The pass for GPUs of some limits."""

    def __init__(self, limits: Limits) -> None:
        """`limits` parametrize the kernels."""
        self.limits = limits

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Rewrite every function that takes the packed parameters."""
        rewrite = _Rewrite(mod, self.limits)
        for gv, func in weighted_functions(mod):
            rewrite.function(gv, func)
        return rx.transform.DeadCodeElimination()(rewrite.builder_.get())


@mutator
class _Rewrite(PyExprMutator):  # type: ignore[misc]
    def __init__(self, mod: tvm.IRModule, limits: Limits) -> None:
        super().__init__(mod)
        self.mod, self.limits = mod, limits
        self.products: Products | None = None
        self.current: Product | None = None  # that the binding under way makes
        self.added: dict[tirx.PrimFunc, Any] = {}  # the builder would hash a kernel every time

    def function(self, gv: Any, func: rx.Function) -> None:
        self.products = Products(self.mod, func)
        self.builder_.update_func(gv, self.visit_expr(func))

    def visit_var_binding_(self, binding: rx.VarBinding) -> None:
        assert self.products is not None
        if binding.var not in self.products.absorbed:
            self.current = self.products.at.get(binding.var)
            super().visit_var_binding_(binding)

    def visit_call_(self, call: rx.Call) -> rx.Expr:
        product, self.current = self.current, None
        if product is not None:
            return self._linear(product)
        assert self.products is not None
        layer = match_experts(self.mod, self.products.bindings, call)
        return super().visit_call_(call) if layer is None else self._experts(layer, call.ty)

    def _experts(self, layer: ExpertLayer, ty: Any) -> rx.Expr:
        weight, x, ids = layer.weight, layer.x, layer.ids
        slots = ids.ty.shape[1]
        rows, pairs = product_of(list(x.ty.shape)[:-1]), product_of(ids.ty.shape)
        each = 1 if len(x.ty.shape) == 3 else int(slots)  # pairs of a row of x
        dtype = str(ty.dtype)
        func = experts_gemv(
            weight.format, layer.experts, layer.n, weight.k, dtype, each, self.limits
        )
        args = [self._flat(self.visit_expr(x), rows, weight.k)]
        args += [self.visit_expr(part) for part in weight.parts]
        args.append(self.builder_.emit(rx.op.reshape(self.visit_expr(ids), (pairs,))))
        out = rx.TensorType((pairs, layer.n), dtype)
        y = self.builder_.emit(rx.call_tir(self._add(func, "experts_gemv"), args, out_ty=out))
        return rx.op.reshape(y, list(ty.shape))

    def _linear(self, product: Product) -> rx.Expr:
        assert self.products is not None
        weight, x = product.weight, product.x
        rows = product_of(list(x.ty.shape)[:-1])
        width = int(product.ty.shape[-1])
        summands, dtypes = [], []
        for value in product.summands:
            whole = len(value.ty.shape) > 1
            dtypes.append((str(value.ty.dtype), whole))
            new = self.visit_expr(value)
            summands.append(self._flat(new, rows, width) if whole else new)
        epilogue = Epilogue(str(product.ty.dtype), product.gate, tuple(dtypes))
        sizes = weight.format, weight.n, weight.k
        args: list[Any]
        if is_one(rows):
            normed = self.products.norms.get(x)
            source = normed.data if normed else x
            norm = Norm(normed.eps, str(normed.weight.ty.dtype)) if normed else None
            func = gemv(*sizes, str(source.ty.dtype), epilogue, norm, self.limits)
            args = [self._flat(self.visit_expr(source), rows, weight.k)]
            if normed:
                args.append(self.visit_expr(normed.weight))
        else:
            func = gemm(*sizes, str(x.ty.dtype), epilogue, self.limits)
            args = [self._flat(self.visit_expr(x), rows, weight.k)]
        args += [*(self.visit_expr(part) for part in weight.parts), *summands]
        out = rx.TensorType((rows, width), epilogue.out_dtype)
        gv = self._add(func, "gemv" if is_one(rows) else "gemm")
        y = self.builder_.emit(rx.call_tir(gv, args, out_ty=out))
        return rx.op.reshape(y, list(product.ty.shape))

    def _flat(self, value: rx.Expr, rows: Any, width: int) -> rx.Expr:
        return self.builder_.emit(rx.op.reshape(value, (rows, width)))

    def _add(self, func: tirx.PrimFunc, name: str) -> Any:
        """The GlobalVar of a kernel; the kernels are cached, so the same object means the same."""
        if func not in self.added:
            self.added[func] = self.builder_.add_func(func, name)
        return self.added[func]
