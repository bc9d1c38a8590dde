"""The TypeScript of runtime/web type-checks, and so do the types that users get."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

WEB = Path(__file__).parents[3] / "runtime" / "web"
# What a user may write with qcc.d.ts alone, and what it must refuse.
USE = """
import { load, QccError, type Model, type Result } from "./qcc";
const model: Model = await load("./", { contextWindowSize: 512 });
for await (const piece of model.generate("Once", { temperature: 0, stop: ["."] })) piece.trim();
const answer = model.chat([{ role: "user", content: "Hi" }], { seed: 1n, tools: [] });
const result: Result = await answer.complete();
const vectors: Float32Array[] = await model.embed(["a"], { dimensions: 64 });
// @ts-expect-error: there is no such option
model.generate("Once", { heat: 1 });
// @ts-expect-error: a seed is a number
model.generate("Once", { seed: "1" });
export const error: Error = new QccError(`${result.text}${vectors.length}`);
"""


@pytest.fixture(scope="module")
def sources(web_modules: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of runtime/web with the packages where TypeScript looks for them."""
    if not (web_modules / "typescript").is_dir():
        pytest.skip("needs npm packages: npm install --prefix tests/web")
    folder = tmp_path_factory.mktemp("types") / "web"
    shutil.copytree(WEB, folder, ignore=shutil.ignore_patterns("node_modules"))
    (folder / "node_modules").symlink_to(web_modules)
    return folder


def check(folder: Path) -> str:
    """What the compiler complains of."""
    compiler = folder / "node_modules" / "typescript" / "bin" / "tsc"
    command = ["node", str(compiler), "-p", str(folder), "--noEmit"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=120)
    return done.stdout if done.returncode else ""


def test_types(sources: Path) -> None:
    """Strictly; the public types are those of the code."""
    (sources / "src" / "use.ts").write_text(USE, encoding="utf-8")
    assert check(sources) == ""


def test_the_check_finds_errors(sources: Path, tmp_path: Path) -> None:
    """A type that is wrong, and an export that qcc.d.ts has and the code has not."""
    copy = tmp_path / "web"
    shutil.copytree(sources, copy, symlinks=True)
    public = copy / "src" / "qcc.d.ts"
    text = public.read_text(encoding="utf-8")
    public.write_text(text + "export function other(): void;\n", encoding="utf-8")
    (copy / "src" / "wrong.ts").write_text('export const x: number = "1";\n', encoding="utf-8")
    complaints = check(copy)
    assert "wrong.ts" in complaints and "index.ts" in complaints and "other" in complaints


def test_lines_are_short() -> None:
    """At most 100 columns, as everywhere; index.html and its icon apart."""
    long = [
        f"{path.name}:{number}"
        for path in sorted(WEB.rglob("*"))
        if path.suffix in (".ts", ".css", ".mjs") and "node_modules" not in path.parts
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 100
    ]
    assert not long


def test_versions_agree(web_modules: Path) -> None:
    """The tests' packages are those that packaging installs, at the same versions."""
    tests = json.loads((web_modules.parent / "package.json").read_text(encoding="utf-8"))
    packaged = json.loads((WEB / "package.json").read_text(encoding="utf-8"))
    assert packaged["dependencies"].items() <= tests["dependencies"].items()
