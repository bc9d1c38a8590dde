"""A lost device and memory that is out end in exceptions; each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from .programs import affine, load

START = """
import resource, sys
import numpy as np, psutil, tvm
from qcc.runtime.native.vulkan import counters, load_vulkan

load_vulkan()
device = tvm.device("vulkan", 0)
kernel = tvm.runtime.load_module(sys.argv[1])["affine"]

def new(size=100):
    return tvm.runtime.tensor(np.ones(size, np.float32), device)

def refused(action, *words):
    try:
        action()
    except (RuntimeError, ValueError) as err:
        assert all(word in str(err) for word in words), err
    else:
        raise AssertionError(f"nothing refused: {words}")
"""

LOST = """
x, y = new(), new()
kernel(x, y)
tvm.get_global_func("qcc.vulkan.close")(0)
refused(lambda: kernel(x, y), "kernel affine_kernel", "device is lost")
refused(y.numpy, "reading a buffer", "device is lost")
refused(lambda: x.copyfrom(np.zeros(100, np.float32)), "writing a buffer", "device is lost")
refused(lambda: x.copyto(y), "device is lost")
again, there = new(), new()
kernel(again, there)
assert (there.numpy() == 3).all()
refused(lambda: kernel(again, y), "kernel affine_kernel", "device is lost")
del x, y
assert counters()["buffers"] == 2
"""

FULL = """
x, y = new(), new()
kernel(x, y)
assert (y.numpy() == 3).all()
held = psutil.Process().memory_info().vms
resource.setrlimit(resource.RLIMIT_AS, (held + (600 << 20),) * 2)
kept = []

def fill():
    while True:
        kept.append(tvm.runtime.empty((100 << 20,), "uint8", device))

refused(fill, "allocating 104857600 bytes")
assert len(kept) > 1
kept.clear()
tvm.runtime.empty((100 << 20,), "uint8", device)
kernel(x, y)
assert (y.numpy() == 3).all()
"""


@pytest.mark.parametrize("script", [LOST, FULL], ids=["lost", "full"])
def test_failure(vulkan: Any, tmp_path: Path, environment: SimpleNamespace, script: str) -> None:
    """The message says what was being done; afterwards a device works, the process ends well."""
    load(affine(), tmp_path)
    (library,) = tmp_path.glob("*.so")
    command = [sys.executable, "-c", START + script, str(library)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **vars(environment))
    assert done.returncode == 0, done.stderr
