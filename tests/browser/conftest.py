"""Debian's Chromium, driven by playwright, and the web server of a folder."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# WebGPU in software; SwiftShader has no shader-f16.
FLAGS = [
    *("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"),
    *("--use-vulkan=swiftshader", "--no-sandbox", "--disable-dev-shm-usage"),
]


@contextmanager
def outside_tools() -> Iterator[None]:
    """Skip where a tool or the network is missing, as the error in the block says."""
    from qcc.runtime.errors import QccError

    try:
        yield
    except QccError as err:
        if not any(text in str(err) for text in ("apt-get install", "needs the network")):
            raise
        pytest.skip(str(err))


@pytest.fixture(scope="session")
def playwright() -> Iterator[Any]:
    """Playwright itself."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra test)")
    with api.sync_playwright() as started:
        yield started


@pytest.fixture(scope="session")
def launch(playwright: Any) -> Callable[..., Any]:
    """launch(**options): a Chromium of its own."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs chromium (Debian: apt-get install chromium)")

    def start(**options: Any) -> Any:
        return playwright.chromium.launch(executable_path=path, args=FLAGS, **options)

    return start


@pytest.fixture(scope="session")
def chromium(launch: Callable[..., Any]) -> Iterator[Any]:
    """One Chromium for all tests that open pages of their own in it."""
    browser = launch()
    yield browser
    browser.close()


@pytest.fixture
def page(chromium: Any) -> Iterator[Any]:
    """A page with a fresh profile; an error that no code of the page caught fails the test."""
    context = chromium.new_context(viewport={"width": 900, "height": 700})
    opened = context.new_page()
    opened.set_default_timeout(20_000)
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    yield opened
    context.close()
    assert not errors


@pytest.fixture(scope="session")
def serve() -> Iterator[Callable[[Path], str]]:
    """serve(folder): the URL at which `qcc package web --serve` would serve it."""
    from qcc.compiler.cli._site_server import SiteServer, open_server

    running: list[tuple[SiteServer, threading.Thread]] = []

    def start(folder: Path) -> str:
        server = open_server(folder, 0, default=-1)
        thread = threading.Thread(target=server.serve)
        thread.start()
        running.append((server, thread))
        return server.url

    yield start
    for server, thread in running:
        server.close()
        thread.join()
