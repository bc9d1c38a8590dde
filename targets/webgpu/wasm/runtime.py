"""TVM's runtime as one relocatable wasm object, built once from the sources in the TVM wheel.

Debian's emscripten compiles three files, with our own stand-ins (folder include/) for the headers
that the wheel leaves out, and `wasm-ld -r` joins them with emscripten's libraries. The object lies
in the cache folder under a name that tells all it was made of. C++ exceptions are on, in the way
that browsers know themselves: an error inside becomes a message and the module lives on.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from qcc.runtime.errors import QccError
from qcc.runtime.files import cache_dir, os_errors, remove_stale, write_file
from qcc.targets.spec import Tell
from qcc.targets.webgpu.wasm.tools import first_error, need_tool, run_tool, version_of

STAND_INS = Path(__file__).parent / "include"
WHEELS = ("apache-tvm", "apache-tvm-ffi")
# Relative to the folder in which the compilers run: the wheel's, and one of ours.
SOURCES = {
    "wasm_runtime": "tvm/web/emcc/wasm_runtime.cc",
    "tvmjs_support": "tvm/web/emcc/tvmjs_support.cc",
    "webgpu_runtime": "tvm/web/emcc/webgpu_runtime.cc",
    "called_by_llvm": "include/qcc/called_by_llvm.cc",
}
# Inlined less than -O2 does by itself, it is a tenth smaller; -Os and -Oz make it larger.
FLAGS = (
    *("-O2", "-mllvm", "-inline-threshold=30"),
    *("-std=c++17", "-fwasm-exceptions", "-Wno-ignored-attributes"),
)
LIBRARIES = (
    *("crt1_reactor.o", "libstandalonewasm-memgrow.a", "libstubs.a", "libnoexit.a", "libc.a"),
    *("libdlmalloc.a", "libcompiler_rt.a", "libc++-except.a", "libc++abi-except.a"),
    "libunwind-except.a",
)
# Folders of the sources whose includes begin with ..: the compiler looks there from each of them.
_INCLUDED_FROM = ("src/runtime", "src/runtime/vm", "web/emcc")


def runtime_object(tell: Tell = lambda _: None) -> Path:
    """The object's path in the cache; built first where it is not there, in a minute or three.

    Raises:
        QccError: no emcc or wasm-ld, they failed, the disk is full.
    """
    path = _cached_path()
    if not path.exists():
        with _locked(path, tell):
            if not path.exists():
                remove_stale(path.parent)
                _build(path, tell)
    return path


def is_cached() -> bool:
    """Whether a library links without building the runtime first; False without emcc."""
    return version_of("emcc") is not None and _cached_path().exists()


def _cached_path() -> Path:
    digest = hashlib.sha256(Path(__file__).read_bytes())  # the flags, and how they are used
    for file in sorted(path for path in STAND_INS.rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(STAND_INS)}\0".encode() + file.read_bytes())
    versions = [metadata.version(wheel) for wheel in WHEELS]
    need_tool("emcc")
    name = "-".join(["runtime", *versions, f"emcc{version_of('emcc')}", digest.hexdigest()[:12]])
    return cache_dir() / "wasm" / f"{name}.o"


@contextmanager
def _locked(path: Path, tell: Tell) -> Iterator[None]:
    """Hold the runtime against other processes; the system lets go when this one ends."""
    with os_errors(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = (path.parent / "lock").open("w")
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell("wasm runtime: waiting for another qcc that builds it")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _build(path: Path, tell: Tell) -> None:
    linker = need_tool("wasm-ld")
    libraries = _libraries()
    with os_errors(path, "write"), tempfile.TemporaryDirectory(prefix="qcc-wasm-") as work:
        folder = Path(work)
        _compile(folder, tell)
        tell("wasm runtime: linking")
        objects = [folder / f"{name}.o" for name in SOURCES]
        joined = folder / "runtime.o"
        run_tool([linker, "-r", "-o", joined, *objects, *libraries])
        with joined.open("rb") as file:
            write_file(path, lambda to: shutil.copyfileobj(file, to))


def _libraries() -> list[Path]:
    """The files of emscripten's own libraries.

    Raises:
        QccError: this emscripten lacks one, as versions do that are not Debian 12's.
    """
    cache = Path(run_tool([need_tool("em-config"), "CACHE"]).strip())
    folder = cache / "sysroot" / "lib" / "wasm32-emscripten"
    missing = [name for name in LIBRARIES if not (folder / name).is_file()]
    if missing:
        raise QccError(
            f"emscripten {version_of('emcc')}: {folder} lacks {', '.join(missing)}; "
            "known to work: the package emscripten of Debian 12 (3.1.6)"
        )
    return [folder / name for name in LIBRARIES]


def _compile(work: Path, tell: Tell) -> None:
    """Compile all sources at once into `work`, NAME.o each.

    The wheels are reached through links in `work`, by relative names: the module's messages hold
    the names of source files, and where a wheel lies on this machine is nobody's business.
    """
    shutil.copytree(STAND_INS, work / "include")
    for name in _INCLUDED_FROM:
        (work / "include" / name).mkdir(parents=True, exist_ok=True)
    for name in ("tvm", "tvm_ffi"):
        (work / name).symlink_to(_folder_of(name))
    (work / "3rdparty").mkdir()
    (work / "3rdparty" / "tvm-ffi").symlink_to(work / "tvm_ffi")
    folders = ["include", *(f"include/{name}" for name in _INCLUDED_FROM)]
    folders += [".", "tvm", "tvm/include", "tvm_ffi/include"]
    flags = [*FLAGS, *(f"-I{folder}" for folder in folders)]
    emcc = need_tool("emcc")
    commands = {
        name: [emcc, "-c", *flags, source, "-o", f"{name}.o"] for name, source in SOURCES.items()
    }
    _run_all(commands, work, tell)


def _folder_of(package: str) -> Path:
    """Where a wheel's package is installed; it is not imported."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise QccError(f"the Python package {package} is not installed")
    return Path(spec.origin).parent


def _run_all(commands: Mapping[str, list[str]], folder: Path, tell: Tell) -> None:
    """Run commands side by side in `folder`; when one fails, or we are stopped, none goes on."""
    started = time.monotonic()
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command in commands.items():
            with (folder / f"{name}.log").open("wb") as log:
                running[name] = subprocess.Popen(
                    command, cwd=folder, stdout=log, stderr=log, start_new_session=True
                )
        while running:
            for name, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                if process.returncode:
                    log_text = (folder / f"{name}.log").read_text(errors="replace")
                    reason = first_error(log_text, process.returncode)
                    raise QccError(f"{commands[name][0]} failed on {SOURCES[name]}: {reason}")
            seconds = time.monotonic() - started
            tell(f"wasm runtime: compiling, {seconds:.0f} s (once, about 2 minutes)")
            time.sleep(0.2)
    finally:
        for process in running.values():
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
