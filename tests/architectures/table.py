"""Render the README's table of architectures from what the tests recorded.

    QCC_ARCHITECTURE_RESULTS=/tmp/results.jsonl pytest tests/architectures
    QCC_ARCHITECTURE_RESULTS=/tmp/results.jsonl pytest tests/architectures --target vulkan
    python tests/architectures/table.py /tmp/results.jsonl

Each line of the file is the outcome of one check: {"model", "case", "target", "check", "reference",
"passed"}. A later line replaces an earlier one of the same check, so runs can be added up.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- architectures -->", "<!-- /architectures -->"
TARGETS = ("cpu", "cuda", "webgpu", "vulkan", "metal")
COMPILES = "test_compiles"  # the check of targets that do not run here
NO_TARGET, NO_RESULT, FAILED = "-", "not run", "fails"
LEGEND = (
    "`numbers`: compiled, run, and every logit within 2e-4 of the original's in f32, by prefill, "
    "chunks, decode and batches; with 4 bits\nagainst the original on the dequantized weights. "
    "`compiled`: built, not run. `-`: no such target yet. The original is transformers;\nwhere "
    "that lacks the architecture, a model of ours in plain torch, written from the published "
    "equations. Of bert\nand its kin, which write no text, every number of the vectors that they "
    "make of texts.\n"
)

Record = Mapping[str, Any]


def latest(lines: Iterable[str]) -> list[Record]:
    """The last record of each check."""
    found = {}
    for record in map(json.loads, lines):
        found[record["case"], record["target"], record["check"]] = record
    return list(found.values())


def cell(records: Iterable[Record], targets: Iterable[str], target: str) -> str:
    """What is known of one architecture on one target."""
    if target not in targets:
        return NO_TARGET
    ours = [record for record in records if record["target"] == target]
    if not ours:
        return NO_RESULT
    if not all(record["passed"] for record in ours):
        return FAILED
    return "compiled" if all(record["check"] == COMPILES for record in ours) else "numbers"


def render(models: Mapping[str, str], targets: Iterable[str], records: Iterable[Record]) -> str:
    """The table in Markdown.

    Args:
        models: name -> description, of every architecture.
        targets: those that exist.
        records: of checks.
    """
    records = list(records)
    rows = [["model", "checkpoints", "original", *TARGETS], ["---"] * (3 + len(TARGETS))]
    for model, description in sorted(models.items()):
        own = [record for record in records if record["model"] == model]
        references = {record["reference"] for record in own} or {NO_RESULT}
        cells = (cell(own, targets, target) for target in TARGETS)
        rows.append([model, description, ", ".join(sorted(references)), *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def between(text: str) -> tuple[str, str, str]:
    """What stands before, between and after the two markers."""
    before, begin, rest = text.partition(BEGIN + "\n")
    inside, end, after = rest.partition(END)
    assert begin and end, f"README.md lacks {BEGIN} or {END}"
    return before + begin, inside, end + after


def main(results: str) -> None:
    """Rewrite the block of README.md."""
    from qcc.compiler.models import architectures
    from qcc.targets import list_targets

    models = {name: found.description for name, found in architectures().items()}
    records = latest(Path(results).read_text(encoding="utf-8").splitlines())
    readme = ROOT / "README.md"
    before, _, after = between(readme.read_text(encoding="utf-8"))
    table = render(models, list_targets(), records)
    readme.write_text(f"{before}{LEGEND}\n{table}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
