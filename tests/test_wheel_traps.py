"""What breaks when the two TVM pins move: each trap in a subprocess, since both end in a segfault.

apache-tvm-ffi 0.1.15 with apache-tvm 0.27.0.post1 crashes in Schedule.tensorize and in
mod.script(show_meta=True) on a module with constants.
"""

import re
import signal
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest

TENSORIZE = """
from tvm import s_tir
from tvm.script import tirx as T

@T.prim_func(s_tir=True)
def description(a: T.handle, b: T.handle) -> None:
    A = T.match_buffer(a, (4,), "float32", offset_factor=1)
    B = T.match_buffer(b, (4,), "float32", offset_factor=1)
    with T.sblock("root"):
        T.reads(A[0:4])
        T.writes(B[0:4])
        for i in range(4):
            with T.sblock("copy"):
                vi = T.axis.spatial(4, i)
                B[vi] = A[vi] + T.float32(1)

@T.prim_func(s_tir=True)
def intrinsic(a: T.handle, b: T.handle) -> None:
    A = T.match_buffer(a, (4,), "float32", offset_factor=1)
    B = T.match_buffer(b, (4,), "float32", offset_factor=1)
    with T.sblock("root"):
        T.reads(A[0:4])
        T.writes(B[0:4])
        T.evaluate(T.call_extern("int32", "add_one", A.access_ptr("r"), B.access_ptr("w")))

@T.prim_func(s_tir=True)
def main(A: T.Buffer((16, 4), "float32"), B: T.Buffer((16, 4), "float32")):
    for i, j in T.grid(16, 4):
        with T.sblock("block"):
            vi, vj = T.axis.remap("SS", [i, j])
            B[vi, vj] = A[vi, vj] + T.float32(1)

s_tir.TensorIntrin.register("add_one", description, intrinsic)
schedule = s_tir.Schedule(main)
_, j = schedule.get_loops(schedule.get_sblock("block"))
schedule.tensorize(j, "add_one")
text = schedule.mod.script()
assert "call_extern" in text and "T.float32(1)" not in text, text
print("done")
"""
SHOW_META = """
import numpy as np
from tvm import relax
builder = relax.BlockBuilder()
x = relax.Var("x", relax.TensorType((64, 64), "float32"))
with builder.function("main", [x]):
    constant = relax.const(np.arange(4096, dtype="float32").reshape(64, 64))
    builder.emit_func_output(builder.emit(relax.op.add(x, constant)))
text = builder.get().script(show_meta=True)
assert "metadata" in text, text
print("done")
"""


@pytest.mark.parametrize("code", [TENSORIZE, SHOW_META], ids=["tensorize", "show_meta"])
def test_the_pinned_wheels_work(code: str, tmp_path: Path) -> None:
    """The program ends by itself and says so."""
    script = tmp_path / "trap.py"  # TVMScript reads its source from a file
    script.write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path
    )
    if done.returncode < 0:
        pytest.fail(f"died of {signal.Signals(-done.returncode).name}: have the pins moved?")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "done"


def test_the_installed_versions_are_the_pins() -> None:
    """qcc's requirements name one version of each wheel, and this is what runs."""
    pins = dict(
        match.groups()
        for line in requires("qcc") or ()
        if (match := re.fullmatch(r"(apache-tvm(?:-ffi)?)==(\S+)", line))
    )
    assert pins == {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"}
    assert {name: version(name) for name in pins} == pins
