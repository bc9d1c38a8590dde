"""MNN's LLM engine: a model made of the checkpoint by llmexport, token ids in.

Kinds: int4 and int8, asymmetric in blocks of 128, embedding and head too. The export needs torch
and transformers below 5, and no network. MNN's wheel has no AVX-512: its own source build is about
twice as fast.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import MNN.llm
import numpy as np

BITS = {"int4": "4", "int8": "8"}


class Peer:
    """A loaded model; see peer_serve. A prompt is always computed from its beginning."""

    def __init__(self, checkpoint: str, kind: str, folder: str, threads: int) -> None:
        """Export the checkpoint if that was not done yet, and load it."""
        path = exported(Path(checkpoint), kind, Path(folder))
        self._model = MNN.llm.create(str(path / "config.json"))
        self._model.set_config({"thread_num": threads})
        self._model.load()
        self._random = np.random.default_rng(0)
        self.name = f"MNN {version('MNN')} (wheel, AVX2) {kind}"

    def run(self, case: str, tokens: int, depth: int) -> float:
        """See peer_serve."""
        self._model.reset()
        self._model.generate_init()
        if case == "prefill":
            ids = self._ids(tokens)
            start = time.perf_counter()
            self._likeliest(ids)
            return time.perf_counter() - start
        token = self._likeliest(self._ids(max(1, depth)))
        start = time.perf_counter()
        for _ in range(tokens):
            token = self._likeliest([token])
        return time.perf_counter() - start

    def _likeliest(self, ids: list[int]) -> int:
        """Append int[n]; the likeliest token after the last."""
        logits = np.asarray(self._model.forward(ids).read())
        return int(logits.reshape(-1, logits.shape[-1])[-1].argmax())

    def _ids(self, count: int) -> list[int]:
        # The tokenizer beside the model is small: its ids are valid for every model.
        found: list[int] = self._random.integers(3, 1000, count).tolist()
        return found


def exported(checkpoint: Path, kind: str, folder: Path) -> Path:
    """The folder of the checkpoint's MNN model of a kind."""
    path = folder / f"{checkpoint.name}-mnn-{kind}"
    if not path.is_dir():
        part = path.with_suffix(".part")
        tool = str(Path(sys.executable).with_name("llmexport"))
        bits = ("--quant_bit", BITS[kind], "--quant_block", "128")
        command = [tool, "--path", str(checkpoint), "--export", "mnn", *bits, "--dst_path"]
        subprocess.run([*command, str(part)], check=True, env=_environment())
        part.rename(path)
    return path


def _environment() -> dict[str, Any]:
    """No network; and llmexport 0.0.5 imports its own parts as if its folder were on the path."""
    found = {**os.environ, "HF_HUB_OFFLINE": "1"}
    spec = importlib.util.find_spec("llmexport")
    if spec is None or spec.origin is None:
        raise ImportError("No module named 'llmexport'")
    return {**found, "PYTHONPATH": str(Path(spec.origin).parent)}
