"""Building the wasm runtime: once, whole or not at all. Scripts stand in for emscripten."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qcc.runtime.errors import QccError
from qcc.targets.webgpu.wasm import runtime
from qcc.targets.webgpu.wasm.tools import version_of

EMCC = """#!/bin/sh
export PATH=/usr/bin:/bin
case "$1" in --version) echo "emcc (stand-in) 9.8.7"; exit 0;; esac
here=$(dirname "$0")
for last; do case "$last" in *.cc) [ -f "$last" ] || exit 9;; esac; done
echo "$last" >> "$here/compiled"
. "$here/behave"
cat "$here/content" > "$last"
"""
EM_CONFIG = '#!/bin/sh\necho "$(PATH=/usr/bin:/bin dirname "$0")/cache"\n'
WASM_LD = '#!/bin/sh\nPATH=/usr/bin:/bin cat "$4" "$5" "$6" "$7" > "$3"\n'
# What a compiler does where it shall take long: until the test removes a file.
WAITS = "echo $$ >> $here/pids; while [ -e $here/wait ]; do sleep 0.05; done\n"
BUILD = "from qcc.targets.webgpu.wasm.runtime import runtime_object; print(runtime_object())"


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH, with emcc, em-config and wasm-ld; the cache is empty."""
    folder = tmp_path / "bin"
    libraries = folder / "cache" / "sysroot" / "lib" / "wasm32-emscripten"
    libraries.mkdir(parents=True)
    for name in runtime.LIBRARIES:
        (libraries / name).touch()
    for name, script in {"emcc": EMCC, "em-config": EM_CONFIG, "wasm-ld": WASM_LD}.items():
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    (folder / "content").write_text("object ")
    (folder / "behave").write_text("")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("QCC_CACHE", str(tmp_path / "qcc"))
    return folder


def read(path: Path) -> list[str]:
    """The lines of a file, sorted; none where it is not there."""
    return sorted(path.read_text().split()) if path.exists() else []


def compiled(tools: Path) -> list[str]:
    """The objects that emcc was asked for."""
    return read(tools / "compiled")


def start(tools: Path) -> "subprocess.Popen[str]":
    """Another process that builds, or waits; it has begun to compile if it ever will at once."""
    process = subprocess.Popen([sys.executable, "-c", BUILD], stdout=subprocess.PIPE, text=True)
    while process.poll() is None and not (tools / "compiled").exists():
        time.sleep(0.01)
    return process


STAND_INS = runtime.STAND_INS
OBJECTS = ["called_by_llvm.o", "tvmjs_support.o", "wasm_runtime.o", "webgpu_runtime.o"]


def test_the_runtime_is_built_once(tools: Path) -> None:
    """All files are compiled and joined; the next call finds what they gave."""
    told: list[str] = []
    assert not runtime.is_cached()
    path = runtime.runtime_object(told.append)
    assert path.read_text() == "object " * 4
    assert compiled(tools) == OBJECTS
    assert any("compiling" in text for text in told)
    assert runtime.is_cached()
    assert runtime.runtime_object() == path
    assert compiled(tools) == OBJECTS


def test_another_emscripten_builds_anew(tools: Path) -> None:
    """The version is in the name."""
    path = runtime.runtime_object()
    (tools / "emcc").write_text(EMCC.replace("9.8.7", "9.9.0"))
    assert version_of("emcc") == "9.9.0"
    assert not runtime.is_cached()
    assert runtime.runtime_object() != path


def test_other_stand_ins_build_anew(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A header's text is in the name, and so is where it lies."""
    names = {runtime.runtime_object().name}
    for index, (file, content) in enumerate([("a.h", "1"), ("a.h", "2"), ("b.h", "2")]):
        folder = tmp_path / f"include{index}"
        shutil.copytree(STAND_INS, folder)
        (folder / file).write_text(f"// {content}")
        monkeypatch.setattr(runtime, "STAND_INS", folder)
        names.add(runtime.runtime_object().name)
    assert len(names) == 4


@pytest.mark.parametrize(
    ("tool", "package"),
    [("emcc", "emscripten"), ("em-config", "emscripten"), ("wasm-ld", "lld")],
)
def test_a_missing_program_is_one_line(tools: Path, tool: str, package: str) -> None:
    """It names the program and Debian's package."""
    (tools / tool).unlink()
    with pytest.raises(QccError) as error:
        runtime.runtime_object()
    assert f"needs {tool}" in str(error.value) and f"apt-get install {package}" in str(error.value)
    assert "\n" not in str(error.value)
    assert not runtime.is_cached()


def test_a_missing_library_is_named(tools: Path) -> None:
    """As other versions of emscripten lack them."""
    next(tools.rglob("libc++-except.a")).unlink()
    with pytest.raises(QccError, match=r"emscripten 9\.8\.7: .* lacks libc\+\+-except\.a; known"):
        runtime.runtime_object()


@pytest.mark.parametrize(
    "says",
    ["a.h:3:1: error: no such thing", "fatal error: cannot write x.o: No space left on device"],
)
def test_a_failed_compiler_leaves_nothing(tools: Path, says: str) -> None:
    """Its first error is told, with the file; the other compilers are stopped."""
    fails = f'[ "$last" != wasm_runtime.o ] || {{ echo "{says}\nand more" >&2; exit 1; }}\n'
    (tools / "behave").write_text(f"{fails}{WAITS}")
    (tools / "wait").touch()
    with pytest.raises(QccError) as error:
        runtime.runtime_object()
    assert str(error.value).endswith(f"emcc failed on tvm/web/emcc/wasm_runtime.cc: {says}")
    for pid in read(tools / "pids"):
        assert not Path(f"/proc/{pid}").exists()
    assert not runtime.is_cached()


def test_a_killed_build_leaves_nothing_that_is_used(tools: Path) -> None:
    """The lock goes with the process; what its compilers still write, nobody reads."""
    (tools / "behave").write_text(WAITS)
    (tools / "wait").touch()
    process = start(tools)
    process.kill()
    process.wait()
    assert not runtime.is_cached()
    (tools / "wait").unlink()
    assert runtime.runtime_object().read_text() == "object " * 4
    assert not list(runtime.runtime_object().parent.glob(".*"))


def test_two_processes_build_once(tools: Path) -> None:
    """The second waits for the first and takes what it made."""
    (tools / "behave").write_text("sleep 1\n")
    first, second = start(tools), start(tools)
    outputs = {process.communicate()[0] for process in (first, second)}
    assert len(outputs) == 1
    assert Path(outputs.pop().strip()).read_text() == "object " * 4
    assert compiled(tools) == OBJECTS
