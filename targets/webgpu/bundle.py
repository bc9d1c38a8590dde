"""The page and its library as JavaScript: bundled once from runtime/web and from TVM's sources.

npm packages are installed into the cache folder, at the versions that runtime/web/package.json
pins; the bundle is cached by these, by TVM's version and by a hash of our sources. So packaging
needs the network once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from importlib import metadata, resources
from importlib.util import find_spec
from pathlib import Path

from qcc.runtime.errors import QccError
from qcc.runtime.files import cache_dir, os_errors, remove_stale, temporary_name

Tell = Callable[[str], None]
FILES = ("index.html", "page.css", "page.js", "qcc.d.ts", "qcc.js")
PACKAGES = {"node": "nodejs", "npm": "npm"}  # program -> Debian's package
BUILD_ONLY = ("esbuild",)
LEAST_NODE = 18


def bundle(tell: Tell = lambda _: None) -> Path:
    """The folder that holds FILES; made first where it is not in the cache.

    Raises:
        QccError: no node or npm, no network for the first time, a full disk.
    """
    folder = cache_dir() / "web" / f"bundle-{_digest()}"
    if not all((folder / name).is_file() for name in FILES):
        modules = node_modules(tell)
        tell("page: bundling")
        _made_whole(folder, lambda work: _build(modules, work))
    return folder


def node_modules(tell: Tell = lambda _: None) -> Path:
    """The folder node_modules with the pinned packages, in the cache.

    Raises:
        QccError: as `bundle`.
    """
    pins = (sources() / "package.json").read_bytes()
    folder = cache_dir() / "web" / f"npm-{hashlib.sha256(pins).hexdigest()[:12]}"
    if not (folder / "node_modules").is_dir():
        tell("page: installing npm packages (once)")
        _made_whole(folder, lambda work: _install(pins, work))
    return folder / "node_modules"


def bundled_packages() -> dict[str, str]:
    """The npm packages whose code is in the bundle: name -> version."""
    pins = json.loads((sources() / "package.json").read_text(encoding="utf-8"))["dependencies"]
    return {name: version for name, version in pins.items() if name not in BUILD_ONLY}


def sources() -> Path:
    """The folder runtime/web, wherever qcc is installed."""
    return Path(str(resources.files("qcc.runtime"))) / "web"


def need_program(name: str) -> str:
    """The path of `node` or `npm`.

    Raises:
        QccError: it is not installed; the message names Debian's package.
    """
    path = shutil.which(name)
    if path is None:
        raise QccError(
            f"qcc package web needs {name}, which is not installed: "
            f"apt-get install {' '.join(PACKAGES.values())} (qcc doctor shows all that is missing)"
        )
    return path


def _digest() -> str:
    """Of all that the bundle is made of."""
    digest = hashlib.sha256(metadata.version("apache-tvm").encode())
    root = sources()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        name = path.relative_to(root).as_posix()
        if "node_modules" not in name:
            digest.update(f"\0{name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _made_whole(folder: Path, make: Callable[[Path], None]) -> None:
    """Make a folder under a temporary name and rename it; another process may be quicker."""
    with os_errors(folder, "write"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(folder.parent)
        work = temporary_name(folder)
        work.mkdir()
        try:
            make(work)
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()
            if not folder.exists():
                work.rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _install(pins: bytes, work: Path) -> None:
    (work / "package.json").write_bytes(pins)
    flags = ["--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock", "--prefer-offline"]
    flags += ["--fetch-retries=1", "--fetch-retry-mintimeout=1000"]  # else a minute without network
    _run(
        [need_program("npm"), "install", *flags],
        work,
        "npm cannot install the page's packages",
        "the first time it needs the network or a filled npm cache",
    )


def _build(modules: Path, work: Path) -> None:
    tvm = find_spec("tvm")
    assert tvm is not None and tvm.origin is not None, "qcc depends on apache-tvm"
    script = sources() / "build.mjs"
    tvm_sources = Path(tvm.origin).parent / "web" / "src"
    command: list[str | Path] = [need_program("node"), script, modules, tvm_sources, work]
    _run(command, work, "the page cannot be bundled", f"node {LEAST_NODE} or newer is needed")


def _run(command: list[str | Path], folder: Path, what: str, advice: str) -> None:
    """Run a program; its first error in one line.

    Raises:
        QccError: it does not start or fails.
    """
    try:
        done = subprocess.run(
            [str(word) for word in command],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "NO_UPDATE_NOTIFIER": "1"},
        )
    except OSError as err:
        raise QccError(f"{what}: {command[0]} does not start: {err.strerror}") from err
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if "rror" in line]
        raise QccError(f"{what}: {(lines or ['it failed'])[0]}; {advice}")
