"""AttachMetadata: `_metadata() -> str`, with the memory that each function's plan takes.

Runs right after StaticPlanBlockMemory, when every temporary is an alloc_storage of constant size.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import tvm
from tvm import relax as rx
from tvm import tirx
from tvm.relax.expr_functor import PyExprVisitor, visitor

PAGE = 4096  # TVM's pooled allocator rounds every storage up to this


@tvm.transform.module_pass(opt_level=0, name="AttachMetadata")
class AttachMetadata:
    """The pass; `metadata` makes the object from {function: bytes of temporaries}."""

    def __init__(self, metadata: Callable[[dict[str, int]], dict[str, Any]]) -> None:
        """`metadata` is called once, with the plan's figures."""
        self.metadata = metadata

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Add the function."""
        usage = {}
        for gv, func in mod.functions_items():
            if isinstance(func, rx.Function) and func.attrs and "num_input" in func.attrs:
                declared = func.attrs.get("tir_var_upper_bound") or {}
                bounds = {str(name): int(bound) for name, bound in declared.items()}
                usage[gv.name_hint] = _PlannedBytes(bounds).measure(func)
        text = json.dumps(self.metadata(dict(sorted(usage.items()))))
        builder = rx.BlockBuilder(mod)
        with builder.function("_metadata", []):
            builder.emit_func_output(tvm.ir.StringImm(text))
        return builder.get()


@visitor
class _PlannedBytes(PyExprVisitor):  # type: ignore[misc]
    """Sums the storages of a function and its results, symbolic extents at their bounds."""

    def __init__(self, bounds: dict[str, int]) -> None:
        super().__init__()
        self.bounds = bounds
        self.total = 0

    def measure(self, func: rx.Function) -> int:
        self.visit_expr(func.body)
        return self.total

    def visit_call_(self, call: rx.Call) -> None:
        if call.op == tvm.ir.Op.get("relax.memory.alloc_storage"):
            self._add(call.args[0], 8)  # the planner counts in bytes
        elif call.op == tvm.ir.Op.get("relax.builtin.alloc_tensor"):
            self._add(call.args[0], tvm.DataType(str(call.args[1].value)).bits)

    def _add(self, shape: Any, bits: int) -> None:
        size = 1
        for extent in shape.values:
            size *= int(extent) if isinstance(extent, tirx.IntImm) else self._bound(extent)
        self.total += -(-size * bits // 8 // PAGE) * PAGE

    def _bound(self, extent: Any) -> int:
        analyzer = tvm.sym.Analyzer()
        for var in tirx.analysis.undefined_vars(extent):
            if var.name in self.bounds:
                analyzer.bind(var, tirx.IntImm("int64", self.bounds[var.name]))
        value = analyzer.simplify(extent)
        assert isinstance(value, tirx.IntImm), f"a temporary without a bound: {extent}"
        return int(value)
