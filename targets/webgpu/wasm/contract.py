"""What a wasm library may import and must export, for stock clients to load it.

Source: the JavaScript of WebLLM 0.2.86 and of TVM's web runtime, which provide these imports and
call these exports. An import more is a LinkError in the browser.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qcc.runtime.errors import QccError

IMPORTS = frozenset(
    {
        *("env.TVMFFIWasmSafeCall", "env.TVMFFIWasmFunctionDeleter"),
        *("env.emscripten_notify_memory_growth", "env.__cxa_thread_atexit", "env.__console_log"),
    }
    | {
        f"wasi_snapshot_preview1.{name}"
        for name in (
            *("clock_time_get", "proc_exit", "fd_write", "fd_read", "fd_close"),
            *("environ_sizes_get", "environ_get", "fd_seek"),
        )
    }
)
CALLED = (  # the functions that the linker is told to export
    *("TVMWasmAllocSpace", "TVMWasmFreeSpace", "TVMFFIFunctionGetGlobal"),
    *("TVMFFIFunctionSetGlobal", "TVMFFIFunctionCall", "TVMFFIObjectDecRef"),
    *("TVMFFIObjectIncRef", "TVMFFITypeKeyToIndex", "TVMFFIAnyViewToOwnedAny"),
    *("TVMFFIErrorSetRaisedFromCStr", "TVMFFIDataTypeFromString", "TVMFFIDataTypeToString"),
    *("TVMFFIGetTypeInfo", "TVMFFIWasmFunctionCreate", "TVMFFIWasmGetLastError"),
)
START = "_initialize"
EXPORTS = frozenset({"memory", START, *CALLED})
_IMPORT, _EXPORT = 2, 7  # section numbers of the binary format
_FUNCTION, _TABLE, _MEMORY, _GLOBAL, _TAG = range(5)


def check_contract(wasm: bytes, name: Path) -> None:
    """Compare what a module imports and exports with what clients have and call.

    Raises:
        QccError: an import that no client has, an export more or less; each by name.
    """
    imports, exports = imports_and_exports(wasm, name)
    wrong = [
        *(f"imports {item}, which no browser client has" for item in sorted(imports - IMPORTS)),
        *(f"lacks the export {item}" for item in sorted(EXPORTS - exports)),
        *(f"exports {item}, which no client calls" for item in sorted(exports - EXPORTS)),
    ]
    if wrong:
        raise QccError(f"{name}: the linked wasm {'; '.join(wrong)}")


def imports_and_exports(wasm: bytes, name: Path) -> tuple[frozenset[str], frozenset[str]]:
    """The names `module.field` that a module imports, and those that it exports.

    Raises:
        QccError: the bytes are no wasm module of version 1.
    """
    imports: list[str] = []
    exports: list[str] = []
    try:
        for number, reader in _sections(wasm):
            if number == _IMPORT:
                imports += (_import(reader) for _ in range(reader.number()))
            elif number == _EXPORT:
                exports += (_export(reader) for _ in range(reader.number()))
    except (IndexError, ValueError) as err:
        raise QccError(f"{name}: not a wasm module: {err}") from err
    return frozenset(imports), frozenset(exports)


class _Reader:
    """Values of the binary format, one after another."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def number(self) -> int:
        """LEB128: 7 bits a byte, the least significant first; a set bit 7 says more follows."""
        value = shift = 0
        while (byte := self.byte()) & 0x80:
            value |= (byte & 0x7F) << shift
            shift += 7
        return value | byte << shift

    def take(self, size: int) -> bytes:
        if self.at + size > len(self.data):
            raise ValueError("it ends too early")
        self.at += size
        return self.data[self.at - size : self.at]

    def text(self) -> str:
        return self.take(self.number()).decode()


def _sections(wasm: bytes) -> Iterator[tuple[int, _Reader]]:
    reader = _Reader(wasm)
    if reader.take(8) != b"\0asm\1\0\0\0":
        raise ValueError("it does not begin as one")
    while reader.at < len(wasm):
        number = reader.byte()
        yield number, _Reader(reader.take(reader.number()))


def _import(reader: _Reader) -> str:
    """`module.field`; what it is imported as is skipped."""
    name = f"{reader.text()}.{reader.text()}"
    kind = reader.byte()
    if kind == _FUNCTION:
        reader.number()
    elif kind in (_TABLE, _MEMORY):
        if kind == _TABLE:
            reader.byte()
        for _ in range(1 + (reader.byte() & 1)):  # the least size, and the greatest if bit 0 is set
            reader.number()
    elif kind in (_GLOBAL, _TAG):
        reader.take(2)
    else:
        raise ValueError(f"import of unknown kind {kind}")
    return name


def _export(reader: _Reader) -> str:
    name = reader.text()
    reader.byte()
    reader.number()
    return name
