"""qcc.json: the versions, source, formats and libraries of an artifact, written last."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from qcc.runtime.errors import QccError
from qcc.runtime.files import checksum, read_json, write_file

FORMAT = 1
QCC_JSON = "qcc.json"
OPTIONAL = ("quality", "calibration", "activations", "tuned_on", "task")
RECOMPILE = "compile the model again with qcc compile"
# What wrong JSON raises while it is taken apart.
MALFORMED = (ArithmeticError, AttributeError, KeyError, TypeError, ValueError)


@dataclass(frozen=True)
class LibraryFile:
    """A compiled library: its path within the folder, sha256 in hex, size in bytes.

    `requires` is what a machine must have to run it, as runtime.machine reads it; `isa` names the
    instruction set of its kernels, which of several libraries that run has the highest `rank`.
    """

    file: str
    sha256: str
    bytes: int
    requires: Mapping[str, Any] = field(default_factory=dict)
    isa: str = ""
    rank: int = 0


@dataclass(frozen=True)
class Manifest:
    """qcc.json of an artifact that opened. `tensors` maps stored names to their formats."""

    source: Mapping[str, Any]
    scheme: str
    method: str
    tensors: Mapping[str, Mapping[str, Any]]
    sizes: Mapping[str, int]
    libraries: Mapping[str, LibraryFile]
    quality: Mapping[str, Any] | None = None
    calibration: Mapping[str, Any] | None = None  # name and sha256 of the text
    activations: str = "none"  # as the scheme says: none, dynamic, static
    tuned_on: str = ""  # name and sha256 of the text that chose a tuned scheme's formats
    task: str = "chat"  # or embedding


def running_versions() -> dict[str, str]:
    """The versions of qcc and of TVM in this environment."""
    return {
        "qcc": importlib.metadata.version("qcc"),
        "tvm": importlib.metadata.version("apache-tvm"),
    }


def library_entry(
    folder: Path,
    path: Path,
    requires: Mapping[str, Any] | None = None,
    rank: tuple[str, int] = ("", 0),
) -> dict[str, Any]:
    """The entry in qcc.json of a library that lies at `path` within the folder.

    `rank` is the name of its instruction set and the number by which it is preferred.
    """
    file = path.relative_to(folder).as_posix()
    size = path.stat().st_size
    return asdict(LibraryFile(file, checksum(path, "sha256"), size, dict(requires or {}), *rank))


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write qcc.json; do it last, since a folder without it does not open.

    Args:
        folder: of the artifact.
        content: the fields of Manifest, as JSON; format and versions are added.
    """
    data = {"format": FORMAT, **running_versions(), **content}
    parse_manifest(data)
    write_file(folder / QCC_JSON, json.dumps(data, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The object in qcc.json, as it stands; `Artifact.open` checks it.

    Raises:
        QccError: no such folder, no such file, no JSON object.
    """
    path = folder / QCC_JSON
    if not folder.is_dir():
        raise QccError(f"{folder}: no such folder; give the folder that qcc compile wrote")
    if not path.exists():
        raise QccError(
            f"{folder}: not a qcc artifact (or an interrupted compile): it has no {QCC_JSON}; "
            f"{RECOMPILE}"
        )
    return read_json(path, RECOMPILE)


def check_versions(
    manifest: Mapping[str, Any], folder: Path, versions: Mapping[str, str] | None = None
) -> None:
    """Refuse an artifact of another format, or of other versions than those installed.

    Raises:
        QccError: names both versions.
    """
    path = folder / QCC_JSON
    if manifest.get("format") != FORMAT:
        raise QccError(
            f"{path}: format {manifest.get('format')!r}, this qcc reads format {FORMAT}; "
            f"{RECOMPILE}"
        )
    for package, running in (versions or running_versions()).items():
        found = manifest.get(package)
        if found != running:
            raise QccError(
                f"{path}: compiled with {package} {found!r}, but {running!r} is installed; "
                f"{RECOMPILE}, or install {package} {found!r}"
            )


def parse_manifest(data: Mapping[str, Any]) -> Manifest:
    """A manifest whose fields have their types.

    Raises:
        ArithmeticError, AttributeError, KeyError, TypeError, ValueError: they have not.
    """
    values = {key: data[key] for key in data if key not in ("format", "qcc", "tvm")}
    if unknown := set(values) - {item.name for item in fields(Manifest)}:
        raise ValueError(f"unknown keys {sorted(unknown)}")
    for item in fields(Manifest):
        if item.name not in values and item.name not in OPTIONAL:
            raise KeyError(item.name)
    libraries = {str(k): LibraryFile(**v) for k, v in values.pop("libraries").items()}
    manifest = Manifest(libraries=libraries, **values)
    for name in ("source", "tensors", "sizes"):
        if not isinstance(getattr(manifest, name), dict):
            raise ValueError(f"{name} is no object")
    for name in ("scheme", "method", "activations", "tuned_on", "task"):
        if not isinstance(getattr(manifest, name), str):
            raise ValueError(f"{name} is no string")
    for name, size in manifest.sizes.items():
        if type(size) is not int:
            raise ValueError(f"sizes[{name}] is {size!r}, no whole number")
    for name, library in manifest.libraries.items():
        if not (isinstance(library.file, str) and isinstance(library.sha256, str)):
            raise ValueError(f"libraries[{name}] has no file or no sha256")
        if type(library.bytes) is not int:
            raise ValueError(f"libraries[{name}] has no size")
        if not isinstance(library.requires, dict):
            raise ValueError(f"libraries[{name}] requires no object")
        if not isinstance(library.isa, str) or type(library.rank) is not int:
            raise ValueError(f"libraries[{name}] has an isa or a rank of another kind")
    return manifest


def what(err: Exception) -> str:
    """The text of one of MALFORMED."""
    return f"key {err} is missing" if isinstance(err, KeyError) else str(err)
