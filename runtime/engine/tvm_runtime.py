"""TVM's runtime without `import tvm`: the two shared libraries, loaded in 0.1 s instead of 2 s.

Works as well when the process has imported tvm or torch before. Knows nothing of models.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

from qcc.runtime.errors import QccError

KDL_CPU = 1  # DLPack's device type
# Loaded for all to see: a compiled library resolves its symbols against the first.
LIBRARIES = ("libtvm_runtime.so", "libtvm_runtime_extra.so")


@cache
def load() -> Any:
    """The module tvm_ffi, with TVM's runtime functions registered.

    Raises:
        QccError: apache-tvm or apache-tvm-ffi is not installed, or does not load.
    """
    try:
        tvm_ffi = _import_tvm_ffi()
        if "tvm" not in sys.modules:
            for path in _library_paths():
                ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    except (ImportError, OSError) as err:
        raise QccError(
            f"TVM's runtime does not load ({err}); pip install --force-reinstall qcc"
        ) from err
    return tvm_ffi


def _import_tvm_ffi() -> Any:
    """Import tvm_ffi, which would import torch (seconds) where it is installed."""
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import tvm_ffi
    finally:
        if hide:
            del sys.modules["torch"]
    return tvm_ffi


def _library_paths() -> list[Path]:
    spec = importlib.util.find_spec("tvm")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("no module named 'tvm'")
    folder = Path(next(iter(spec.submodule_search_locations))) / "lib"
    # The second one is absent from some builds; what it lacks shows when a function is asked for.
    return [folder / name for name in LIBRARIES if name == LIBRARIES[0] or (folder / name).exists()]


def global_function(name: str) -> Any:
    """A function of TVM's registry.

    Raises:
        QccError: this TVM has none of that name.
    """
    function = load().get_global_func(name, allow_missing=True)
    if function is None:
        raise QccError(f"this TVM has no function {name!r}; install the versions that qcc pins")
    return function


def default_threads() -> int:
    """Physical cores that this process may use; a container's CPU quota counts."""
    import psutil

    usable = _usable_cpus()
    cores = min(psutil.cpu_count(logical=False) or usable, usable)
    return max(1, min(cores, _quota() or cores))


@cache
def _usable_cpus() -> int:
    """Logical CPUs open to this process; asked once, as TVM binds the thread that calls it."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _quota() -> int | None:
    """Whole CPUs of the control group's quota; None: no limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return None  # "max", or no control group


class _Variable:
    """$TVM_NUM_THREADS: the user's word, and what we write there for TVM to read."""

    NAME = "TVM_NUM_THREADS"

    def __init__(self) -> None:
        self.written: str | None = None
        self.own = 0

    def said(self) -> int:
        """The user's value, also after we wrote another; 0: none."""
        found = os.environ.get(self.NAME, "")
        if found != self.written:
            self.own = int(found) if found.isdigit() else 0
        return self.own

    def write(self, threads: int) -> None:
        """Set it for TVM, and know it again."""
        self.written = os.environ[self.NAME] = str(threads)


_VARIABLE = _Variable()


def set_threads(threads: int | None) -> int:
    """Fix the number of threads of TVM's pool, one for all models; returns what the pool has.

    None: $TVM_NUM_THREADS, else the physical cores. TVM on its own takes half of the logical ones.
    A pool can shrink, not grow: it is made for the default at least, and where it ran before the
    first call with fewer threads it keeps those.

    Raises:
        QccError: not a positive number.
    """
    if threads is not None and threads < 1:
        raise QccError(f"--threads {threads}: must be 1 or more")
    default = _VARIABLE.said() or default_threads()
    threads = threads or default
    if _usable_cpus() < (os.cpu_count() or 1):
        # TVM binds worker i to core i, which may be one that we must not use.
        os.environ.setdefault("TVM_BIND_THREADS", "0")
    configure = global_function("runtime.config_threadpool")
    big_cores = 1
    # TVM reads the variable when it makes the pool, and again at every launch.
    _VARIABLE.write(max(threads, default))
    configure(big_cores, threads)
    threads = int(global_function("runtime.NumThreads")())
    _VARIABLE.write(threads)
    configure(big_cores, threads)  # binds the calling thread to the cores of these threads
    return threads


def bfloat16_view(bits: Any, shape: tuple[int, ...]) -> Any:
    """A bfloat16 tensor over the memory of `bits` (a tensor of uint16): NumPy has no such dtype."""
    ffi = load()
    view = global_function("runtime.TVMTensorCreateView")
    return view(bits, ffi.Shape(shape), ffi.dtype("bfloat16"), 0)
