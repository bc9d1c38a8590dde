"""Small GPU programs, built as libraries and loaded back."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import tvm
from tvm import te

TARGET = {"kind": "webgpu", "target_device_type": 7}
HOST = {"kind": "llvm"}
THREADS = 64
_SERIAL = itertools.count()


def target() -> tvm.target.Target:
    """WGSL kernels for TVM's device `vulkan`, called by code for this machine."""
    return tvm.target.Target(TARGET, host=HOST)


def load(built: Any, folder: Path, change: tuple[bytes, bytes] | None = None) -> Any:
    """Export a built module and load it; `change`: bytes of the file, and as many in their place.

    Each library gets a name of its own: dlopen returns what it has under a known one.
    """
    path = folder / f"lib{next(_SERIAL)}.so"
    built.export_library(str(path))
    if change:
        old, new = change
        content = path.read_bytes()
        assert content.count(old) == 1
        assert len(old) == len(new)
        path.write_bytes(content.replace(old, new))
    return tvm.runtime.load_module(str(path))


def build(arguments: list[te.Tensor], name: str, threads: int = THREADS) -> Any:
    """The last of the arguments, computed from the others; a thread an element of its rows."""
    func = te.create_prim_func(arguments).with_attr("global_symbol", name)
    schedule = tvm.s_tir.Schedule(tvm.IRModule({name: func}))
    block = schedule.get_sblock(arguments[-1].op.name, func_name=name)
    loop = schedule.fuse(*schedule.get_loops(block))
    blocks, lanes = schedule.split(loop, [None, threads])
    schedule.bind(blocks, "blockIdx.x")
    schedule.bind(lanes, "threadIdx.x")
    return tvm.compile(schedule.mod, target=target())


def affine(name: str = "affine", dtype: str = "float32", threads: int = THREADS) -> Any:
    """2x + 1 of a vector of any length: affine(x, y)."""
    x = te.placeholder((te.var("n"),), dtype, "x")
    two, one = tvm.tirx.const(2, dtype), tvm.tirx.const(1, dtype)
    return build([x, te.compute(x.shape, lambda i: x[i] * two + one, "y")], name, threads)
