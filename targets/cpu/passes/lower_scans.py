"""LowerScans: the scans of recurrent layers become the CPU's kernels of the same arguments.

Before:  call_tir_inplace(causal_conv, ...), of loops that run anywhere
After:   the same call, of a kernel vectorized over channels
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import tirx

from qcc.quant_schemes.attributes import CAUSAL_CONV, DELTA_RULE, ROLE, SUM_RULE
from qcc.targets.cpu.isa import Isa
from qcc.targets.cpu.kernels.delta_rule import causal_conv, delta_rule


@tvm.transform.module_pass(opt_level=0, name="LowerScans")
class LowerScans:
    """The pass for one processor."""

    def __init__(self, isa: Isa) -> None:
        """`isa` parametrizes the kernels."""
        self.isa = isa

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Replace every function of these roles."""
        result = mod.clone()
        for gv, func in mod.functions_items():
            if not isinstance(func, tirx.PrimFunc) or not func.attrs or ROLE not in func.attrs:
                continue
            shapes = [param.shape for param in func.params]
            if func.attrs[ROLE] == CAUSAL_CONV:
                (_, width), state = shapes[0], shapes[-2]
                taps, channels, bias = int(state[1]) + 1, int(state[2]), len(shapes) == 6
                result.update_func(gv, causal_conv(taps, channels, int(width), bias, self.isa))
            elif func.attrs[ROLE] in (DELTA_RULE, SUM_RULE):
                norms, state = shapes[1], shapes[4]
                heads, dim, wide = (int(extent) for extent in state[1:])
                key_heads, corrects = int(norms[1]) // 2, func.attrs[ROLE] == DELTA_RULE
                kernel = delta_rule(key_heads, heads, dim, wide, corrects, self.isa)
                result.update_func(gv, kernel)
        return result
