"""The README's table of architectures: what it shows, and that it is complete."""

from __future__ import annotations

import json

from qcc.compiler.models import architectures
from qcc.targets import list_targets

from . import table
from .cases import CASES
from .test_embeddings import EMBEDDINGS


def record(**changes: object) -> dict[str, object]:
    usual = {"model": "m", "case": "m", "target": "cpu", "check": "test_prefill"}
    return {**usual, "reference": "transformers", "passed": True, **changes}


def test_every_architecture_has_a_case() -> None:
    """And every case an architecture: one that qcc lacks fails by itself."""
    found = {case.model_type for case in (*CASES, *EMBEDDINGS)}
    assert found >= set(architectures())
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


def test_readme_lists_all_architectures() -> None:
    """Run table.py after adding one."""
    _, inside, _ = table.between((table.ROOT / "README.md").read_text(encoding="utf-8"))
    header, _, *rows = [line.split(" | ") for line in inside.splitlines() if line.startswith("|")]
    assert header == ["| model", "checkpoints", "original", *table.TARGETS[:-1], "metal |"]
    found = {row[0].removeprefix("| "): row[1] for row in rows}
    assert list(found) == sorted(architectures())
    assert found == {name: each.description for name, each in architectures().items()}
    known = {"cpu": "numbers", "vulkan": "numbers", "webgpu": table.NO_RESULT}
    columns = zip(*(row[3:] for row in rows), strict=True)
    for target, column in zip(table.TARGETS, columns, strict=True):
        shown = {text.removesuffix(" |") for text in column}
        assert shown == {known.get(target, table.NO_TARGET)}, target
    assert set(list_targets()) <= set(table.TARGETS)


def test_cells() -> None:
    """Numbers want every check to pass; of a target that does not run there is one check."""
    numbers, failed = record(), record(check="test_batch", passed=False)
    compiled = record(check=table.COMPILES, target="cuda")
    targets = ("cpu", "cuda")
    assert table.cell([numbers, compiled], targets, "cpu") == "numbers"
    assert table.cell([numbers, compiled], targets, "cuda") == "compiled"
    assert table.cell([numbers, failed, compiled], targets, "cpu") == "fails"
    assert table.cell([compiled], targets, "cpu") == "not run"
    assert table.cell([compiled], targets, "metal") == "-"


def test_rows() -> None:
    """Sorted by name, each with its description and what it is compared with."""
    records = [record(model="b", reference="ours"), record(model="a", passed=False)]
    shown = table.render({"b": "Bees", "a": "Ants"}, ["cpu"], records)
    assert shown.splitlines()[2:] == [
        "| a | Ants | transformers | fails | - | - | - | - |",
        "| b | Bees | ours | numbers | - | - | - | - |",
    ]


def test_a_later_run_replaces_an_earlier() -> None:
    lines = [json.dumps(record(passed=passed)) for passed in (False, True)]
    assert table.latest(lines) == [record(passed=True)]
