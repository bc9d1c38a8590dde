"""TVM's device `vulkan`, run by wgpu-native: load it, and say which adapters there are.

A library built for the target {"kind": "webgpu", "target_device_type": 7} runs on
`tvm.device("vulkan", i)` after `load_vulkan()`; i is the adapter's place in what that returns.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from qcc.runtime.engine import tvm_runtime
from qcc.runtime.errors import QccError
from qcc.runtime.native import build

KDL_VULKAN = 7  # DLPack's device type
KINDS = {1: "discrete GPU", 2: "integrated GPU", 3: "CPU"}
BACKENDS = {4: "DX12", 5: "Metal", 6: "Vulkan"}


@dataclass(frozen=True)
class Adapter:
    """A GPU, or a CPU that acts as one. `max_buffer`: bytes that one tensor can have."""

    index: int
    name: str
    driver: str
    kind: str
    backend: str
    max_buffer: int
    max_threads: int
    subgroup: int
    f16: bool


@cache
def load_vulkan() -> tuple[Adapter, ...]:
    """Register the device with TVM, and list its adapters, the best kind first.

    Raises:
        QccError: no wgpu, no C++ compiler at the first use, or no adapter.
    """
    tvm_runtime.load()
    wgpu, path = build.wgpu_library(), build.library()
    if "XDG_RUNTIME_DIR" not in os.environ:
        # Mesa's layer that picks a device would complain on stderr that there is no desktop.
        os.environ.setdefault("NODEVICE_SELECT", "1")
    try:
        # For all to see: the add-on takes wgpu's functions from here.
        ctypes.CDLL(str(wgpu), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    except OSError as err:
        raise QccError(f"{path}: does not load ({err}); remove it and try again") from err
    found = tvm_runtime.global_function("qcc.vulkan.adapters")()
    if not len(found):
        raise QccError(
            "no Vulkan adapter: install the GPU's driver with libvulkan1, "
            "or mesa-vulkan-drivers for a slow one on the CPU"
        )
    return tuple(_adapter(index, dict(entry)) for index, entry in enumerate(found))


def _adapter(index: int, entry: dict[str, Any]) -> Adapter:
    kind, backend = int(entry.pop("kind")), int(entry.pop("backend"))
    return Adapter(
        index=index,
        kind=KINDS.get(kind, "unknown"),
        backend=BACKENDS.get(backend, "unknown"),
        **entry,
    )


def choose(name: str) -> Adapter:
    """The adapter that `vulkan` (the first) or `vulkan:i` names, ready for what is loaded next.

    Raises:
        QccError: another word, or no such adapter.
    """
    match = re.fullmatch(r"vulkan(?::(\d+))?", name)
    if not match:
        raise QccError(f"--device {name}: must be vulkan or vulkan:i, i an adapter's number")
    adapters = load_vulkan()
    index = int(match[1] or 0)
    if index >= len(adapters):
        known = ", ".join(f"{adapter.index} = {adapter.name}" for adapter in adapters)
        raise QccError(f"--device {name}: there is no adapter {index}; there are: {known}")
    if tvm_runtime.global_function("qcc.vulkan.was_lost")(index):
        # TVM would hand out again what it had of the lost device.
        tvm_runtime.global_function("vm.builtin.memory_manager.clear")()
    return adapters[index]


def counters(index: int = 0) -> dict[str, int]:
    """What adapter `index` holds and did: buffers, bytes, pooled_bytes, bind_groups, dispatches,
    submits."""
    load_vulkan()
    found = tvm_runtime.global_function("qcc.vulkan.counters")(index)
    return {str(name): int(count) for name, count in found.items()}


Times = dict[str, tuple[int, float]]


@contextmanager
def kernel_times(index: int = 0) -> Iterator[Callable[[], Times]]:
    """Within, a function that tells kernel -> (calls, seconds on adapter `index`) since the start.

    Each kernel runs in a pass of its own and each submission is waited for: the sum of the times
    is right, the time that the block takes is not.

    Raises:
        RuntimeError: the adapter has no timestamps.
    """
    load_vulkan()
    profile = tvm_runtime.global_function("qcc.vulkan.profile")
    times = tvm_runtime.global_function("qcc.vulkan.times")

    def read() -> Times:
        return {str(name): (int(n), int(ns) / 1e9) for name, (n, ns) in times(index).items()}

    profile(index, True)
    try:
        yield read
    finally:
        profile(index, False)
