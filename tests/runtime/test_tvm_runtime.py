"""TVM's runtime in processes of every kind: alone, after torch, before and after tvm."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qcc.runtime.engine import tvm_runtime
from qcc.runtime.errors import QccError

USE = """
ffi = tvm_runtime.load()
import numpy as np
reshape = tvm_runtime.global_function("vm.builtin.reshape")
tensor = ffi.from_dlpack(np.arange(6, dtype=np.float32))
assert np.from_dlpack(reshape(tensor, ffi.Shape((2, 3)))).tolist() == [[0, 1, 2], [3, 4, 5]]
"""
LOAD = "from qcc.runtime.engine import tvm_runtime" + USE


def run(code: str, folder: Path, **variables: str) -> str:
    """Standard output of a new process, outside of the checkout."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_neither_torch_nor_tvm_nor_the_compiler_is_imported(tmp_path: Path) -> None:
    code = "import sys\nfrom qcc.runtime import LLM, SamplingParams\n" + LOAD
    code += (
        "print([n for n in ('torch', 'tvm', 'qcc.compiler', 'transformers') if n in sys.modules])"
    )
    assert run(code, tmp_path) == "[]"


@pytest.mark.parametrize(
    ("before", "after"), [("torch", ""), ("tvm", ""), ("", "torch"), ("", "tvm"), ("tvm", "torch")]
)
def test_beside_torch_and_tvm(tmp_path: Path, before: str, after: str) -> None:
    for name in filter(None, (before, after)):
        pytest.importorskip(name)
    lines = [f"import {before}" if before else "", LOAD, f"import {after}" if after else "", USE]
    if "tvm" in (before, after):
        lines.append("assert tvm.IRModule({}) is not None")
    if "torch" in (before, after):
        lines.append("assert torch.ones(2).sum() == 2")
    run("\n".join(lines), tmp_path)


def threads(folder: Path, said: str, **variables: str) -> int:
    code = f"{LOAD}\ntvm_runtime.set_threads({said})\n"
    code += "print(tvm_runtime.global_function('runtime.NumThreads')())"
    return int(run(code, folder, **variables))


def test_threads(tmp_path: Path) -> None:
    assert threads(tmp_path, "1", TVM_NUM_THREADS="2") == 1
    assert threads(tmp_path, "2", TVM_NUM_THREADS="1") == 2
    assert threads(tmp_path, "None", TVM_NUM_THREADS="2") == 2
    assert threads(tmp_path, "None", TVM_NUM_THREADS="") == tvm_runtime.default_threads()
    with pytest.raises(QccError, match="--threads 0: must be 1 or more"):
        tvm_runtime.set_threads(0)


@pytest.mark.parametrize(("variable", "expected"), [("3", [1, 3, 2, 3, 3]), ("", None)])
def test_threads_of_one_model_are_not_the_default_of_the_next(
    tmp_path: Path, variable: str, expected: list[int] | None
) -> None:
    """And a pool that is too small for what was asked says what it has."""
    code = f"""{LOAD}
print(tvm_runtime.default_threads())
pool = tvm_runtime.global_function("runtime.NumThreads")
for wanted in (1, None, 2, None, 64):
    got = tvm_runtime.set_threads(wanted)
    assert got == pool(), (got, pool())
    print(got)
"""
    default, *got = map(int, run(code, tmp_path, TVM_NUM_THREADS=variable).split())
    assert got == (expected or [1, default, min(2, default), default, default])


def test_a_function_that_tvm_lacks_is_an_error() -> None:
    with pytest.raises(QccError, match=r"no function 'vm\.builtin\.nothing'"):
        tvm_runtime.global_function("vm.builtin.nothing")
