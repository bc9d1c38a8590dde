"""LowerLinear: linear layers become our GEMV and GEMM over repacked weights.

Before:  y = matmul(x, permute_dims(call_tir(dequantize, (q, s))))       # or a plain float weight
After:   p0 = call_tir(repack, (q,)); p1 = call_tir(repack, (s,))     # HoistRepack moves these out
         mode = call_tir(setting, ())                                 # and this
         codes, scales, sums = call_tir(prepare, (reshape(x), mode))  # once for the same x
         y = call_tir(gemv or gemm, (reshape(x), codes, scales, sums, mode, p0, p1)), reshaped back
A float weight's kernels take neither codes nor mode, unless many rows become tiles. Where nothing
but a sum takes y, add(r, y), the kernel makes the sum from r, its last argument. What x is where
only linear layers take it, a norm or a gated activation, `prepare` computes itself; behind a GEMM
that makes gate and up, both are one: call_tir(gated_gemm, ...).

Layers of experts, one token:    y = call_tir(experts_gemv, (x, codes, ..., mode, p0, p1, ids))
more tokens:                     starts, order = call_tir(expert_order, (ids,))   # once for all
                                 y = call_tir(experts_gemm, (x, ..., p0, p1, starts, order))

Norms and biases stored in 16 bits are cast to f32 the same way. The rows of a table that some
function multiplies with as well (a tied lm_head) are read from the repacked weight, so that the
table is in memory once.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax as rx
from tvm import tirx
from tvm.relax.expr_functor import PyExprMutator, mutator
from tvm_ffi import structural_equal

from qcc.targets.cpu.isa import Isa
from qcc.targets.cpu.kernels import layout
from qcc.targets.cpu.kernels.activations import Activations, prepare
from qcc.targets.cpu.kernels.amx import COLUMNS
from qcc.targets.cpu.kernels.experts import expert_order, experts_gemm, experts_gemv
from qcc.targets.cpu.kernels.linear import gated_gemm, gemm, gemv
from qcc.targets.cpu.kernels.row_sources import Gated, RowSource
from qcc.targets.cpu.kernels.setting import PRECISION, setting
from qcc.targets.cpu.kernels.table_rows import table_rows
from qcc.targets.cpu.passes.match_source import match_source
from qcc.targets.matching import (
    Bindings,
    ExpertLayer,
    Weight,
    is_one,
    is_op,
    match_experts,
    match_linear,
    match_rows,
    multiplied,
    packed_index,
    product_of,
    weighted_functions,
)
from qcc.targets.sources import Uses, uses_of


@tvm.transform.module_pass(opt_level=0, name="LowerLinear")
class LowerLinear:
    """The pass for one processor."""

    def __init__(self, isa: Isa) -> None:
        """`isa` parametrizes the kernels."""
        self.isa = isa

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Rewrite every function that takes the packed parameters."""
        rewrite = _Rewrite(mod, self.isa, multiplied(mod))
        for gv, func in weighted_functions(mod):
            rewrite.function(gv, func)
        return rx.transform.DeadCodeElimination()(rewrite.builder_.get())


