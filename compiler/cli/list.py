"""qcc list: the architectures, schemes and targets there are, found by listing their folders."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

HELP = "list the models, schemes, methods or targets there are"
EXAMPLE = """
qcc list models
qcc list schemes
qcc list methods
qcc list targets --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the verb's arguments."""
    parser.add_argument("what", choices=sorted(LISTS), help="what to list")
    parser.add_argument("--json", action="store_true", help="print a JSON array of objects")


def run(args: argparse.Namespace) -> int:
    """Print one table, or one JSON array."""
    rows = LISTS[args.what]()
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        show(rows)
    return 0


def models() -> list[dict[str, Any]]:
    """The architectures that a config.json may name."""
    from qcc.compiler.models import architectures

    return [
        {
            "model": found.model_type,
            "classes": [*found.hf_names],
            "description": found.description,
        }
        for _, found in sorted(architectures().items())
    ]


def schemes() -> list[dict[str, Any]]:
    """The shipped schemes; bits are stored bits a weight, scales included."""
    import yaml

    from qcc.quant_schemes.scheme import SCHEME_DIR, list_schemes, load_scheme

    rows = []
    for name in list_schemes():
        scheme = load_scheme(name)
        text = yaml.safe_load((SCHEME_DIR / f"{name}.yaml").read_text(encoding="utf-8"))
        linear = scheme.format_of("*.weight", role="linear")
        rows.append(
            {
                "scheme": name,
                "linear bits": linear.bits_per_weight(),
                "embedding bits": scheme.embedding.bits_per_weight(),
                "lm_head bits": scheme.lm_head.bits_per_weight(),
                "group": linear.group,
                "layout": None if linear.is_float else linear.layout,
                "scales": scheme.dtype,
                "description": text.get("description", ""),
            }
        )
    return rows


def targets() -> list[dict[str, Any]]:
    """The targets that --target takes."""
    from qcc.targets import find_target, list_targets

    return [
        {
            "target": spec.name,
            "library": spec.library_extension,
            "computes in": spec.compute_dtype or "the scheme's dtype",
            "prefill chunk": spec.default_prefill_chunk,
            "description": spec.description,
        }
        for spec in map(find_target, list_targets())
    ]


def methods() -> list[dict[str, Any]]:
    """The ways to choose codes that --method takes."""
    from qcc.quant_schemes.rounding.method import find_method, list_methods

    return [
        {"method": name, "text": "yes" if found.needs_text else "no", "about": found.description}
        for name, found in ((name, find_method(name)) for name in list_methods())
    ]


LISTS = {"methods": methods, "models": models, "schemes": schemes, "targets": targets}


def show(rows: list[dict[str, Any]]) -> None:
    """Print rows of equal keys as an aligned table; in a pipe lines are not wrapped."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for key, value in rows[0].items():
        number = isinstance(value, int | float)
        table.add_column(key, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    width = None if sys.stdout.isatty() else 200
    console = Console(width=width, highlight=False, markup=False)
    with console.capture() as capture:  # rich would end the program when a pipe closes
        console.print(table)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
