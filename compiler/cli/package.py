"""qcc package: what others load of an artifact, as a web site."""

from __future__ import annotations

import argparse
import json
from typing import Any

HELP = "make a web site, which runs the model in the browser, of an artifact"
EXAMPLE = """
qcc package web ./llama-q4 -o ./site
qcc package web ./llama-q4 -o ./site --serve
"""
PORT = 8000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the verb's options."""
    parser.add_argument("kind", metavar="KIND", help="web: a static site for browsers with WebGPU")
    parser.add_argument("artifact", metavar="ARTIFACT", help="what qcc compile wrote")
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="folder to write")
    parser.add_argument(
        "--name", default=None, help="of the model in it (default: the checkpoint's and the scheme)"
    )
    parser.add_argument(
        "--serve",
        nargs="?",
        type=int,
        const=PORT,
        default=None,
        metavar="PORT",
        help=f"then serve it on this machine alone (default port: {PORT}, or the next free one)",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace a folder that qcc did not write"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")


def run(args: argparse.Namespace) -> int:
    """Package, say where, and serve it if asked."""
    from pathlib import Path

    from qcc.compiler.cli._site_server import open_server
    from qcc.compiler.steps import Steps
    from qcc.targets.spec import PackageOptions

    make = _packager(args.kind)
    steps = Steps()
    options = PackageOptions(
        Path(args.artifact), Path(args.output), args.name, args.force, steps.transient
    )
    # First: a port that is taken shall not be found out behind the work.
    server = None if args.serve is None else open_server(options.out, args.serve, PORT)
    with steps.step("package"):
        facts: dict[str, Any] = dict(make(options))
    if server is not None:
        facts["url"] = server.url
    if args.json:
        print(json.dumps(facts), flush=True)
    else:
        print(f"{facts['path']}: {facts['model_id']}, {facts['bytes'] / 1e6:,.1f} MB")
        needs = [*facts["required_features"], f"{facts['vram_required_MB']} MB of memory"]
        print(f"needs of a GPU: {', '.join(needs)}")
    if server is not None:
        if not args.json:
            print(f"serving {server.url} (end with Ctrl-C)", flush=True)
        server.serve()
    return 0


def _packager(kind: str) -> Any:
    """The function that makes packages of a kind; targets bring them.

    Raises:
        QccError: no target makes such.
    """
    from qcc.quant_schemes.errors import did_you_mean
    from qcc.runtime.errors import QccError
    from qcc.targets import find_target, list_targets

    known = {k: make for name in list_targets() for k, make in find_target(name).packages.items()}
    if kind not in known:
        raise QccError(
            f"unknown kind of package {kind!r}{did_you_mean(kind, known)}; there are: "
            f"{', '.join(sorted(known))}"
        )
    return known[kind]
