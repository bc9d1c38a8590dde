"""The wheel holds everything, and what it holds runs without the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("compiler", "quant_schemes", "runtime", "targets", "tutorials")
DATA = (
    "quant_schemes/schemes/*.yaml",
    "tutorials/tiny/model/*",
    "tutorials/tiny/heldout.txt",
    "runtime/native/*.[ch]*",
    "runtime/web/*.*",
    "runtime/web/*/*.*",
    "targets/webgpu/wasm/include/**/*.*",
)


def run(command: list[str], folder: Path, **variables: str) -> str:
    """The command's output; fails with its errors."""
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the checkout: old build/ folders would leak into it."""
    folder = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), "--quiet"]
    run([sys.executable, "-m", "pip", "wheel", *options, str(folder / "source")], folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel installed into a folder of its own; its dependencies are the environment's."""
    folder = tmp_path_factory.mktemp("installed")
    options = ["--no-deps", "--quiet", "--target", str(folder)]
    run([sys.executable, "-m", "pip", "install", *options, str(wheel)], folder)
    return folder


def test_contents(wheel: Path) -> None:
    """Every module and every data file of the checkout, the license, and no tests."""
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = (path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
    data = (path for pattern in DATA for path in ROOT.glob(pattern))
    wanted = {f"qcc/{path.relative_to(ROOT).as_posix()}" for path in (*modules, *data)}
    assert not wanted - names
    assert "qcc/tutorials/tiny/model/model.safetensors" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if "test_" in name or not name.startswith("qcc")]
    assert "qcc/__init__.py" not in names  # a namespace package


def test_imports_come_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    """Else the next test would run the checkout."""
    code = "import qcc.compiler.cli as c, qcc.runtime as r; print(c.__file__); print(r.__file__)"
    out = run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(installed))
    assert [Path(line).is_relative_to(installed) for line in out.split()] == [True, True]


def test_quickstart_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    """`qcc quickstart` compiles the bundled model and tells a story."""
    variables = {"PYTHONPATH": str(installed), "QCC_CACHE": str(tmp_path)}
    out = run([str(installed / "bin" / "qcc"), "quickstart"], tmp_path, **variables)
    assert len(out.split()) > 20
