"""aarch64 kernels on this machine: cross compiled, linked, and called under qemu's emulation.

An Emulated stands where a compiled tvm Executable would: functions by name, over tvm tensors.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import relax

from qcc.targets.cpu import TARGET
from qcc.targets.cpu.build import find_linker

QEMU = "qemu-aarch64"
SYSROOT = "/usr/aarch64-linux-gnu"
DRIVER = Path(__file__).with_name("aarch64_driver.c")
CODES = {"int": 0, "uint": 1, "float": 2, "bfloat": 4}  # DLPack's
INTEGER, FLOATING, TENSOR = 0, 1, 2
_numbers = itertools.count()


def lacking() -> str:
    """Why nothing can be emulated here, or an empty string."""
    if shutil.which(QEMU) is None:
        return f"no {QEMU} (Debian's qemu-user)"
    if find_linker("aarch64") is None or not Path(SYSROOT).is_dir():
        return "no aarch64 cross compiler (Debian's gcc-aarch64-linux-gnu, libc6-dev-arm64-cross)"
    return ""


@functools.cache
def _folder() -> Path:
    folder = tempfile.mkdtemp(prefix="qcc-aarch64-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def _driver() -> Path:
    path = _folder() / "driver"
    headers = [f"-I{folder}" for folder in tvm_ffi.libinfo.include_paths()]
    exports = ["-rdynamic", "-Wl,--no-as-needed", "-lm", "-ldl"]
    _run(find_linker("aarch64"), "-O1", "-Wall", *headers, DRIVER, "-o", path, *exports)
    return path


def _run(*command: Any) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.stderr}"


class Emulated:
    """The functions of an IRModule that was compiled for aarch64, in a process of their own."""

    def __init__(self, compiled: Any, name: str) -> None:
        built, library = _folder() / f"{name}.o", _folder() / f"{name}.so"
        compiled.mod.write_to_file(str(built), "o")
        _run(find_linker("aarch64"), "-shared", "-o", library, built)
        command = [QEMU, "-cpu", "max", "-L", SYSROOT, _driver(), library]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
        atexit.register(self.process.kill)

    def __getitem__(self, name: str) -> Any:
        return functools.partial(self.call, name)

    def call(self, name: str, *args: Any) -> None:
        """Call a function; tensors that it writes change here as well."""
        tensors = [(arg, arg.numpy()) for arg in args if isinstance(arg, tvm.runtime.Tensor)]
        arrays = iter(array for _, array in tensors)
        request = [struct.pack("<I", len(name)), name.encode(), struct.pack("<I", len(args))]
        for arg in args:
            if isinstance(arg, tvm.runtime.Tensor):
                request += _as_bytes(next(arrays), str(arg.dtype))
            elif isinstance(arg, float):
                request.append(struct.pack("<Id", FLOATING, arg))
            else:
                request.append(struct.pack("<Iq", INTEGER, arg))
        assert self.process.stdin is not None
        self.process.stdin.write(b"".join(request))
        self.process.stdin.flush()
        wrong = self._read(4)
        if any(wrong):
            raise AssertionError(self._read(struct.unpack("<I", wrong)[0]).decode())
        for tensor, before in tensors:
            after = self._read(before.nbytes)
            if after != before.tobytes():
                tensor.copyfrom(np.frombuffer(after, before.dtype).reshape(before.shape))

    def _read(self, size: int) -> bytes:
        assert self.process.stdout is not None and self.process.stderr is not None
        data = self.process.stdout.read(size)
        if len(data) < size:
            raise AssertionError(f"{QEMU} ended: {self.process.stderr.read().decode()}")
        return data


def _as_bytes(array: Any, dtype: str) -> list[bytes]:
    kind, shape = dtype.rstrip("0123456789"), array.shape
    head = [TENSOR, CODES[kind], array.itemsize * 8, len(shape), *shape, array.nbytes]
    return [struct.pack(f"<4I{len(shape)}qQ", *head), array.tobytes()]


@relax.expr_functor.mutator
class _CallsEmulated(relax.PyExprMutator):
    """Relax functions that name and call global functions instead of a module's PrimFuncs."""

    def __init__(self, names: dict[str, str]) -> None:
        super().__init__()
        self.names = names

    def visit_global_var_(self, var: Any) -> Any:
        return relax.ExternFunc(self.names[var.name_hint])

    def visit_call_(self, call: Any) -> Any:
        if call.op == tvm.ir.Op.get("relax.call_tir"):
            function = self.visit_expr(call.args[0])
            return relax.call_dps_packed(function, call.args[1], out_ty=call.ty_args[0])
        return super().visit_call_(call)


def emulate_kernels(mod: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
    """A module for this machine whose kernels run under emulation, compiled for `target`."""
    kernels = {
        var.name_hint: function.with_attr("global_symbol", var.name_hint)
        for var, function in mod.functions.items()
        if isinstance(function, tvm.tirx.PrimFunc)
    }
    needless = list(TARGET.needless_passes)
    with target, tvm.transform.PassContext(disabled_pass=needless):
        compiled = tvm.compile(tvm.IRModule(kernels), target)
    number = next(_numbers)
    emulated = Emulated(compiled, f"kernels{number}")
    names = {name: f"tests.aarch64.{number}.{name}" for name in kernels}
    for name, known in names.items():
        tvm.register_global_func(known, emulated[name])
    calls = _CallsEmulated(names)
    return tvm.IRModule(
        {
            var: calls.visit_expr(function)
            for var, function in mod.functions.items()
            if var.name_hint not in kernels
        }
    )
