"""Which files of an artifact were found right, remembered in the cache folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from qcc.runtime.errors import QccError
from qcc.runtime.files import cache_dir, write_file


class VerifiedFiles:
    """Files of a folder whose checksums were right: name -> [size, mtime in ns, checksum]."""

    def __init__(self, folder: Path) -> None:
        """Load what is known of a folder; nothing where that cannot be read."""
        self.folder = folder.resolve()
        key = hashlib.sha256(str(self.folder).encode()).hexdigest()[:32]
        self.path = cache_dir() / "verified" / f"{key}.json"
        try:
            known = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            known = {}
        self.known: dict[str, Any] = known if isinstance(known, dict) else {}

    def _state(self, file: str, digest: str) -> list[Any]:
        path = (self.folder / file).resolve()
        stat = path.stat()
        return [str(path), stat.st_size, stat.st_mtime_ns, digest]

    def knows(self, file: str, digest: str) -> bool:
        """Whether a file is still the one whose checksum was `digest`."""
        return bool(self.known.get(file) == self._state(file, digest))

    def add(self, file: str, digest: str) -> None:
        """Remember a file as it is now."""
        self.known[file] = self._state(file, digest)

    def save(self) -> None:
        """Write what is known to the cache folder, if that can be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self.path, json.dumps(self.known))
        except (OSError, QccError):
            return  # a cache that cannot be written costs time at the next start, nothing else
