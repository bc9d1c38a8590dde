"""HoistRepack: repacking leaves the functions and becomes a table that the runtime runs at load.

Before:  w = packed[3]; p = call_tir(repack, (w,)); y = call_tir(gemv, (x, p, ...))
After:   p = packed[7]; y = call_tir(gemv, (x, p, ...))     # packed now holds slots
         def repack_0(t): return call_tir(repack, (t,))     # exported

Every function takes the same tuple of slots, the union over all functions: a slot is a stored
tensor as it is, one repack function of stored tensors, or a setting: what call_tir(setting, ())
stood for, a tensor that the runtime fills. `slots` on the pass holds the table afterwards. Behind
them come the extents (targets/extents.py) that any function reads, one tensor each, whose extent is
the function's own variable; `extents` holds their names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax as rx
from tvm import tirx
from tvm.relax.expr_functor import PyExprMutator, PyExprVisitor, mutator, visitor

from qcc.quant_schemes.attributes import REPACK, ROLE, SETTING, SETTING_NAME
from qcc.targets.extents import DTYPE, extent_of
from qcc.targets.matching import weighted_functions


@dataclass(frozen=True)
class Slot:
    """One entry of the packed tuple: `repack` of the stored tensors `sources`, or one as it is.

    A setting has a name and no sources.
    """

    sources: tuple[int, ...]
    repack: str | None
    shape: tuple[int, ...]
    dtype: str
    setting: str | None = None


@tvm.transform.module_pass(opt_level=0, name="HoistRepack")
class HoistRepack:
    """The pass; read `slots` after it ran."""

    def __init__(self) -> None:
        """Start with an empty table."""
        self.slots: list[Slot] = []
        self.extents: list[str] = []

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Collect over all functions first, then rewrite each."""
        collector = _Collect(mod)
        functions = weighted_functions(mod)
        for _, func in functions:
            collector.collect(func)
        keys, self.slots = collector.finish()
        self.extents = sorted(collector.extents)
        types = [rx.TensorType(s.shape, s.dtype) for s in self.slots]
        rewrite = _Rewrite(mod, keys, collector.names, types, self.extents)
        for gv, func in functions:
            rewrite.function(gv, func)
        for name, (gv, types, out) in collector.repack_functions.items():
            rewrite.add_repack(name, gv, types, out)
        return rx.transform.DeadCodeElimination()(rewrite.builder_.get())


def _repack_key(mod: tvm.IRModule, call: Any) -> Any | None:
    """The callee of a `repack` or `setting` call_tir, else None."""
    if not isinstance(call, rx.Call) or call.op != tvm.ir.Op.get("relax.call_tir"):
        return None
    callee = call.args[0]
    attrs = mod[callee].attrs
    return callee if attrs and attrs.get(ROLE) in (REPACK, SETTING) else None


def _setting(mod: tvm.IRModule, callee: Any) -> str | None:
    """The name of the setting that a callee stands for."""
    attrs = mod[callee].attrs
    return str(attrs[SETTING_NAME]) if attrs.get(ROLE) == SETTING else None


def _packed_index(value: Any, packed: rx.Var) -> int | None:
    if isinstance(value, rx.TupleGetItem) and value.tuple_value.same_as(packed):
        return int(value.index)
    return None


@visitor
class _Collect(PyExprVisitor):  # type: ignore[misc]
    """Finds every repack call and every stored tensor that is used as it is."""

    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__()
        self.mod = mod
        self.keys: dict[tuple[tuple[int, ...], str | None], tuple[tuple[int, ...], str]] = {}
        self.names: dict[Any, str] = {}  # repack PrimFunc -> exported name
        self.repack_functions: dict[str, tuple[Any, list[Any], Any]] = {}
        self.index_of: dict[Any, int] = {}
        self.packed: rx.Var | None = None
        self.extents: set[str] = set()

    def collect(self, func: rx.Function) -> None:
        self.packed = func.params[-1]
        self.index_of = {}
        self.visit_expr(func.body)

    def visit_var_binding_(self, binding: rx.VarBinding) -> None:
        index = _packed_index(binding.value, self.packed)
        if index is not None:
            self.index_of[binding.var] = index
            return
        name = extent_of(binding.value)
        if name is not None:
            self.extents.add(name)
        callee = _repack_key(self.mod, binding.value)
        if callee is None:
            super().visit_var_binding_(binding)
            return
        call = binding.value
        setting = _setting(self.mod, callee)
        if setting is not None:
            self.names[callee] = setting
            self._add((), setting, call.ty)
            return
        sources = tuple(self.index_of[arg] for arg in call.args[1])
        name = self.names.setdefault(callee, f"repack_{len(self.names)}")
        types = [arg.ty for arg in call.args[1]]
        self.repack_functions.setdefault(name, (callee, types, call.ty))
        self._add(sources, name, call.ty)

    def visit_var_(self, var: rx.Var) -> None:
        if var in self.index_of:
            self._add((self.index_of[var],), None, var.ty)

    visit_dataflow_var_ = visit_var_

    def _add(self, sources: tuple[int, ...], repack: str | None, ty: Any) -> None:
        shape = tuple(int(d) for d in ty.shape)
        self.keys.setdefault((sources, repack), (shape, str(ty.dtype)))

    def finish(self) -> tuple[dict[Any, int], list[Slot]]:
        """(key -> slot index, slots in the order of the stored tensors)."""
        ordered = sorted(self.keys.items(), key=lambda item: (item[0][0], item[0][1] or ""))
        slots = [
            Slot(sources, name, *value) if sources else Slot((), None, *value, setting=name)
            for (sources, name), value in ordered
        ]
        by_key: dict[Any, int] = {key: i for i, (key, _) in enumerate(ordered)}
        return by_key, slots


