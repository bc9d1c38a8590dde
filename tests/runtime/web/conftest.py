"""The page's library under node: its sources are bundled once, Python asks, node answers."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[2]
WEB = TESTS.parent / "runtime" / "web"


@pytest.fixture(scope="session")
def web_modules() -> Path:
    """The folder of npm packages that .ci/run installs."""
    folder = TESTS / "web" / "node_modules"
    if shutil.which("node") is None:
        pytest.skip("needs node (Debian: apt-get install nodejs npm)")
    if not (folder / "esbuild").is_dir():
        pytest.skip("needs npm packages: npm install --ignore-scripts --prefix tests/web")
    return folder


@pytest.fixture(scope="session")
def driver(web_modules: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """driver.ts and the library's sources as one file for node."""
    out = tmp_path_factory.mktemp("driver") / "driver.mjs"
    # a script of node, or where npm runs install scripts the program itself
    command = [web_modules / "esbuild" / "bin" / "esbuild"]
    command += [Path(__file__).with_name("driver.ts"), f"--outfile={out}", "--bundle"]
    command += ["--format=esm", "--platform=node", "--log-level=warning", "--tsconfig-raw={}"]
    env = {"NODE_PATH": str(web_modules), "PATH": str(Path(shutil.which("node") or "").parent)}
    subprocess.run(command, check=True, env=env, timeout=60)
    return out


@pytest.fixture(scope="session")
def ask(driver: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Any], Any]:
    """ask(question, argument): what the function of that name in driver.ts returns; all JSON."""

    def run(question: str, argument: Any) -> Any:
        path = tmp_path_factory.mktemp("question") / "argument.json"
        path.write_text(json.dumps(argument), encoding="utf-8")
        done = subprocess.run(
            ["node", driver, question, path], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run
