"""Quality of formats and methods on one model: a ladder of rows, each measured by qcc eval.

Each row is compiled and evaluated by the command line, as a user would; nothing is shared between
rows but the text that the model samples for calibration. One table, then one JSON object.

    python -m qcc.runtime.bench.quality MODEL --text FILE [--row NAME='ARGS' ...]
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FORMATS = {
    "4/32a": "--quant q4f16_a32 --embedding 8/32a",
    "3/32a": "--quant q3f16_a32 --embedding 8/32a",
    "2/16k": "--quant q2f16_k --embedding 8/32a",
}
METHODS = ("rtn", "mse", "hqq", "imse", "awq", "gptq")


def ladder() -> dict[str, str]:
    """Arguments of `qcc compile` by the row's name."""
    return {
        f"{name} {method}": f"{args} --method {method}"
        for name, args in FORMATS.items()
        for method in METHODS
    }


def run(arguments: list[str]) -> str:
    """Standard output of a qcc command; its own error ends the benchmark."""
    command = [sys.executable, "-m", "qcc.compiler.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{shlex.join(arguments)}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def measure(model: str, text: str, row: str) -> dict[str, Any]:
    """Compile with the arguments of a row and evaluate; figures of qcc eval, and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "artifact")
        begun = time.perf_counter()
        run(["compile", model, "-o", out, *shlex.split(row)])
        seconds = time.perf_counter() - begun
        shown = run(["eval", out, "--against", model, "--text", text, "--json"])
    found: dict[str, Any] = json.loads(shown.splitlines()[-1])
    return {**found, "seconds": seconds}


def main() -> None:
    """Measure every row and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder")
    parser.add_argument("--text", required=True, metavar="FILE", help="evaluation text")
    parser.add_argument(
        "--row",
        action="append",
        default=[],
        metavar="NAME=ARGS",
        help="a row of your own: arguments of qcc compile (default: 3 formats by 6 methods)",
    )
    args = parser.parse_args()
    rows = dict(text.partition("=")[::2] for text in args.row) or ladder()
    found = {}
    print("| row | bits, all | bits, linear | KL mean | se | median | p99 | top-1 | PPL | s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        item = found[name] = measure(args.model, args.text, row)
        kl = item["kl_divergence"]
        print(
            f"| {name} | {item['bits_per_weight']:.3f} | {item['linear_bits_per_weight']:.3f} "
            f"| {kl['mean']:.5f} | {kl['se']:.5f} | {kl['median']:.5f} | {kl['p99']:.4f} "
            f"| {item['top1']:.2%} | {item['perplexity']:.4f} | {item['seconds']:.0f} |",
            flush=True,
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
