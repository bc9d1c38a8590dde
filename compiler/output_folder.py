"""The folder that a compile writes into: whose it is, one writer at a time, what is under way.

A folder is ours if it is empty, holds qcc.json, or holds .building, which a compile that was
interrupted leaves. Any other folder is refused: nothing of the user's is ever replaced.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qcc.runtime import artifact
from qcc.runtime.errors import QccError
from qcc.runtime.files import cache_dir, os_errors, remove_stale

BUILDING = ".building"
_LIBRARY = re.compile(r"[a-z]+(-[\w.+-]+)?\.(so|wasm|tar)")


@contextmanager
def locked(out: Path, notice: Callable[[str], None]) -> Iterator[None]:
    """Hold the folder against other processes; `notice` is told if that takes waiting."""
    name = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]
    path = cache_dir() / "locks" / f"{name}.lock"
    with os_errors(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("w")
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            notice(f"Waiting for another qcc that writes {out}")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A folder inside `out` for what is under way.

    Afterwards it is gone, but where the work broke off midway it stays, empty, to tell whose the
    folder is; an `out` in which nothing was written is removed.

    Raises:
        QccError: `out` is a file, cannot be written, or is somebody else's.
    """
    if out.exists() and not out.is_dir():
        raise QccError(f"-o {out}: that is a file; give a folder")
    folder = out / BUILDING
    with os_errors(out, "write"):
        out.mkdir(parents=True, exist_ok=True)
        ours = (out / artifact.QCC_JSON).exists() or folder.exists() or not any(out.iterdir())
        if not ours:
            raise QccError(
                f"-o {out}: that folder has files and is no artifact of qcc; give a new or an "
                "empty folder"
            )
        remove_stale(out)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not any(out.iterdir()):
            out.rmdir()
        elif not (out / artifact.QCC_JSON).exists():
            folder.mkdir(exist_ok=True)


def publish(
    out: Path,
    before: Mapping[str, Any] | None,
    built: Mapping[str, tuple[Path, Mapping[str, Any], tuple[str, int]]],
    manifest: Mapping[str, Any],
) -> None:
    """Move the libraries to their places and write qcc.json last: only then the folder loads.

    Args:
        out: the artifact folder, its weights and configuration written.
        before: the manifest to which the libraries are added; None: a new artifact.
        built: library's name -> (its file, what it requires of a machine, its rank).
        manifest: the fields of qcc.json but for `libraries`.
    """
    libraries = dict(before["libraries"]) if before else {}
    folder = out / "lib"
    if before is None:
        (out / artifact.QCC_JSON).unlink(missing_ok=True)
        for old in folder.glob("*"):
            if _LIBRARY.fullmatch(old.name):
                old.unlink()
    for name, (path, requires, rank) in built.items():
        folder.mkdir(exist_ok=True)
        final = folder / path.name
        path.replace(final)
        libraries[name] = artifact.library_entry(out, final, requires, rank)
    artifact.write_manifest(out, {**manifest, "libraries": libraries})
