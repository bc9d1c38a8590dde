"""OpenVINO GenAI: an IR made of the checkpoint by optimum-intel, token ids in.

Kinds: int4 (symmetric, groups of 128; embedding and head stay at 8 bits, as optimum-intel does it)
and int8 (a scale a row). The export needs torch and no network. Attention and the type of the KV
cache (8 bits) are OpenVINO's defaults.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai

KINDS = {
    "int4": ("--weight-format", "int4", "--sym", "--group-size", "128", "--ratio", "1.0"),
    "int8": ("--weight-format", "int8"),
}


class Peer:
    """A pipeline; see peer_serve. A prompt is always computed from its beginning."""

    def __init__(self, checkpoint: str, kind: str, folder: str, threads: int) -> None:
        """Export the checkpoint if that was not done yet, and load it."""
        path = exported(Path(checkpoint), kind, Path(folder))
        self._pipeline = openvino_genai.LLMPipeline(str(path), "CPU", INFERENCE_NUM_THREADS=threads)
        self._random = np.random.default_rng(0)
        self.name = f"OpenVINO GenAI {version('openvino-genai')} {kind}"

    def run(self, case: str, tokens: int, depth: int) -> float:
        """See peer_serve; a decode is timed between its first new token and its last."""
        if case == "prefill":
            start = time.perf_counter()
            self._generate(tokens, 1)
            return time.perf_counter() - start
        times = self._generate(max(1, depth), tokens + 1).raw_metrics.m_new_token_times
        return float(times[-1] - times[0]) / 1e3  # ms

    def _generate(self, prompt: int, answer: int) -> Any:
        config = openvino_genai.GenerationConfig()
        config.min_new_tokens = config.max_new_tokens = answer
        config.do_sample, config.ignore_eos = False, True
        # The tokenizer beside the model is small: its ids are valid for every model.
        ids = self._random.integers(3, 1000, (1, prompt))
        inputs = openvino_genai.TokenizedInputs(
            openvino.Tensor(ids.astype(np.int64)), openvino.Tensor(np.ones_like(ids))
        )
        return self._pipeline.generate(inputs, config).perf_metrics


def exported(checkpoint: Path, kind: str, folder: Path) -> Path:
    """The folder of the checkpoint's IR of a kind."""
    path = folder / f"{checkpoint.name}-openvino-{kind}"
    if not path.is_dir():
        part = path.with_suffix(".part")
        tool = str(Path(sys.executable).with_name("optimum-cli"))
        task = ("--task", "text-generation-with-past")
        command = [tool, "export", "openvino", "--model", str(checkpoint), *task, *KINDS[kind]]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        subprocess.run([*command, str(part)], check=True, env=environment)
        part.rename(path)
    return path
