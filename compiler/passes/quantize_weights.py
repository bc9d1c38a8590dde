"""QuantizeWeights: float parameters become stored parameters under dequantize.

Before:  W = packed[0]                      # f32[n, k]
         y = matmul(x, permute_dims(W))
         e = take(W, ids)
After:   q, s = packed[0], packed[1]        # uint32[n, k/8], f16[n, k/32]
         y = matmul(x, permute_dims(call_tir(dequantize, (q, s))))
         e = call_tir(dequantize_rows, (q, s, ids))

A parameter that is stored as several weights, one below the other (`WeightSpec.fused`):

Before:  W = packed[0]
         y = matmul(x, permute_dims(W))
After:   a, b = call_tir(dequantize, (packed[0], packed[1])), packed[2]
         y = concat((matmul(x, permute_dims(a)), matmul(x, permute_dims(b))))

A floating weight stored in another dtype than the graph computes in goes through the same two
functions (a cast is its dequantize); other floating parameters are cast. The scale of a layer's
inputs (`WeightSpec.input_scale`) is not touched: QuantizeActivations uses it. The PrimFuncs carry
`qcc.role` and `qcc.format`: targets decide on these, and the module stays executable everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import groupby
from typing import Any

import tvm
from tvm import relax as rx
from tvm import te, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from qcc.compiler.weights.spec import WeightSpec
from qcc.quant_schemes.attributes import DEQUANTIZE, DEQUANTIZE_ROWS, FORMAT, ROLE
from qcc.quant_schemes.format import WeightFormat
from qcc.quant_schemes.packing import dequantize_expr


def _finish(args: list[te.Tensor], role: str, fmt: WeightFormat) -> tirx.PrimFunc:
    func = te.create_prim_func(args).without_attr("global_symbol")
    return func.with_attr(ROLE, role).with_attr(FORMAT, fmt.as_dict())


def _inputs(fmt: WeightFormat, n: int, k: int) -> list[te.Tensor]:
    parts = fmt.stored(n, k)
    return [
        te.placeholder([tirx.IntImm("int64", d) for d in part.shape], part.dtype, name=part.suffix)
        for part in parts
    ]


def _element(
    fmt: WeightFormat, inputs: list[te.Tensor], row: Any, col: Any, k: int, dtype: str
) -> Any:
    if fmt.is_float:
        return inputs[0][row, col].astype(dtype)
    return dequantize_expr(fmt, inputs, row, col, k, dtype)


@cache
def dequantize_func(fmt: WeightFormat, n: int, k: int, dtype: str) -> tirx.PrimFunc:
    """(stored parts) -> dtype[n, k]."""
    inputs = _inputs(fmt, n, k)
    shape = [tirx.IntImm("int64", n), tirx.IntImm("int64", k)]
    out = te.compute(shape, lambda i, j: _element(fmt, inputs, i, j, k, dtype), name="dequantize")
    return _finish([*inputs, out], DEQUANTIZE, fmt)


@cache
def dequantize_rows_func(fmt: WeightFormat, n: int, k: int, dtype: str) -> tirx.PrimFunc:
    """(stored parts, ids int32[m]) -> dtype[m, k], rows `ids` clipped to the table."""
    inputs = _inputs(fmt, n, k)
    ids = te.placeholder([te.var("m", "int64")], "int32", name="ids")

    def row(i: Any) -> Any:
        clipped = tirx.max(tirx.min(ids[i], tirx.IntImm("int32", n - 1)), tirx.IntImm("int32", 0))
        return clipped.astype("int64")

    out = te.compute(
        (ids.shape[0], tirx.IntImm("int64", k)),
        lambda i, j: _element(fmt, inputs, row(i), j, k, dtype),
        name="dequantize_rows",
    )
    return _finish([*inputs, ids, out], DEQUANTIZE_ROWS, fmt)


def _is_op(call: Any, name: str) -> bool:
    return isinstance(call, rx.Call) and call.op == tvm.ir.Op.get(name)


@tvm.transform.module_pass(opt_level=0, name="QuantizeWeights")
class QuantizeWeights:
    """The pass; `specs` are the parameters in tuple order, their formats chosen by a scheme."""

    def __init__(self, specs: Sequence[WeightSpec], dtype: str) -> None:
        """`dtype` is what the graph computes in."""
        self.specs = tuple(specs)
        self.dtype = dtype

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Rewrite every function that takes the packed parameters."""
        return _Rewrite(mod, self.specs, self.dtype).run()


