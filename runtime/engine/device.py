"""Where a library's tensors lie and its kernels run: this machine's memory, or a GPU's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcc.runtime.engine import tvm_runtime
from qcc.runtime.engine.weight_memory import aligned_zeros
from qcc.runtime.errors import QccError
from qcc.runtime.machine import available_bytes

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Device:
    """A device of TVM's by DLPack's type and its number.

    `target` is the target whose libraries run there. `memory` in bytes is what may be taken of it,
    None where the device does not say.
    """

    target: str
    type: int
    index: int = 0
    memory: int | None = None

    @property
    def is_host(self) -> bool:
        """Whether NumPy reads its tensors."""
        return self.type == tvm_runtime.KDL_CPU

    def tensor(self, values: Array) -> Any:
        """A tensor of these numbers; on the host over the same memory."""
        host = tvm_runtime.load().from_dlpack(np.ascontiguousarray(values))
        return host if self.is_host else self.put(host)

    def put(self, host: Any) -> Any:
        """A tensor of the host's, here."""
        if self.is_host:
            return host
        here = self._empty(host.shape, host.dtype)
        tvm_runtime.global_function("runtime.TVMTensorCopyFromTo")(host, here)
        return here

    def zeros(self, shape: tuple[int, ...]) -> Any:
        """A tensor f32[*shape] of zeros."""
        return self.tensor(aligned_zeros(shape))

    def array(self, tensor: Any) -> Array:
        """The numbers of a tensor; on the host its own memory."""
        if self.is_host:
            found: Array = np.from_dlpack(tensor)
            return found
        copied = np.empty(tuple(map(int, tensor.shape)), str(tensor.dtype))
        host = tvm_runtime.load().from_dlpack(copied)
        tvm_runtime.global_function("runtime.TVMTensorCopyFromTo")(tensor, host)
        return copied

    def _empty(self, shape: Any, dtype: Any) -> Any:
        ffi = tvm_runtime.load()
        make = tvm_runtime.global_function("runtime.TVMTensorAllocWithScope")
        return make(ffi.Shape(shape), dtype, ffi.device(self.target, self.index), None)


HOST = Device("cpu", tvm_runtime.KDL_CPU)


def open_device(name: str) -> Device:
    """The device that `--device` names: cpu, a library for it as cpu-x86-64-v3, vulkan, vulkan:1.

    Raises:
        QccError: no such device, or what it needs is missing.
    """
    if name.split("-")[0] == "cpu":
        return Device("cpu", tvm_runtime.KDL_CPU, memory=available_bytes())
    if name.split(":")[0] == "vulkan":
        from qcc.runtime.native.vulkan import KDL_VULKAN, choose

        adapter = choose(name)
        memory = available_bytes() if adapter.kind == "CPU" else None
        return Device("vulkan", KDL_VULKAN, adapter.index, memory)
    if name == "webgpu":
        raise QccError("--device webgpu: browsers run it; qcc package web makes a page of it")
    raise QccError(f"--device {name}: must be cpu or vulkan (vulkan:1 the second adapter)")


def library_name(device: str) -> str:
    """The target, or the library, that `--device` asks for."""
    return device.split(":")[0]
