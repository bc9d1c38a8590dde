"""LowerLinear: linear layers become our GEMV and GEMM over repacked weights.

Before:  y = matmul(x, permute_dims(call_tir(dequantize, (q, s))))       # or a plain float weight
After:   p0 = call_tir(repack, (q,)); p1 = call_tir(repack, (s,))     # HoistRepack moves these out
         y = call_tir(gemv or gemm, (reshape(x), p0, p1)), reshaped back

Norms and biases stored in 16 bits are cast to f32 the same way. The rows of a table that some
function multiplies with as well (a tied lm_head) are read from the repacked weight, so that the
table is in memory once. Decides on `qcc.role` attributes alone.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax as rx
from tvm import tirx
from tvm.relax.expr_functor import PyExprMutator, PyExprVisitor, mutator, visitor

from qcc.quant_schemes.scheme import FLOAT_DTYPES, WeightFormat
from qcc.targets.cpu.isa import Isa
from qcc.targets.cpu.kernels import layout, linear

ROLE, FORMAT = "qcc.role", "qcc.format"


def _op(call: Any, name: str) -> bool:
    return isinstance(call, rx.Call) and call.op == tvm.ir.Op.get(name)


def _role(mod: tvm.IRModule, call: Any) -> str | None:
    """`qcc.role` of the PrimFunc that a call_tir calls."""
    if not _op(call, "relax.call_tir"):
        return None
    attrs = mod[call.args[0]].attrs
    return str(attrs[ROLE]) if attrs and ROLE in attrs else None


def _format(mod: tvm.IRModule, call: Any) -> WeightFormat:
    return WeightFormat.from_dict(mod[call.args[0]].attrs[FORMAT])


@tvm.transform.module_pass(opt_level=0, name="LowerLinear")
class LowerLinear:
    """The pass for one processor."""

    def __init__(self, isa: Isa) -> None:
        """`isa` parametrizes the kernels."""
        self.isa = isa

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Rewrite every function that takes the packed parameters."""
        functions = [
            (gv, func)
            for gv, func in mod.functions_items()
            if isinstance(func, rx.Function) and func.attrs and "num_input" in func.attrs
        ]
        found = _FindMultiplied(mod)
        for _, func in functions:
            found.find(func)
        rewrite = _Rewrite(mod, self.isa, found.multiplied)
        for gv, func in functions:
            rewrite.function(gv, func)
        return rx.transform.DeadCodeElimination()(rewrite.builder_.get())


def _first_index(bindings: dict[Any, Any], var: Any) -> int | None:
    """The index in the packed tuple of a stored tensor's variable."""
    value = bindings.get(var)
    return int(value.index) if isinstance(value, rx.TupleGetItem) else None


class _Linear:
    """A matched linear layer: its format, [n, k], and the variables of its stored parts."""

    def __init__(self, fmt: WeightFormat, n: int, k: int, parts: list[Any]) -> None:
        self.format, self.n, self.k, self.parts = fmt, n, k, parts


def _match(mod: tvm.IRModule, bindings: dict[Any, Any], call: Any) -> _Linear | None:
    """matmul(x, permute_dims(W)) with W dequantized or a stored float matrix, else None."""
    if not _op(call, "relax.matmul"):
        return None
    transposed: Any = bindings.get(call.args[1])
    if not _op(transposed, "relax.permute_dims") or len(transposed.ty.shape) != 2:
        return None
    weight = transposed.args[0]
    value: Any = bindings.get(weight)
    n, k = (int(d) for d in weight.ty.shape)
    if _role(mod, value) == "dequantize":
        return _Linear(_format(mod, value), n, k, list(value.args[1]))
    if _first_index(bindings, weight) is not None:
        dtype = str(weight.ty.dtype)
        return _Linear(WeightFormat(FLOAT_DTYPES[dtype], dtype), n, k, [weight])
    return None


@visitor
class _FindMultiplied(PyExprVisitor):  # type: ignore[misc]
    """Collects the first tuple index of every weight that some function multiplies with."""

    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__()
        self.mod = mod
        self.bindings: dict[Any, Any] = {}
        self.multiplied: set[int] = set()

    def find(self, func: rx.Function) -> None:
        self.bindings = {}
        self.visit_expr(func.body)

    def visit_var_binding_(self, binding: rx.VarBinding) -> None:
        self.bindings[binding.var] = binding.value
        match = _match(self.mod, self.bindings, binding.value)
        if match:
            index = _first_index(self.bindings, match.parts[0])
            assert index is not None, "a stored part is an element of the packed tuple"
            self.multiplied.add(index)


