"""The house stands as DESIGN.md draws it: imports one way, files where they belong."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from qcc.quant_schemes.rounding.method import SHARED

ROOT = Path(__file__).parent.parent
PACKAGES = ("compiler", "quant_schemes", "runtime", "targets", "tutorials")
TOP_LEVEL = {*PACKAGES, "tests", "pyproject.toml", "README.md", "LICENSE", "constraints.txt"}
SOURCES = {".py", ".c", ".cc", ".h", ".ts", ".js", ".mjs", ".swift", ".sh"}
# What a package may import of qcc besides itself.
ALLOWED = {
    "quant_schemes": (),
    "runtime": (),
    "targets": (
        "quant_schemes",
        *(f"runtime.{name}" for name in ("artifact", "errors", "files", "machine")),
    ),
    "compiler": ("quant_schemes", "runtime", "targets"),
    "compiler.cli": ("compiler", "quant_schemes", "runtime", "targets", "tutorials"),
    "tutorials": ("compiler", "quant_schemes", "runtime", "targets"),
}
ENGINE = ("runtime.engine", "runtime.LLM", "runtime.SamplingParams")
HEAVY = ("torch", "transformers", "accelerate")
# Written in two parts: this file is searched too.
REGISTRIES = ["pypi" + ".org", "python" + "hosted", "npm" + "js.org", "deb" + ".debian.org"]
REGISTRIES += ["crates" + ".io", "proxy.golang" + ".org", "download.py" + "torch.org"]


@cache
def files() -> tuple[Path, ...]:
    """Every file that git tracks or would add, relative to the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as err:
        pytest.skip(f"needs git and a checkout: {err}")
    names = sorted(set(done.stdout.split("\0")) - {""})
    return tuple(Path(name) for name in names if (ROOT / name).is_file())


