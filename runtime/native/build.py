"""The add-on's shared library: compiled once for each state of its sources, of TVM and of wgpu.

It lies in the cache folder, in `native/`, under a name made of all that it depends on; it is
written under a temporary name and renamed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

from qcc.runtime.errors import QccError
from qcc.runtime.files import cache_dir, os_errors, temporary_name

FOLDER = Path(__file__).parent
SOURCES = ("gpu.cc", "buffers.cc", "kernels.cc", "timing.cc", "module.cc", "device_api.cc")
OPTIONS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread")
PACKAGES = ("apache-tvm", "apache-tvm-ffi", "wgpu")
WGPU_LIBRARY = "libwgpu_native-release.so"
COMPILERS = ("g++", "c++", "clang++")
LOG_LINES = 3


def package_folder(module: str, package: str) -> Path:
    """The folder of an installed module, without importing it.

    Raises:
        QccError: not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise QccError(f"Vulkan needs the package {package}: pip install 'qcc[vulkan]'")
    return Path(next(iter(spec.submodule_search_locations)))


def wgpu_library() -> Path:
    """wgpu-native, as PyPI's wgpu carries it.

    Raises:
        QccError: wgpu is not installed, or carries none for this system.
    """
    path = package_folder("wgpu", "wgpu") / "resources" / WGPU_LIBRARY
    if not path.is_file():
        raise QccError(f"Vulkan needs {path}, which this wgpu lacks: pip install 'qcc[vulkan]'")
    return path


def library() -> Path:
    """The add-on, compiled if no earlier process did.

    Raises:
        QccError: no wgpu, no compiler, or the compiler refuses.
    """
    includes = _includes()
    path = cache_dir() / "native" / f"libqcc_vulkan-{_state()}.so"
    if not path.is_file():
        with os_errors(path, "write"):
            path.parent.mkdir(parents=True, exist_ok=True)
        _compile(path, includes)
    return path


def _state() -> str:
    """A short checksum of all that the library depends on."""
    digest = hashlib.sha256()
    versions = [f"{name}={importlib.metadata.version(name)}" for name in PACKAGES]
    for part in (*versions, *OPTIONS, platform.machine()):
        digest.update(part.encode() + b"\0")
    for source in sorted(FOLDER.glob("*.[ch]*")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _includes() -> list[str]:
    folders = [
        package_folder("tvm", "apache-tvm") / "include",
        package_folder("tvm_ffi", "apache-tvm-ffi") / "include",
        wgpu_library().parent,
    ]
    return [part for folder in folders for part in ("-isystem", str(folder))]


def _compiler() -> list[str]:
    """$CXX with its options, or the first of COMPILERS that is there."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    raise QccError(
        f"Vulkan needs a C++ compiler, and found no {(named or COMPILERS)[0]}: apt install g++"
    )


def _compile(path: Path, includes: list[str]) -> None:
    """Compile the sources into `path`.

    What they call of TVM and of wgpu stays undefined: both are loaded before it for all to see.
    """
    temporary = temporary_name(path)
    sources = [str(FOLDER / name) for name in SOURCES]
    command = [*_compiler(), *OPTIONS, *includes, *sources, "-o", str(temporary)]
    try:
        with os_errors(path, "write"):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
                log = "; ".join((errors or done.stderr.splitlines()[-LOG_LINES:])[:LOG_LINES])
                raise QccError(f"{command[0]} could not build qcc's Vulkan library: {log}")
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