@mutator
class _Rewrite(PyExprMutator):  # type: ignore[misc]
    def __init__(self, mod: tvm.IRModule, specs: tuple[WeightSpec, ...], dtype: str) -> None:
        super().__init__(mod)
        self.mod, self.specs, self.dtype = mod, specs, dtype
        self.first: list[int] = []  # index of each weight's first stored tensor
        # Weights of each parameter of the model.
        self.weights = [
            [index for index, _ in group]
            for _, group in groupby(enumerate(specs), lambda item: item[1].fused or item[0])
        ]
        fields: list[Any] = []
        for spec in specs:
            self.first.append(len(fields))
            fields += [rx.TensorType(part.shape, part.dtype) for part in spec.stored]
        self.stored_type = rx.TupleType(fields)
        self.old_packed: rx.Var | None = None
        self.new_packed: rx.Var | None = None
        self.weight_of: dict[Any, int] = {}  # var of the old function -> index of its weight
        self.fused: dict[Any, list[int]] = {}  # var of W or permute_dims(W) -> its weights

    def run(self) -> tvm.IRModule:
        for gv, func in self.mod.functions_items():
            if isinstance(func, rx.Function) and func.attrs and "num_input" in func.attrs:
                self.builder_.update_func(gv, self._function(func))
        return rx.transform.DeadCodeElimination()(self.builder_.get())

    def _function(self, func: rx.Function) -> rx.Function:
        *inputs, self.old_packed = func.params
        self.new_packed = rx.Var(self.old_packed.name, self.stored_type)
        self.weight_of, self.fused = {}, {}
        self.set_var_remap(self.old_packed, self.new_packed)
        body = self.visit_with_new_scope(func.body)
        return rx.Function([*inputs, self.new_packed], body, func.ret_ty, func.is_pure, func.attrs)

    def visit_var_binding_(self, binding: rx.VarBinding) -> None:
        value = binding.value
        if isinstance(value, rx.TupleGetItem) and value.tuple_value.same_as(self.old_packed):
            weights = self.weights[int(value.index)]
            if len(weights) > 1:
                self.fused[binding.var] = weights
                return
            self.weight_of[binding.var] = weights[0]
            self.set_var_remap(binding.var, self._weight(weights[0]))
            return
        if _is_op(value, "relax.permute_dims") and value.args[0] in self.fused:
            self.fused[binding.var] = self.fused[value.args[0]]
            return
        super().visit_var_binding_(binding)

    def visit_call_(self, call: rx.Call) -> rx.Expr:
        if _is_op(call, "relax.matmul") and call.args[1] in self.fused:
            return self._concatenated(self.visit_expr(call.args[0]), self.fused[call.args[1]])
        if _is_op(call, "relax.take") and call.args[0] in self.weight_of:
            spec = self.specs[self.weight_of[call.args[0]]]
            ids = call.args[1].ty.ndim  # of an embedding 1; experts' biases are taken by a matrix
            if int(call.attrs.axis) == 0 and len(spec.shape) == 2 and ids == 1:
                ids = self.visit_expr(call.args[1])
                func = dequantize_rows_func(spec.format, *spec.shape, self.dtype)
                parts = self._parts(self.weight_of[call.args[0]])
                return self._call(func, "dequantize_rows", [*parts, ids], call.ty)
        return super().visit_call_(call)

    def _concatenated(self, x: rx.Expr, weights: list[int]) -> rx.Expr:
        """x times each of the weights, side by side."""
        products = []
        for index in weights:
            transposed = self.builder_.emit(rx.op.permute_dims(self._weight(index)))
            products.append(self.builder_.emit(rx.op.matmul(x, transposed)))
        return rx.op.concat(products, axis=-1)

    def visit_var_(self, var: rx.Var) -> rx.Expr:
        """A fused weight may only be multiplied with."""
        assert var not in self.fused, f"{self.specs[self.fused[var][0]].fused} is not stored whole"
        return super().visit_var_(var)

    visit_dataflow_var_ = visit_var_

    def _parts(self, index: int) -> list[rx.Expr]:
        start = self.first[index]
        return [
            self.builder_.emit(rx.TupleGetItem(self.new_packed, start + i), part.name)
            for i, part in enumerate(self.specs[index].numbers)
        ]

    def _weight(self, index: int) -> rx.Expr:
        """The weight in the graph's dtype."""
        spec = self.specs[index]
        parts = self._parts(index)
        if len(spec.shape) == 2 and (not spec.format.is_float or spec.format.dtype != self.dtype):
            func = dequantize_func(spec.format, *spec.shape, self.dtype)
            out = rx.TensorType(spec.shape, self.dtype)
            return self.builder_.emit(self._call(func, "dequantize", parts, out))
        if spec.format.dtype != self.dtype:
            return self.builder_.emit(rx.op.astype(parts[0], self.dtype))
        return parts[0]

    def _call(self, func: tirx.PrimFunc, name: str, args: list[rx.Expr], ty: Any) -> rx.Expr:
        gv = self.builder_.add_func(func, name)
        return rx.call_tir(gv, args, out_ty=ty)
