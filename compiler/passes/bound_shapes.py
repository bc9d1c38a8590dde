"""BoundShapes: upper bounds of the symbolic extents, so that memory can be planned.

Before:  def prefill(input_embed: Tensor((1, n, h)), ...)
After:   the same with attribute tir_var_upper_bound = {"n": prefill_chunk_size, "b": ...}
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax as rx


@tvm.transform.module_pass(opt_level=0, name="BoundShapes")
class BoundShapes:
    """The pass; `bounds` maps names of extents (n tokens, b sequences) to their maxima."""

    def __init__(self, bounds: dict[str, int]) -> None:
        """Keep the bounds."""
        self.bounds = bounds

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Annotate every function that takes parameters."""
        result = mod.clone()
        for gv, func in mod.functions_items():
            if isinstance(func, rx.Function) and func.attrs and "num_input" in func.attrs:
                result.update_func(gv, func.with_attr("tir_var_upper_bound", self.bounds))
        return result
