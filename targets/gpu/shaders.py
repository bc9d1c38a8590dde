"""shaders: what each WGSL kernel of a built module declares, read from the text that TVM made.

The text is what a browser gets: figures read from it hold for whatever schedule or pass made it.
A grid is chosen at run time and is not in it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_HEADER = re.compile(r"^// Function: (\S+)\n", re.MULTILINE)
_STORAGE = re.compile(r"@binding\((\d+)\) var<storage, (read|read_write)> (\w+) : array<(\S+)>;")
_SIZE = re.compile(r"@workgroup_size\((\d+), (\d+), (\d+)\)")
_SHARED = re.compile(r"var<workgroup> \w+ : array<(.+), (\d+)>;")
_SCALARS = re.compile(r"struct PODArgs \{\n(.*?)\n\}", re.DOTALL)
_SCALAR = re.compile(r"(\w+): (\w+)")
_VECTOR = re.compile(r"vec(\d)<(\w+)>")
_BYTES = {"f16": 2, "f32": 4, "i32": 4, "u32": 4}


@dataclass(frozen=True)
class Binding:
    """A storage buffer: its name and the type of its elements in WGSL, f32 or vec4<f16>."""

    name: str
    dtype: str
    writable: bool


@dataclass(frozen=True)
class Shader:
    """One kernel; `scalars` are the (name, WGSL type) of its uniform, before the grid's width."""

    name: str
    source: str
    threads: tuple[int, int, int]
    workgroup_bytes: int
    storage: tuple[Binding, ...]
    scalars: tuple[tuple[str, str], ...]
    needs_f16: bool


def shaders(module: Any) -> list[Shader]:
    """Every WGSL kernel of a built module and of what it imports, in the order of the text."""
    found = _read(module.inspect_source()) if module.kind == "webgpu" else []
    return found + [shader for each in module.imports for shader in shaders(each)]


def _read(text: str) -> list[Shader]:
    parts = _HEADER.split(text)[1:]
    # each name stands twice: over the whole, and over the code
    return [
        _shader(name, source)
        for name, source in zip(parts[::2], parts[1::2], strict=True)
        if "@compute" in source
    ]


def _shader(name: str, source: str) -> Shader:
    size = _SIZE.search(source)
    scalars = _SCALARS.search(source)
    assert size and scalars, f"{name}: no workgroup size or no uniform in\n{source}"
    storage = _STORAGE.findall(source)
    assert [int(index) for index, *_ in storage] == list(range(len(storage))), source
    fields = _SCALAR.findall(scalars[1])
    assert fields[-1] == ("packGridDimX", "u32"), source
    shared = _SHARED.findall(source)
    assert len(shared) == source.count("var<workgroup>"), source
    return Shader(
        name,
        source,
        (int(size[1]), int(size[2]), int(size[3])),
        sum(_element_bytes(dtype) * int(count) for dtype, count in shared),
        tuple(Binding(buffer, dtype, how == "read_write") for _, how, buffer, dtype in storage),
        tuple(fields[:-1]),
        "enable f16;" in source,
    )


def _element_bytes(dtype: str) -> int:
    """The stride of an array of `dtype` in workgroup memory: a vec3 takes as much as a vec4."""
    if vector := _VECTOR.fullmatch(dtype):
        return {"2": 2, "3": 4, "4": 4}[vector[1]] * _BYTES[vector[2]]
    return _BYTES[dtype]
