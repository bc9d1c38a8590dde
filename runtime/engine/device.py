"""Where a library's tensors lie and its kernels run: this machine's memory, or a GPU's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcc.runtime.artifact import Artifact
from qcc.runtime.engine import tvm_runtime
from qcc.runtime.engine.metadata import TensorType
from qcc.runtime.engine.weight_memory import aligned_zeros
from qcc.runtime.errors import QccError
from qcc.runtime.machine import available_bytes

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Device:
    """A device of TVM's by DLPack's type and its number.

    `target` is the target whose libraries run there. `memory` in bytes is what may be taken of it,
    None where the device does not say; `largest` what one tensor may have. `features` are those of
    WebGPU that it has and kernels may need.
    """

    target: str
    type: int
    index: int = 0
    memory: int | None = None
    largest: int | None = None
    features: tuple[str, ...] = ()
    name: str = "this machine"

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

    def check_library(self, artifact: Artifact, path: Path) -> None:
        """Refuse the library at `path` of the artifact where its kernels need what is not here.

        Raises:
            QccError: names the features.
        """
        for entry in artifact.manifest.libraries.values():
            if artifact.folder / entry.file == path:
                lacks = set(entry.requires.get("features", ())) - set(self.features)
                if lacks and not self.is_host:
                    raise QccError(
                        f"{path}: needs {', '.join(sorted(lacks))}, which {self.name} lacks; "
                        "compile with a scheme in float32, as --quant q4f32_1"
                    )

    def check_tensors(self, tensors: Iterable[TensorType]) -> None:
        """Refuse tensors that are too large for one buffer.

        Raises:
            QccError: names the first, its size and the limit.
        """
        for tensor in tensors:
            if self.largest is not None and tensor.nbytes > self.largest:
                raise QccError(
                    f"{tensor.name} has {tensor.nbytes / 1e6:,.0f} MB, and a buffer of {self.name} "
                    f"at most {self.largest / 1e6:,.0f} MB; compile with fewer bits for it "
                    "(--embedding, --lm-head or --set)"
                )

    @contextmanager
    def errors(self, doing: str) -> Iterator[None]:
        """Turn what a GPU refuses within into a QccError, `doing` before it.

        What fails on the host is a mistake of ours, and passes.
        """
        try:
            yield
        except (RuntimeError, ValueError) as err:
            if self.is_host:
                raise
            reason = "; ".join(line.strip() for line in str(err).splitlines() if line.strip())
            raise QccError(f"{doing}: {reason}") from err

    @contextmanager
    def clock(self) -> Iterator[Callable[[], float]]:
        """Within, a function that tells seconds: a GPU's of its kernels alone, by its timestamps.

        Raises:
            QccError: a GPU without timestamps.
        """
        if self.is_host:
            yield time.perf_counter
            return
        from qcc.runtime.native.vulkan import kernel_times

        with self.errors("--profile"), kernel_times(self.index) as times:
            yield lambda: sum(seconds for _, seconds in times().values())

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
        return Device(
            "vulkan",
            KDL_VULKAN,
            adapter.index,
            memory=available_bytes() if adapter.kind == "CPU" else None,
            largest=adapter.max_buffer,
            features=("shader-f16",) if adapter.f16 else (),
            name=adapter.name,
        )
    if name == "webgpu":
        raise QccError("--device webgpu: browsers run it; qcc package web makes a page of it")
    raise QccError(f"--device {name}: must be cpu or vulkan (vulkan:1 the second adapter)")


def library_name(device: str) -> str:
    """The target, or the library, that `--device` asks for."""
    return device.split(":")[0]
