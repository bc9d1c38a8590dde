"""run_wgsl: one GPU PrimFunc on a software adapter, numpy arrays in and out.

The adapters are lavapipe through PyPI's wgpu (f16 included) and Dawn with SwiftShader under node
(f32 only). Both bind as TVM's web runtime does: a kernel's storage buffers in the order of its
arguments, and after them a uniform of its scalars and the grid's width. Both refuse what the
portable limits refuse; every error raises a WgslError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx

from qcc.targets.gpu.shaders import Shader, shaders

from . import dawn, lavapipe
from .launches import Launch, Memory, Run, build, trace

ADAPTERS: Mapping[str, Any] = {"lavapipe": lavapipe, "dawn": dawn}
GUARD = 256  # bytes after each buffer: a store beyond its end lands there and is seen
FILL = 0xFF  # NaN in f16 and f32, -1 in integers
MAX_GRID = 65535
MAX_THREADS = 256
_SCALAR_DTYPES = {"i32": np.int32, "u32": np.uint32, "f32": np.float32}


class WgslError(Exception):
    """A shader, a binding or a launch that WebGPU refuses, or a store outside a buffer."""


@dataclass(frozen=True)
class Dispatch:
    """A launch as an adapter wants it: the shader, numbers of buffers, uniform, workgroups."""

    shader: Shader
    buffers: tuple[int, ...]
    uniform: bytes
    grid: tuple[int, int, int]


def garbage(shape: Sequence[int], dtype: str) -> np.ndarray:
    """An array of NaN or -1: what is left of it was never written."""
    array = np.empty(shape, dtype)
    array.view(np.uint8)[...] = FILL
    return array


def wgsl_of(func: tirx.PrimFunc) -> list[Shader]:
    """The shaders of a scheduled PrimFunc."""
    return shaders(build(func)[0])


def run_wgsl(
    func: tirx.PrimFunc,
    args: Sequence[Any],
    outputs: int | Sequence[int] = 1,
    adapter: str = "lavapipe",
) -> list[np.ndarray]:
    """Call a scheduled PrimFunc and return what some of its buffer arguments are afterwards.

    Args:
        func: built for webgpu; all its kernels run, in order.
        args: arrays and numbers for all its arguments; symbolic extents follow from the shapes.
        outputs: so many of the last arguments, or the numbers of arguments.
        adapter: a key of ADAPTERS; the test is skipped where it is not installed.

    Raises:
        WgslError: what WebGPU refuses, or a store outside a buffer.
    """
    return Compiled(func)(args, outputs, adapter)


class Compiled:
    """A PrimFunc built once, to be called with several arrays."""

    def __init__(self, func: tirx.PrimFunc) -> None:
        module, self._host = build(func)
        self.shaders = {shader.name: shader for shader in shaders(module)}

    def __call__(
        self, args: Sequence[Any], outputs: int | Sequence[int] = 1, adapter: str = "lavapipe"
    ) -> list[np.ndarray]:
        """As run_wgsl."""
        run = trace(self._host, args)
        dispatches = [_dispatch(self.shaders[launch.kernel], launch) for launch in run.launches]
        data = [_filled(memory, args) for memory in run.memory]
        error, after = ADAPTERS[adapter].run(data, dispatches)
        if error:
            sources = "\n".join(shader.source for shader in self.shaders.values())
            raise WgslError(f"{adapter}: {error}\n{sources}")
        _check_guards(run, data, after)
        if isinstance(outputs, int):
            outputs = range(len(args) - outputs, len(args))
        by_argument = {memory.argument: number for number, memory in enumerate(run.memory)}
        return [
            _array(args[number], run.memory[by_argument[number]], after[by_argument[number]])
            for number in outputs
        ]


def validate_f16(source: str) -> None:
    """Compile WGSL with Dawn's null backend, f16 allowed.

    Raises:
        WgslError: it is not valid.
    """
    if error := dawn.validate(source):
        raise WgslError(f"{error}\n{source}")


def _dispatch(shader: Shader, launch: Launch) -> Dispatch:
    where = f"{shader.name}: {launch.grid} workgroups of {launch.threads} threads"
    if launch.threads != shader.threads or np.prod(launch.threads) > MAX_THREADS:
        raise WgslError(f"{where}, the shader says {shader.threads}, at most {MAX_THREADS}")
    if max(launch.grid) > MAX_GRID or launch.grid[2] != 1:
        raise WgslError(f"{where}: at most {MAX_GRID} on x and y, and 1 on z")
    assert len(launch.buffers) == len(shader.storage), (launch, shader.storage)
    values = zip(shader.scalars, launch.scalars, strict=True)
    fields = [_SCALAR_DTYPES[dtype](value).tobytes() for (_, dtype), value in values]
    width = np.uint32(launch.grid[0]).tobytes()
    return Dispatch(shader, launch.buffers, b"".join([*fields, width]), launch.grid)


def _filled(memory: Memory, args: Sequence[Any]) -> bytes:
    """The bytes of a buffer before the call: an argument's between garbage, or garbage alone."""
    content = b"" if memory.argument is None else args[memory.argument].tobytes()
    after = memory.size - memory.start - len(content) + GUARD
    whole = memory.start + len(content) + after
    return bytes([FILL]) * memory.start + content + bytes([FILL]) * (after + -whole % 4)


def _check_guards(run: Run, before: Sequence[bytes], after: Sequence[bytes]) -> None:
    for memory, old, new in zip(run.memory, before, after, strict=True):
        same = (new[: memory.start], new[memory.size :]) == (
            old[: memory.start],
            old[memory.size :],
        )
        if not same:
            raise WgslError(f"a store outside {memory}")


def _array(arg: np.ndarray, memory: Memory, data: bytes) -> np.ndarray:
    return np.frombuffer(data[memory.start : memory.size], arg.dtype).reshape(arg.shape).copy()
