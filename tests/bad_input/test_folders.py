"""The output folder: full disks, another artifact in the way, kill -9 at every moment."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qcc.runtime.artifact import Artifact
from qcc.runtime.errors import QccError


def disk(folder: Path, size: str) -> Iterator[Path]:
    """A tmpfs of `size`."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs root and the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Less than the library."""
    yield from disk(tmp_path / "disk", "200k")


def test_a_full_disk(cli: Any, checkpoint: Any, small_disk: Path) -> None:
    """First the weights do not fit, then, while it is linked, the library."""
    text = cli("convert", checkpoint("llama"), "--quant", "q0f32", "-o", small_disk / "out").error()
    assert "the weights need" in text and "free some or choose another folder" in text
    text = cli("compile", checkpoint("llama"), "-o", small_disk / "out").error()
    assert "space" in text.lower()
    assert not (small_disk / "out").exists()


def test_a_folder_that_cannot_be_written(cli: Any, checkpoint: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    text = cli("convert", checkpoint("llama"), "-o", tmp_path / "file").error()
    assert "file" in text


def test_another_artifact_in_the_folder(cli: Any, checkpoint: Any, tmp_path: Path) -> None:
    """Refused without --force, and the old one still opens; with it, replaced."""
    out = tmp_path / "out"
    first, second = (
        checkpoint("llama"),
        checkpoint("qwen2", hidden_size=112, num_attention_heads=14),
    )
    assert cli("convert", first, "-o", out).status == 0
    for model, flags, what in (
        (first, ["--quant", "q4f32_1"], "another scheme (q4f16_1, now q4f32_1)"),
        (first, ["--context-window", "64"], "another sizes"),
        (second, [], "another checkpoint"),
    ):
        text = cli("convert", model, "-o", out, *flags).error()
        assert what in text and "--force" in text
        assert Artifact.open(out).manifest.scheme == "q4f16_1"
    assert cli("convert", first, "-o", out).status == 0, "the same again is fine"
    assert cli("convert", second, "-o", out, "--force", "--quant", "q8f16_1").status == 0
    assert Artifact.open(out).manifest.scheme == "q8f16_1"


def test_another_calibration_in_the_folder(cli: Any, checkpoint: Any, tmp_path: Path) -> None:
    """Another text, or more of it, makes other weights; another rounding of inputs as well."""
    model, out = checkpoint("llama"), tmp_path / "out"
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("Once upon a time there was a text. " * 40)
    second.write_text("Once upon a time there was no text. " * 40)
    flags = ["--method", "imse", "--calib-tokens", "200", "--calib"]
    made = cli("convert", model, "-o", out, *flags, first)
    assert made.status == 0
    # What it advises to run names every flag that decides the weights.
    assert "--method imse" in made.out and f"--calib {first} --calib-tokens 200" in made.out
    assert cli("convert", model, "-o", out, *flags, first).status == 0, "the same again is fine"
    for other in ([*flags, second], [*flags, first, "--calib-tokens", "201"], flags[:-1]):
        text = cli("convert", model, "-o", out, *other).error()
        assert "another calibration (a.txt" in text and "--force" in text
    scheme = tmp_path / "own.yaml"
    inputs = tmp_path / "inputs"
    for activations, status in (("dynamic", 0), ("none", 2)):
        scheme.write_text(f"{{dtype: float16, linear: 8/32, activations: {activations}}}")
        ended = cli("convert", model, "-o", inputs, "--quant", scheme)
        assert ended.status == status
    assert "another rounding of inputs (dynamic, now none)" in ended.error()


# Compiles with a stand-in for LLVM, forked before any thread runs: one child a moment. A child is
# killed just before the moment-th time that it opens for writing, makes, renames or removes
# something in the folder. Prints, a line a moment: "killed", or "done" for the last.
KILLED_AT_EVERY_MOMENT = """
import os, signal, sys
from pathlib import Path
from qcc.compiler import driver

model, out = sys.argv[1], Path(sys.argv[2])
def build_library(plan, specs, spec, options, path, dump, tell):
    path.write_bytes(b"library")
    return {}


driver.build_library = build_library
events = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}

# Once without a death: imports and compiles what every child needs.
driver.compile_model(model, out.with_name("warm"), driver.CompileOptions(quant=sys.argv[3]))

def child(moment):
    left = moment
    def hook(event, args):
        nonlocal left
        if event not in events or not str(args[0]).startswith(str(out)):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
            return
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    driver.compile_model(model, out, driver.CompileOptions(quant=sys.argv[3], force=True))
    os._exit(0)

for moment in range(1, 1000):
    pid = os.fork()
    if not pid:
        child(moment)
    killed = os.waitpid(pid, 0)[1] == signal.SIGKILL
    print("killed" if killed else "done", flush=True)
    sys.stdin.readline()
    if not killed:
        break
"""


@pytest.mark.parametrize("before", ["nothing", "an older artifact"])
def test_kill_9_at_every_moment(
    cli: Any, checkpoint: Any, tmp_path: Path, environment: Any, before: str
) -> None:
    """At no moment is there a folder that opens and is not whole; the next compile repairs it."""
    out = tmp_path / "out"
    model = checkpoint("llama")
    if before != "nothing":
        assert cli("convert", model, "-o", out, "--quant", "q0f16").status == 0
    command = [sys.executable, "-c", KILLED_AT_EVERY_MOMENT, str(model), str(out), "q4f16_1"]
    moments = 0
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=environment.cwd,
        env=environment.env,
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        while (line := child.stdout.readline()) == "killed\n":
            moments += 1
            try:
                opened = Artifact.open(out)
            except QccError as err:
                assert "no such folder" in str(err) or "interrupted compile" in str(err)
            else:
                opened.verify()
                # The old one is whole, or (the last moments) the new one is.
                assert opened.manifest.scheme in ("q0f16", "q4f16_1")
            child.stdin.write("\n")
            child.stdin.flush()
        assert line == "done\n", line
        child.stdin.close()
    assert moments > 10, "the hook saw next to nothing"
    assert Artifact.open(out).manifest.scheme == "q4f16_1"
    names = {path.name for path in out.iterdir()}
    assert not [name for name in names if ".tmp-" in name or name == ".building"], names


def test_kill_9_while_llvm_works(
    cli: Any, checkpoint: Any, tmp_path: Path, environment: Any
) -> None:
    """A real `qcc compile`, killed once its working folder is there."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "qcc.compiler.cli", "compile", str(checkpoint("llama"))]
    with subprocess.Popen(
        [*command, "-o", str(out)], cwd=environment.cwd, env=environment.env, stderr=subprocess.PIPE
    ) as child:
        while not (out / ".building").exists():
            assert child.poll() is None, child.stderr.read() if child.stderr else ""
        child.kill()
        child.wait()
    ran = cli("generate", out, "a")
    assert "not a qcc artifact (or an interrupted compile)" in ran.error()
    assert cli("convert", checkpoint("llama"), "-o", out).status == 0
    assert sorted(path.name for path in out.iterdir() if path.name.startswith(".")) == []
