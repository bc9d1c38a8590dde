"""One engine of peers.py: a process that serves it, and the times that it gave."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qcc.runtime.errors import QccError

# What brings an engine into an environment of its own, which --python or @PYTHON names.
INSTALL = {
    "llama_cpp": "CC=clang CXX=clang++ CMAKE_ARGS='-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF' pip install "
    "--no-binary llama-cpp-python llama-cpp-python gguf (gcc 12 drops the stores of an AMX tile "
    "configuration)",
    "openvino": "pip install openvino-genai openvino-tokenizers optimum-intel nncf torch",
    "mnn": "pip install MNN llmexport 'transformers<5' torch",
    "transformers": "pip install transformers torch",
}
Case = tuple[str, int, int]  # kind, tokens, depth
# Threads of some engines wait actively for a while after their work: the next one shall not pay.
PAUSE = 0.4  # seconds


@dataclass
class Engine:
    """A process that serves one engine, and its results: the seconds of each case's runs."""

    label: str
    module: str
    kind: str
    python: str
    seconds: dict[Case, list[float]] = field(default_factory=dict)
    process: Any = None
    name: str = ""
    log: Any = field(default_factory=tempfile.TemporaryFile)  # what it prints

    def start(self, checkpoint: str, folder: str, threads: int) -> str | None:
        """Load it; the reason why it cannot run, or None."""
        script = Path(__file__).with_name("peer_serve.py")
        words = [f"peer_{self.module}", checkpoint, self.kind, folder, str(threads)]
        variables = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        environment = {k: v for k, v in os.environ.items() if k != "TVM_NUM_THREADS"}
        self.process = subprocess.Popen(
            [self.python, str(script), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**environment, **variables},
        )
        try:
            answer = self._answer()
        except QccError as err:
            return str(err)
        if "missing" in answer:
            return f"{answer['missing']}; {INSTALL.get(self.module, '')}"
        self.name = answer["name"]
        return None

    def run(self, case: Case) -> None:
        """Run a case once and keep its seconds; the first run of a case warms up.

        Raises:
            QccError: the process ended.
        """
        time.sleep(PAUSE)
        kind, tokens, depth = case
        request = {"case": kind, "tokens": tokens, "depth": depth}
        with suppress(BrokenPipeError):  # it has ended: its answer, which is none, tells
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        self.seconds.setdefault(case, []).append(float(self._answer()["seconds"]))

    def rate(self, case: Case) -> float:
        """tok/s, of the median without the warm-up."""
        return case[1] / statistics.median(self.seconds[case][1:])

    def spread(self, case: Case) -> float:
        """Half the distance from the slowest run to the fastest, as a share of the median."""
        seconds = self.seconds[case][1:]
        return (max(seconds) - min(seconds)) / 2 / statistics.median(seconds)

    def stop(self) -> None:
        """End the process."""
        if self.process:
            with suppress(BrokenPipeError):  # it had ended before
                self.process.stdin.close()
            self.process.wait()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            lines = self.log.read().decode(errors="replace").strip().splitlines()
            raise QccError(f"ended with {lines[-1] if lines else 'no message'}")
        found: dict[str, Any] = json.loads(line)
        return found