def imports_in(path: Path, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import, wherever it stands; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = parts[: len(parts) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


@cache
def imports() -> tuple[tuple[Path, int, str], ...]:
    """(file, line, dotted name) of all imports in all packages."""
    return tuple(
        (path, line, name)
        for path in files()
        if path.suffix == ".py" and path.parts[0] in PACKAGES
        for line, name in imports_in(path, ".".join(["qcc", *path.parent.parts]))
    )


def within(name: str, packages: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of `packages` or in it."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_imports_point_one_way() -> None:
    """A package imports itself and those that ALLOWED names for it, nothing else of qcc."""
    wrong = []
    for path, line, name in imports():
        package = "compiler.cli" if path.parts[:2] == ("compiler", "cli") else path.parts[0]
        inside = name.removeprefix("qcc.")
        if name != inside and not within(inside, (path.parts[0], *ALLOWED[package])):
            wrong.append(f"{path}:{line}: {package} must not import {name}")
    assert not wrong, "\n".join(wrong)


def test_only_the_command_line_reaches_the_engine() -> None:
    """compiler/ learns logits from callables; only compiler/cli hands them over."""
    wrong = [
        f"{path}:{line}: {name}"
        for path, line, name in imports()
        if within(name.removeprefix("qcc."), ENGINE)
        and path.parts[0] not in ("runtime", "tutorials")
        and path.parts[:2] != ("compiler", "cli")
    ]
    assert not wrong, "\n".join(wrong)


def test_runtime_needs_no_torch() -> None:
    """Whoever runs a model installs no torch and no transformers; a benchmark's peers may."""
    wrong = [
        f"{path}:{line}: {name}"
        for path, line, name in imports()
        if path.parts[0] == "runtime"
        and within(name, HEAVY)
        and not (path.parts[1] == "bench" and path.name.startswith("peer_"))
    ]
    assert not wrong, "\n".join(wrong)


def test_methods_and_schemes_are_plug_ins() -> None:
    """rounding/ holds a METHOD in each file but those that all share; schemes/ YAML alone."""
    folder = ROOT / "quant_schemes"
    for path in (folder / "rounding").glob("[a-z]*.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        names = {ast.unparse(node.targets[0]) for node in body if isinstance(node, ast.Assign)}
        assert ("METHOD" in names) != (path.stem in SHARED), path.name
    tracked = {path for path in files() if path.parts[:2] == ("quant_schemes", "schemes")}
    assert tracked and {path.suffix for path in tracked} == {".yaml"}


def test_torch_is_imported_where_it_is_used() -> None:
    """In functions: what needs no torch works where it is not installed."""
    wrong = []
    for path in files():
        if path.suffix != ".py" or path.parts[0] not in PACKAGES or path.parts[0] == "tutorials":
            continue
        for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom) and (
                within(getattr(node, "module", None) or node.names[0].name, HEAVY)
            ):
                wrong.append(f"{path}:{node.lineno}")
    assert not wrong, "\n".join(wrong)


def test_no_bare_names() -> None:
    """`import compiler` would make a second copy of every module."""
    every = [
        (path, line, name)
        for path in files()
        if path.suffix == ".py"
        for line, name in imports_in(path, "tests")
    ]
    wrong = [f"{path}:{line}: {name}" for path, line, name in every if within(name, PACKAGES)]
    assert not wrong, "\n".join(wrong)


def test_top_level() -> None:
    """The root holds the packages, tests and four files; texts and scripts have their places."""
    found = {path.parts[0] for path in files() if not path.parts[0].startswith(".")}
    assert found == TOP_LEVEL


def test_files_are_short() -> None:
    """At most 400 lines a source file."""
    long = {
        str(path): count
        for path in files()
        if path.suffix in SOURCES and (count := (ROOT / path).read_bytes().count(b"\n")) > 400
    }
    assert not long


def test_packages_are_listed() -> None:
    """A wheel silently drops a subpackage that pyproject.toml does not list."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = project["tool"]["setuptools"]["packages"]
    found = {
        ".".join(["qcc", *path.parent.parts])
        for path in files()
        if path.name == "__init__.py" and path.parts[0] in PACKAGES
    }
    assert set(listed) == found
    assert listed == sorted(listed)


def test_python_files_lie_in_packages() -> None:
    """A module in a folder without an __init__.py would miss from the wheel."""
    alone = [
        str(path)
        for path in files()
        if path.suffix == ".py" and path.parts[0] in PACKAGES
        if not (ROOT / path.parent / "__init__.py").is_file()
    ]
    assert not alone


def test_tests_have_unique_names_and_no_packages() -> None:
    """--import-mode=importlib keeps same names apart, people do not."""
    names = [path.name for path in files() if path.parts[0] == "tests" and path.suffix == ".py"]
    assert "__init__.py" not in names
    names = [name for name in names if name != "conftest.py"]
    assert sorted(names) == sorted(set(names))
    assert not (ROOT / "conftest.py").exists()


def test_verbs_are_complete_and_light() -> None:
    """Each verb has HELP, EXAMPLE, add_arguments, run, and imports only the standard library."""
    wrong = []
    for path in sorted((ROOT / "compiler" / "cli").glob("[a-z]*.py")):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        names = {node.name for node in body if isinstance(node, ast.FunctionDef)}
        names |= {ast.unparse(node.targets[0]) for node in body if isinstance(node, ast.Assign)}
        missing = {"HELP", "EXAMPLE", "add_arguments", "run"} - names
        wrong += [f"{path.name} lacks {name}" for name in sorted(missing)]
        for node in body:
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            light = (*sys.stdlib_module_names, "qcc.compiler.cli", "qcc.runtime.errors")
            wrong += [f"{path.name} imports {name}" for name in modules if not within(name, light)]
    assert not wrong, "\n".join(wrong)


def test_no_registry_is_named() -> None:
    """Where packages come from is the user's setting."""
    wrong = []
    for path in files():
        data = (ROOT / path).read_bytes()
        if b"\0" not in data[:1024]:
            wrong += [f"{path}: {host}" for host in REGISTRIES if host.encode() in data]
    assert not wrong, "\n".join(wrong)
