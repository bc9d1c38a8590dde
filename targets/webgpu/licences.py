"""The licences of all that is in a packaged site, each a file."""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from qcc.targets.webgpu.bundle import bundled_packages, node_modules, sources

# The libraries that emscripten links: musl, libc++, dlmalloc, compiler-rt.
EMSCRIPTEN = Path("/usr/share/doc/emscripten/copyright")
_LEGAL = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")


def licences(artifact: Path) -> dict[str, Path]:
    """Name in the site's folder licences -> the file; `artifact` holds the checkpoint's own."""
    # A checkout has it in its root, where wheels have none.
    found = _legal(sources().parents[1], "qcc") or _of_wheel("qcc")
    for name in ("apache-tvm", "apache-tvm-ffi"):
        found |= _of_wheel(name)
    tvm = find_spec("tvm")
    assert tvm is not None and tvm.origin is not None, "qcc depends on apache-tvm"
    folder = Path(tvm.origin).parent
    found |= _legal(folder, "apache-tvm")
    for path in sorted((folder / "licenses").glob("*")):
        found[f"apache-tvm/licenses/{path.name}"] = path
    for name in bundled_packages():
        found |= _legal(node_modules() / name, name.removeprefix("@"))
    if EMSCRIPTEN.is_file():
        found["emscripten/copyright"] = EMSCRIPTEN
    return found | _legal(artifact, "model")


def _of_wheel(name: str) -> dict[str, Path]:
    """The legal files among those of an installed Python package."""
    wheel = metadata.distribution(name)
    found = {}
    for file in wheel.files or ():
        if ".dist-info" in file.parts[0] and "licenses" in file.parts:
            parts = file.parts[file.parts.index("licenses") + 1 :]
            found["/".join([name, *parts])] = Path(str(wheel.locate_file(file)))
    return found


def _legal(folder: Path, name: str) -> dict[str, Path]:
    """The legal files that lie in a folder."""
    paths = sorted({path for pattern in _LEGAL for path in folder.glob(pattern)})
    return {f"{name}/{path.name}": path for path in paths if path.is_file()}
