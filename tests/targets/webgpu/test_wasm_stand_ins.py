"""The stand-in headers, compiled for this machine: the bytes of libtvm's formats, a queue.

The formats are those that libtvm writes into a library: the bytes expected here are put together
by hand, and a VM executable is written by libtvm and read by the wasm in test_wasm_link.py.
"""

import base64
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import tvm_ffi

from qcc.targets.webgpu.wasm.runtime import STAND_INS

SOURCE = Path(__file__).with_name("stand_ins.cc")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """What the program writes, part by part; it fails where it finds a mistake itself."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler (Debian's g++)")
    program = tmp_path_factory.mktemp("stand-ins") / "stand_ins"
    wheel = Path(tvm_ffi.__file__).parent
    command = [compiler, "-std=c++17", "-O0", SOURCE, "-o", program, f"-I{STAND_INS}"]
    command += [f"-I{wheel / 'include'}", f"-L{wheel / 'lib'}", "-ltvm_ffi"]
    built = subprocess.run([*command, f"-Wl,-rpath,{wheel / 'lib'}"], capture_output=True)
    assert built.returncode == 0, built.stderr.decode()
    done = subprocess.run([program], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    data, found = done.stdout, []
    while data:
        (size,) = struct.unpack_from("<Q", data)
        found.append(data[8 : 8 + size])
        data = data[8 + size :]
    return found


def counted(*items: bytes, of: int | None = None) -> bytes:
    """A count, then the items' bytes."""
    return struct.pack("<Q", len(items) if of is None else of) + b"".join(items)


def string(text: bytes) -> bytes:
    return counted(text, of=len(text))


def test_values_lie_as_libtvm_has_them(parts: list[bytes]) -> None:
    """Little endian, counts of 8 bytes, no padding."""
    assert parts[:13] == [
        struct.pack("<q", -2),
        b"\x34\x12",
        struct.pack("<d", 1.5),
        struct.pack("<i", 3),
        struct.pack("<BBH", 2, 16, 4),
        struct.pack("<ii", 15, 7),
        string(b"a\0b"),
        string(b"text"),
        counted(struct.pack("<q", 1), struct.pack("<q", -1)),
        counted(string(b""), string(b"xy")),
        counted(string(b"p"), string(b"qr")),
        counted(string(b"k") + string(b"v")),
        counted(string(b"k") + string(b"v")),
    ]


def test_base64_is_that_of_python(parts: list[bytes]) -> None:
    """With its padding."""
    assert parts[13] == base64.b64encode(b"any \xff bytes\0!")
