"""The imports and exports of a wasm module, read from bytes made by hand."""

from pathlib import Path

import pytest

from qcc.runtime.errors import QccError
from qcc.targets.webgpu.wasm.contract import (
    EXPORTS,
    IMPORTS,
    check_contract,
    imports_and_exports,
)

NAME = Path("lib/webgpu.wasm")


def leb(value: int) -> bytes:
    """An unsigned LEB128 of at least two bytes, as linkers write it to patch it later."""
    return bytes([value & 0x7F | 0x80, value >> 7])


def text(value: str) -> bytes:
    return leb(len(value)) + value.encode()


def section(number: int, items: list[bytes]) -> bytes:
    body = leb(len(items)) + b"".join(items)
    return bytes([number]) + leb(len(body)) + body


def imported(name: str, what: bytes = b"\0\0") -> bytes:
    module, _, field = name.partition(".")
    return text(module) + text(field) + what


def wasm(imports: list[bytes], exports: list[str]) -> bytes:
    """A module with a custom section first; its functions need not exist to be read."""
    custom = b"\0" + leb(len(text("name")) + 1) + text("name") + b"\x02"
    exported = [text(name) + bytes([0, index]) for index, name in enumerate(exports)]
    return b"\0asm\1\0\0\0" + custom + section(2, imports) + section(7, exported)


def right() -> tuple[list[bytes], list[str]]:
    return [imported(name) for name in sorted(IMPORTS)], sorted(EXPORTS)


def test_what_clients_have_and_call_passes() -> None:
    """All imports that are allowed, or none of them."""
    imports, exports = right()
    check_contract(wasm(imports, exports), NAME)
    check_contract(wasm([], exports), NAME)


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        (b"\0\x85\1", "function"),
        (b"\1\x70\0\x80\1", "table"),
        (b"\1\x70\1\x01\x02", "table of a greatest size"),
        (b"\2\1\x80\x02\x80\x04", "memory of a greatest size"),
        (b"\3\x7f\1", "global"),
        (b"\4\0\1", "tag"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_imports_of_every_kind_are_read(what: bytes, kind: str) -> None:
    """What follows an import of each kind is found again."""
    names, _ = imports_and_exports(wasm([imported("a.b", what), imported("c.d")], []), NAME)
    assert names == {"a.b", "c.d"}


def test_a_foreign_import_is_named() -> None:
    """Beside those that are allowed."""
    imports, exports = right()
    with pytest.raises(QccError, match=r"webgpu\.wasm: .*imports env\.logf, which no browser"):
        check_contract(wasm([*imports, imported("env.logf")], exports), NAME)


def test_missing_and_needless_exports_are_named() -> None:
    """Both in one line."""
    imports, exports = right()
    exports[exports.index("TVMFFIFunctionCall")] = "secret"
    with pytest.raises(QccError, match=r"lacks the export TVMFFIFunctionCall; exports secret"):
        check_contract(wasm(imports, exports), NAME)


@pytest.mark.parametrize("cut", [0, 4, 9, 40, 200])
def test_what_is_no_module_is_refused(cut: int) -> None:
    """Nothing, a header cut short, a section cut short."""
    with pytest.raises(QccError, match="not a wasm module"):
        check_contract(wasm(*right())[:cut], NAME)
    with pytest.raises(QccError, match="not a wasm module"):
        check_contract(b"\x7fELF" + bytes(60), NAME)