def _extents(func: rx.Function) -> dict[str, tirx.Var]:
    """The variables that a function reads extents into."""
    raw: dict[Any, str] = {}
    found: dict[str, tirx.Var] = {}
    for block in func.body.blocks:
        for binding in block.bindings:
            name = extent_of(getattr(binding, "value", None))
            if name is not None:
                raw[binding.var] = name
            elif isinstance(binding, rx.MatchCast) and binding.value in raw:
                (found[raw[binding.value]],) = binding.ty.shape
    return found


@mutator
class _Rewrite(PyExprMutator):  # type: ignore[misc]
    def __init__(
        self,
        mod: tvm.IRModule,
        keys: dict[Any, int],
        names: dict[Any, str],
        types: list[Any],
        extents: list[str],
    ) -> None:
        super().__init__(mod)
        self.mod, self.keys, self.names = mod, keys, names
        self.types, self.extents = types, extents
        # Of the function that is being rewritten.
        self.read: dict[Any, str] = {}  # variable -> the extent that it holds
        self.index_of: dict[Any, int] = {}
        self.packed: rx.Var | None = None
        self.slots: rx.Var | None = None

    def function(self, gv: Any, func: rx.Function) -> None:
        *inputs, self.packed = func.params
        extents = {name: tirx.Var(name, "int64") for name in self.extents}
        extents |= _extents(func)
        sizes = [rx.TensorType((extents[name],), DTYPE) for name in self.extents]
        self.slots = rx.Var(self.packed.name, rx.TupleType([*self.types, *sizes]))
        self.index_of, self.read = {}, {}
        self.set_var_remap(self.packed, self.slots)
        body = self.visit_with_new_scope(func.body)
        self.builder_.update_func(
            gv, rx.Function([*inputs, self.slots], body, func.ret_ty, func.is_pure, func.attrs)
        )

    def visit_var_binding_(self, binding: rx.VarBinding) -> None:
        index = _packed_index(binding.value, self.packed)
        if index is not None:
            self.index_of[binding.var] = index
            key = ((index,), None)
            if key in self.keys:
                self.set_var_remap(binding.var, self._slot(key))
            return
        name = extent_of(binding.value)
        if name is not None:
            self.read[binding.var] = name
            return
        callee = _repack_key(self.mod, binding.value)
        if callee is None:
            super().visit_var_binding_(binding)
            return
        sources = tuple(self.index_of[arg] for arg in binding.value.args[1])
        self.set_var_remap(binding.var, self._slot((sources, self.names[callee])))

    def visit_match_cast_(self, binding: rx.MatchCast) -> None:
        if binding.value not in self.read:  # it stands in the parameter's type
            super().visit_match_cast_(binding)

    def _slot(self, key: Any) -> rx.Expr:
        return self.builder_.emit(rx.TupleGetItem(self.slots, self.keys[key]))

    def add_repack(self, name: str, callee: Any, types: list[Any], out: Any) -> None:
        """An exported function (stored tensors) -> slot."""
        params = [rx.Var(f"stored_{i}", ty) for i, ty in enumerate(types)]
        builder = self.builder_
        with builder.function(name, params):
            with builder.dataflow():
                value = builder.emit_output(rx.call_tir(callee, list(params), out_ty=out))
            builder.emit_func_output(value)
