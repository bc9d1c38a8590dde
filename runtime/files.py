"""Files written whole or not at all, their checksums, and the cache folder.

A file is written as `.NAME.tmp-PID-N` in its own folder and renamed. What the system refuses
becomes a QccError of one line.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from qcc.runtime.errors import QccError

_SERIAL = itertools.count()
_TEMPORARY = re.compile(r"\..*\.tmp-(\d+)-\d+")
_FULL = (errno.ENOSPC, errno.EDQUOT)


def cache_dir() -> Path:
    """$QCC_CACHE, or $XDG_CACHE_HOME/qcc, or ~/.cache/qcc; it need not exist."""
    if named := os.environ.get("QCC_CACHE"):
        return Path(named)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "qcc"
    return Path.home() / ".cache" / "qcc"


@contextmanager
def os_errors(path: Path, verb: str) -> Iterator[None]:
    """Turn an OSError of the block into `PATH: cannot VERB: reason; what to do`."""
    try:
        yield
    except OSError as err:
        reason = err.strerror or str(err)
        if err.errno in _FULL:
            free = "?"
            with suppress(OSError):
                free = f"{shutil.disk_usage(path.parent).free / 1e6:.0f}"
            reason = f"no space left ({free} MB are free); free some or choose another folder"
        raise QccError(f"{path}: cannot {verb}: {reason}") from err


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other writer uses."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}-{next(_SERIAL)}")


def remove_stale(folder: Path, name: str = "*") -> None:
    """Remove what processes which are no more left under temporary names of `name` in a folder."""
    for path in folder.glob(f".{name}.tmp-*"):
        match = _TEMPORARY.fullmatch(path.name)
        if not match or _alive(int(match[1])):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def write_file(path: Path, content: str | bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file whole or not at all: a temporary name, then a rename.

    Args:
        path: in a folder that exists.
        content: text (UTF-8), bytes, or a function that writes to the open file.

    Raises:
        QccError: the system refuses, as on a full disk; the old file, if any, is untouched.
    """
    temporary = temporary_name(path)
    try:
        with os_errors(path, "write"):
            with temporary.open("wb") as file:
                if callable(content):
                    content(file)
                else:
                    file.write(content.encode() if isinstance(content, str) else content)
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """The object in a JSON file; `advice` ends the error of a file that holds none.

    Raises:
        QccError: not readable, not JSON, no object.
    """
    with os_errors(path, "read"):
        raw = path.read_bytes()
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as err:
        raise QccError(f"{path}: not readable as JSON: {err}; {advice}") from err
    if not isinstance(data, dict):
        raise QccError(f"{path}: holds no JSON object; {advice}")
    return data


def checksum(path: Path, kind: str) -> str:
    """The md5 or sha256 of a file, in hex; the interpreter lock is free meanwhile."""
    digest = hashlib.new(kind, usedforsecurity=False)
    buffer = memoryview(bytearray(1 << 20))
    with os_errors(path, "read"), path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()
