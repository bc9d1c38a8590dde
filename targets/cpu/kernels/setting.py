"""Settings: small tensors of the packed tuple that the runtime fills, no checkpoint.

A kernel that needs one takes it as an argument. In the graph it is a call of `setting`, which
HoistRepack turns into a slot; the function never runs.
"""

from __future__ import annotations

from functools import cache

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qcc.quant_schemes.attributes import ROLE, SETTING, SETTING_NAME
from qcc.targets.kernel import kernel

PRECISION = "precision"  # int32[1], one of the modes of kernels/activations.py


@cache
def setting(name: str, size: int, dtype: str) -> tirx.PrimFunc:
    """PrimFunc () -> dtype[size]; role `setting`."""
    args = [("value", (size,), dtype)]

    def body(value: tirx.Buffer) -> None:
        T.buffer_store(value, tirx.const(0, dtype), [0])

    return kernel("setting", args, body, {ROLE: SETTING, SETTING_NAME: name})
