"""Dispatches on Dawn under node, with SwiftShader's Vulkan: one process for all of a test run.

A message, either way, is a JSON text after its length, and the bytes of buffers (dawn.mjs).
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("dawn.mjs")
PACKAGES = SCRIPT.parents[1] / "web"
SWIFTSHADER = Path("/usr/lib/chromium/vk_swiftshader_icd.json")


@functools.cache
def _node() -> subprocess.Popen[bytes]:
    if shutil.which("node") is None:
        pytest.skip("no node (Debian's nodejs)")
    if not (PACKAGES / "node_modules" / "webgpu").is_dir():
        pytest.skip("no npm package webgpu (npm install --prefix tests/web)")
    if not SWIFTSHADER.is_file():
        pytest.skip("no SwiftShader (Debian's chromium)")
    node = subprocess.Popen(
        ["node", SCRIPT, PACKAGES],
        env={**os.environ, "VK_ICD_FILENAMES": str(SWIFTSHADER)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    atexit.register(node.kill)
    return node


def _ask(request: dict[str, Any], data: Sequence[bytes] = ()) -> dict[str, Any]:
    node = _node()
    assert node.stdin and node.stdout
    text = json.dumps({**request, "sizes": [len(each) for each in data]}).encode()
    for part in (struct.pack("<I", len(text)), text, *data):
        node.stdin.write(part)
    node.stdin.flush()
    length = node.stdout.read(4)
    assert len(length) == 4, f"node ended: {node.wait()}"
    return json.loads(node.stdout.read(*struct.unpack("<I", length)))


def run(data: Sequence[bytes], dispatches: Sequence[Any]) -> tuple[str, list[bytes]]:
    """Run dispatches over buffers of these contents: (an error or "", the contents afterwards)."""
    described = [
        {
            "source": each.shader.source,
            "name": each.shader.name,
            "writable": [binding.writable for binding in each.shader.storage],
            "buffers": each.buffers,
            "uniform": list(each.uniform),
            "grid": each.grid,
        }
        for each in dispatches
    ]
    answer = _ask({"do": "run", "dispatches": described}, data)
    stdout = _node().stdout
    assert stdout
    return answer["error"], [stdout.read(size) for size in answer["sizes"]]


def validate(source: str) -> str:
    """What Dawn's null backend says against WGSL that may use f16, or an empty string."""
    return str(_ask({"do": "validate", "source": source})["error"])
