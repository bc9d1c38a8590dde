"""StorageInBytes: what the memory planner reserves is what the virtual machine allocates."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax as rx
from tvm.script import ir as I
from tvm.script import relax as R

from qcc.compiler.passes.storage_in_bytes import StorageInBytes


@I.ir_module(s_tir=True)
class Planned:
    @R.function(pure=False)
    def main(x: R.Tensor((256,), "float32")):
        storage = R.memory.alloc_storage(
            R.shape([1024]), R.prim_value(0), R.str("global"), R.dtype("float32")
        )
        y = R.memory.alloc_tensor(storage, R.prim_value(0), R.shape([256]), R.dtype("float32"))
        return y


def _storages(mod: tvm.IRModule) -> list[tuple[list[int], str]]:
    """(shape, dtype) of every alloc_storage."""
    found = []

    def visit(expr: Any) -> None:
        if isinstance(expr, rx.Call) and expr.op == tvm.ir.Op.get("relax.memory.alloc_storage"):
            found.append(([int(d) for d in expr.args[0].values], str(expr.args[3].value)))

    rx.analysis.post_order_visit(mod["main"], visit)
    return found


def test_elements_become_bytes() -> None:
    """1024 bytes for 256 numbers of f32: the count stays, the element is a byte."""
    assert _storages(Planned) == [([1024], "float32")]
    found = StorageInBytes()(Planned)
    assert _storages(found) == [([1024], "uint8")]


def test_the_result_runs() -> None:
    """The tensor in the storage keeps its own dtype and shape."""
    module = tvm.transform.Sequential(
        [
            StorageInBytes(),
            rx.transform.LowerRuntimeBuiltin(),
            rx.transform.VMShapeLower(),
            rx.transform.AttachGlobalSymbol(),
        ]
    )(Planned)
    target = tvm.target.Target("llvm")
    with target:
        vm = rx.VirtualMachine(rx.build(module, target, relax_pipeline=None), tvm.cpu())
    result = vm["main"](tvm.runtime.tensor(np.zeros(256, "float32")))
    assert (tuple(result.shape), str(result.dtype)) == ((256,), "float32")