@mutator
class _Rewrite(PyExprMutator):  # type: ignore[misc]
    def __init__(self, mod: tvm.IRModule, isa: Isa, multiplied: set[int]) -> None:
        super().__init__(mod)
        self.mod, self.isa, self.multiplied = mod, isa, multiplied
        self.bindings: dict[Any, Any] = {}
        self.packed: dict[Any, list[Any]] = {}
        self.added: dict[tirx.PrimFunc, Any] = {}  # the builder would hash a kernel every time

    def function(self, gv: Any, func: rx.Function) -> None:
        self.bindings, self.packed = {}, {}
        self.builder_.update_func(gv, self.visit_expr(func))

    def visit_var_binding_(self, binding: rx.VarBinding) -> None:
        self.bindings[binding.var] = binding.value
        super().visit_var_binding_(binding)

    def visit_call_(self, call: rx.Call) -> rx.Expr:
        match = _match(self.mod, self.bindings, call)
        if match is not None:
            return self._linear(match, self.visit_expr(call.args[0]), call.ty)
        if _op(call, "relax.astype") and _first_index(self.bindings, call.args[0]) is not None:
            return self._cast_at_load(call)
        rows = self._table_rows(call)
        return rows if rows is not None else super().visit_call_(call)

    def _add(self, func: tirx.PrimFunc, name: str) -> Any:
        """The GlobalVar of a kernel; the kernels are cached, so the same object means the same."""
        if func not in self.added:
            self.added[func] = self.builder_.add_func(func, name)
        return self.added[func]

    def _repacked(self, match: _Linear) -> list[Any]:
        """The repacked parts of a weight, emitted once a function."""
        key = match.parts[0]
        if key not in self.packed:
            emitted = []
            kinds = layout.packed_parts(match.format, match.n, match.k, self.isa)
            for i, (part, (suffix, shape, dtype)) in enumerate(
                zip(match.parts, kinds, strict=True)
            ):
                func = layout.repack_func(match.format, match.n, match.k, i, self.isa)
                gv = self._add(func, f"repack_{suffix}")
                out = rx.TensorType(shape, dtype)
                emitted.append(
                    self.builder_.emit(rx.call_tir(gv, [self.visit_expr(part)], out_ty=out))
                )
            self.packed[key] = emitted
        return self.packed[key]

    def _cast_at_load(self, call: rx.Call) -> rx.Expr:
        """A norm or bias stored narrower than the graph computes: widened once."""
        (extent,) = (int(d) for d in call.ty.shape)
        func = layout.cast_func(extent, str(call.args[0].ty.dtype), str(call.ty.dtype))
        gv = self._add(func, "repack_cast")
        return rx.call_tir(gv, [self.visit_expr(call.args[0])], out_ty=call.ty)

    def _linear(self, match: _Linear, x: rx.Expr, ty: Any) -> rx.Expr:
        leading = list(x.ty.shape)[:-1]
        rows: Any = tirx.IntImm("int64", 1)
        for extent in leading:
            rows = rows * extent
        rows = tvm.sym.Analyzer().simplify(rows)
        single = isinstance(rows, tirx.IntImm) and int(rows) == 1
        make = linear.gemv if single else linear.gemm
        func = make(match.format, match.n, match.k, self.isa)
        gv = self._add(func, "gemv" if single else "gemm")
        flat = self.builder_.emit(rx.op.reshape(x, (rows, match.k)))
        out = rx.TensorType((rows, match.n), "float32")
        y = self.builder_.emit(rx.call_tir(gv, [flat, *self._repacked(match)], out_ty=out))
        return rx.op.reshape(y, list(ty.shape))

    def _table_rows(self, call: rx.Call) -> rx.Expr | None:
        """Rows of a table that is multiplied with elsewhere; of any other table: None."""
        if _role(self.mod, call) == "dequantize_rows":
            *parts, ids = call.args[1]
            fmt = _format(self.mod, call)
        elif _op(call, "relax.take") and int(call.attrs.axis) == 0:
            parts, ids = [call.args[0]], call.args[1]
            dtype = str(parts[0].ty.dtype)
            if dtype not in FLOAT_DTYPES or len(parts[0].ty.shape) != 2:
                return None
            fmt = WeightFormat(FLOAT_DTYPES[dtype], dtype)
        else:
            return None
        if _first_index(self.bindings, parts[0]) not in self.multiplied:
            return None
        k = int(call.ty.shape[-1])
        shape = parts[0].ty.shape
        n = int(shape[1] if fmt.layout == "KN" and not fmt.is_float else shape[0])
        match = _Linear(fmt, n, k, list(parts))
        func = linear.table_rows(fmt, n, k, self.isa)
        gv = self._add(func, "table_rows")
        args = [*self._repacked(match), self.visit_expr(ids)]
        return rx.call_tir(gv, args, out_ty=rx.TensorType(call.ty.shape, "float32"))