@mutator
class _Rewrite(PyExprMutator):  # type: ignore[misc]
    def __init__(self, mod: tvm.IRModule, isa: Isa, multiplied_indices: set[int]) -> None:
        super().__init__(mod)
        self.mod, self.isa, self.multiplied = mod, isa, multiplied_indices
        self.bindings: Bindings = {}
        self.packed: dict[Any, list[Any]] = {}
        self.orders: dict[Any, list[Any]] = {}  # ids -> starts and order
        self.flat: dict[Any, Any] = {}  # x -> its rows as a matrix
        self.prepared: dict[tuple[Any, Activations], list[Any]] = {}
        self.mode: Any = None
        self.summands: dict[Any, Weight] = {}  # products that the kernel of a sum will make
        self.uses: Uses = {}
        self.added: dict[tirx.PrimFunc, Any] = {}  # the builder would hash a kernel every time

    def function(self, gv: Any, func: rx.Function) -> None:
        self.bindings, self.packed, self.orders = {}, {}, {}
        self.flat, self.prepared, self.mode, self.summands = {}, {}, None, {}
        self.uses = uses_of(func)
        self.builder_.update_func(gv, self.visit_expr(func))

    def visit_var_binding_(self, binding: rx.VarBinding) -> None:
        var, value = binding.var, binding.value
        self.bindings[var] = value
        match = match_linear(self.mod, self.bindings, value)
        if match is not None and self._is_summand(var):
            self.summands[var] = match
        else:
            super().visit_var_binding_(binding)

    def _is_summand(self, var: Any) -> bool:
        """Whether a product has no use but a sum with f32 of its shape, and is the first such."""
        uses = self.uses[var]
        if len(uses) != 1 or not is_op(uses[0], "relax.add"):
            return False
        call: Any = uses[0]
        (other,) = (arg for arg in call.args if not arg.same_as(var))
        return other not in self.summands and structural_equal(other.ty, var.ty)

    def visit_call_(self, call: rx.Call) -> rx.Expr:
        match = match_linear(self.mod, self.bindings, call)
        if match is not None:
            return self._linear(match, call.args[0], call.ty)
        if is_op(call, "relax.add"):
            for product, other in (call.args, call.args[::-1]):
                if product in self.summands:
                    x: Any = self.bindings[product]
                    return self._linear(self.summands[product], x.args[0], call.ty, other)
        layer = match_experts(self.mod, self.bindings, call)
        if layer is not None:
            return self._experts(layer, call.ty)
        if is_op(call, "relax.astype") and packed_index(self.bindings, call.args[0]) is not None:
            return self._cast_at_load(call)
        rows = match_rows(self.mod, call)
        if rows and packed_index(self.bindings, rows[0].parts[0]) in self.multiplied:
            return self._table_rows(rows[0], self.visit_expr(rows[1]), call.ty)
        return super().visit_call_(call)

    def _add(self, func: tirx.PrimFunc, name: str) -> Any:
        """The GlobalVar of a kernel; the kernels are cached, so the same object means the same."""
        if func not in self.added:
            self.added[func] = self.builder_.add_func(func, name)
        return self.added[func]

    def _repacked(self, match: Weight, experts: int = 1) -> list[Any]:
        """The repacked parts of a weight, emitted once a function."""
        key = match.parts[0]
        if key not in self.packed:
            emitted = []
            shape_of_one = match.n // experts, match.k
            kinds = layout.packed_parts(match.format, *shape_of_one, self.isa, experts)
            for i, (part, (suffix, shape, dtype)) in enumerate(
                zip(match.parts, kinds, strict=True)
            ):
                func = layout.repack_func(match.format, *shape_of_one, i, self.isa, experts)
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

    def _linear(self, match: Weight, x: rx.Expr, ty: Any, added: rx.Expr | None = None) -> rx.Expr:
        """A linear layer, and what is added to it; x and that are of the old function."""
        rows = product_of(list(x.ty.shape)[:-1])
        single = is_one(rows)
        make = gemv if single else gemm
        func = make(match.format, match.n, match.k, self.isa, added is not None)
        gv = self._add(func, "gemv" if single else "gemm")
        out = rx.TensorType((rows, match.n), "float32")
        args = [*self._activations(match, x, rows), *self._repacked(match)]
        if added is not None:
            flat = rx.op.reshape(self.visit_expr(added), (rows, match.n))
            args.append(self.builder_.emit(flat))
        y = self.builder_.emit(rx.call_tir(gv, args, out_ty=out))
        return rx.op.reshape(y, list(ty.shape))

    def _activations(self, match: Weight, x: rx.Expr, rows: Any) -> list[Any]:
        """What a kernel takes before the parts of a weight."""
        kind = Activations.of(match.format, match.k, is_one(rows), self.isa)
        if x not in self.flat:
            found = match_source(self.bindings, x, match.k)
            kinds = self._kinds_of_uses(x) if found else None
            if found and kinds is not None:
                source, inputs = found
                kind_or_none = kind or Activations.none(match.k)
                self._computed(x, rows, kind_or_none, source, inputs, len(kinds) > 1)
            else:
                flat = rx.op.reshape(self.visit_expr(x), (rows, match.k))
                self.flat[x] = self.builder_.emit(flat)
        if kind is None:
            return [self.flat[x]]
        if (x, kind) not in self.prepared:
            func = prepare(kind, 1 if is_one(rows) else None, self.isa)
            self.prepared[x, kind] = self._prepare(func, [self.flat[x]], kind.parts(rows))
        return [self.flat[x], *self.prepared[x, kind], self._mode()]

    def _kinds_of_uses(self, x: Any) -> set[Activations | None] | None:
        """How the linear layers that multiply x take it; None: something else uses it too."""
        kinds = set()
        for call in self.uses[x]:
            match = None if call is None else match_linear(self.mod, self.bindings, call)
            if call is None or match is None or not call.args[0].same_as(x):
                return None
            rows = product_of(list(x.ty.shape)[:-1])
            kinds.add(Activations.of(match.format, match.k, is_one(rows), self.isa))
        return kinds

    def _computed(
        self,
        x: Any,
        rows: Any,
        kind: Activations,
        source: RowSource,
        inputs: list[Any],
        keeps: bool,
    ) -> None:
        """Emit the rows of x and how they are taken, from what they are computed from."""
        if isinstance(source, Gated) and kind.tiles and not keeps:
            found = self._gated(source, kind, inputs[0], rows)
            if found is not None:
                self.flat[x], *self.prepared[x, kind] = found
                return
        args = []
        for (_, shape, _), value in zip(source.args(rows), inputs, strict=True):
            args.append(self.builder_.emit(rx.op.reshape(self.visit_expr(value), shape)))
        func = prepare(kind, 1 if is_one(rows) else None, self.isa, source, keeps)
        y = ("y", (rows, kind.k), "float32")
        self.flat[x], *parts = self._prepare(func, args, [y, *kind.parts(rows)])
        self.prepared[x, kind] = parts

    def _gated(self, gated: Gated, kind: Activations, both: Any, rows: Any) -> list[Any] | None:
        """y and its parts, of a GEMM that gates its own result; None: it is not so simple."""
        call: Any = self.bindings.get(both)
        match = match_linear(self.mod, self.bindings, call) if call is not None else None
        if match is None or gated.k % COLUMNS or not self._is_only_gated(both):
            return None
        own = Activations.of(match.format, match.k, False, self.isa)
        if own is None or not own.tiles:
            return None
        args = [*self._activations(match, call.args[0], rows), *self._repacked(match)]
        func = gated_gemm(match.format, match.k, gated, kind, self.isa)
        gv = self._add(func, "gated_gemm")
        shapes = [((rows, 2 * gated.k), "float32"), ((rows, gated.k), "float32")]
        shapes += [(shape, dtype) for _, shape, dtype in kind.parts(rows)]
        types = [rx.TensorType(shape, dtype) for shape, dtype in shapes]
        made = self.builder_.emit(rx.call_tir(gv, args, out_ty=types))
        return [self.builder_.emit(rx.TupleGetItem(made, i)) for i in range(1, len(types))]

    def _is_only_gated(self, both: Any) -> bool:
        """Whether the halves of a product have no use but one gate and what it gates."""
        halves = [
            var
            for var, value in self.bindings.items()
            if isinstance(value, rx.TupleGetItem)
            and is_op(self.bindings.get(value.tuple_value), "relax.split")
            and self.bindings[value.tuple_value].args[0].same_as(both)
        ]
        return len(self.uses[both]) == 1 and all(len(self.uses[half]) == 1 for half in halves)

    def _prepare(self, func: tirx.PrimFunc, args: list[Any], outputs: list[Any]) -> list[Any]:
        """The results of a `prepare`."""
        gv = self._add(func, "prepare")
        types = [rx.TensorType(shape, dtype) for _, shape, dtype in outputs]
        alone = len(types) == 1  # call_tir returns one output by itself
        ty = types[0] if alone else types
        made = self.builder_.emit(rx.call_tir(gv, [*args, self._mode()], out_ty=ty))
        if alone:
            return [made]
        return [self.builder_.emit(rx.TupleGetItem(made, i)) for i in range(len(types))]

    def _mode(self) -> Any:
        """The precision at run time, once a function."""
        if self.mode is None:
            gv = self._add(setting(PRECISION, 1, "int32"), "setting_precision")
            out = rx.TensorType((1,), "int32")
            self.mode = self.builder_.emit(rx.call_tir(gv, [], out_ty=out))
        return self.mode

    def _experts(self, layer: ExpertLayer, ty: Any) -> rx.Expr:
        weight, n, k = layer.weight, layer.n, layer.weight.k
        parts = self._repacked(weight, layer.experts)
        x, ids = self.visit_expr(layer.x), self.visit_expr(layer.ids)
        tokens, slots = ids.ty.shape
        rows, pairs = product_of(list(x.ty.shape)[:-1]), product_of([tokens, slots])
        given = [self.builder_.emit(rx.op.reshape(x, (rows, k)))]
        kind = Activations.of(weight.format, k, True, self.isa)
        if kind is not None:
            func = prepare(kind, int(rows) if isinstance(rows, tirx.IntImm) else None, self.isa)
            given += [*self._prepare(func, given, kind.parts(rows)), self._mode()]
        if is_one(tokens):
            sizes = layer.experts, n, k, int(rows), int(pairs)
            gv = self._add(experts_gemv(weight.format, *sizes, self.isa), "experts_gemv")
            args = [*given, *parts, self.builder_.emit(rx.op.reshape(ids, (pairs,)))]
        else:
            each = 1 if len(x.ty.shape) == 3 else int(slots)
            func = experts_gemm(weight.format, layer.experts, n, k, each, self.isa)
            gv = self._add(func, "experts_gemm")
            args = [*given, *parts, *self._order(layer, ids, pairs)]
        out = rx.TensorType((pairs, n), "float32")
        y = self.builder_.emit(rx.call_tir(gv, args, out_ty=out))
        return rx.op.reshape(y, list(ty.shape))

    def _order(self, layer: ExpertLayer, ids: rx.Expr, pairs: Any) -> list[Any]:
        """Where the pairs of each expert start, and the pairs in order; once for the same ids."""
        key = layer.ids
        if key not in self.orders:
            gv = self._add(expert_order(layer.experts), "expert_order")
            flat = self.builder_.emit(rx.op.reshape(ids, (pairs,)))
            types = [rx.TensorType((d,), "int32") for d in (layer.experts + 1, pairs)]
            both = self.builder_.emit(rx.call_tir(gv, [flat], out_ty=types))
            self.orders[key] = [self.builder_.emit(rx.TupleGetItem(both, i)) for i in range(2)]
        return self.orders[key]

    def _table_rows(self, table: Weight, ids: rx.Expr, ty: Any) -> rx.Expr:
        func = table_rows(table.format, table.n, table.k, self.isa)
        gv = self._add(func, "table_rows")
        out = rx.TensorType(ty.shape, "float32")
        return rx.call_tir(gv, [*self._repacked(table), ids], out_ty=out)
