"""Relax passes that GPU targets share, in their order.

lower_linear.py   linear layers to kernels, with what comes before and after
match_product.py  what such a kernel takes over
lower_rows.py     what is done to rows of logits
widen_matmul.py   other products sum in f32
schedule.py       the rest, by TVM's rules
"""

from __future__ import annotations

from typing import Any

from qcc.targets.gpu.limits import Limits


def lowering(limits: Limits, opt: int) -> list[Any]:
    """The passes of phase `lower`; O0 has no kernels of linear layers."""
    from qcc.targets.gpu.passes.lower_linear import LowerLinear
    from qcc.targets.gpu.passes.lower_rows import LowerRows
    from qcc.targets.gpu.passes.widen_matmul import WidenMatmul

    return [*([LowerLinear(limits)] if opt >= 1 else []), LowerRows(limits), WidenMatmul()]


def scheduling(target: Any, limits: Limits) -> list[Any]:
    """The passes of phase `schedule`."""
    from qcc.targets.gpu.passes.schedule import ScheduleKernels

    return [ScheduleKernels(target, limits)]
