"""CheckScheduled: a PrimFunc that no kernel and no scheduler took stops the compile."""

import pytest
import tvm
from tvm import te

from qcc.compiler.passes.pipeline import CheckScheduled
from qcc.quant_schemes.attributes import SCHEDULED


def module(func):
    """An IRModule of one function."""
    return tvm.IRModule({"double": func})


def test_plain_loops_are_found_and_named():
    """Loops as te makes them are refused, the same marked as scheduled pass."""
    x = te.placeholder((4,), "float32", name="x")
    func = te.create_prim_func([x, te.compute((4,), lambda i: x[i] * 2, name="y")])
    with pytest.raises(AssertionError, match="no schedule for double"):
        CheckScheduled()(module(func))
    CheckScheduled()(module(func.with_attr(SCHEDULED, True)))
