"""qcc bench: how fast a compiled model runs here, beside what the machine's memory allows."""

from __future__ import annotations

import argparse
import json

from qcc.compiler.cli._running import add_device_arguments, load, shown_progress
from qcc.runtime.errors import QccError

HELP = "measure prefill and decode: tok/s, GB/s and their share of the memory bandwidth"
EXAMPLE = """
qcc bench ./llama-q4
qcc bench ./llama-q4 -p 128,512 -n 32 -d 16,1024 -b 1,8 -t 1,2 --json
qcc bench ./llama-q4 -p 0 -n 32 -d 1024 --profile
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench`."""
    parser.add_argument(
        "model", metavar="ARTIFACT|MODEL", help="artifact, or a checkpoint (compiled on first use)"
    )
    rows = parser.add_argument_group("rows (each a number, or several with commas; tokens)")
    for flags, default, text in (
        (("-p", "--prompt"), "128,512", "lengths of prompts; 0: none"),
        (("-n", "--generate"), "32", "lengths of answers; 0: none"),
        (("-d", "--depth"), "0", "tokens that are in the context already"),
        (("-b", "--batch"), "1", "sequences that decode together"),
    ):
        rows.add_argument(*flags, type=numbers, default=default, metavar="N,...", help=text)
    rows.add_argument(
        *("-t", "--threads"),
        type=numbers,
        default=None,
        metavar="N,...",
        help="CPU threads (default: the cores)",
    )
    rows.add_argument(
        *("-r", "--repeats"), type=int, default=5, metavar="N", help="runs of a row; their median"
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="also show which kernels a decode step runs, their time and GB/s, at the least depth "
        "with the most threads",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object, on the last line")
    add_device_arguments(parser)


def numbers(text: str) -> tuple[int, ...]:
    """`1,2,3` as whole numbers.

    Raises:
        argparse.ArgumentTypeError: it is something else.
    """
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError as err:
        raise argparse.ArgumentTypeError(f"{text!r}: give whole numbers, as 128,512") from err
    if min(found) < 0:
        raise argparse.ArgumentTypeError(f"{text!r}: no number may be negative")
    return found


def run(args: argparse.Namespace) -> int:
    """Measure, and print tables or one JSON object."""
    for flag, values in (("-b", args.batch), ("-t", args.threads or (1,)), ("-r", (args.repeats,))):
        if min(values) < 1:
            raise QccError(f"{flag} {min(values)}: must be 1 or more")

    from qcc.runtime.bench.bandwidth import usable_cpus
    from qcc.runtime.bench.cases import Grid
    from qcc.runtime.bench.run import Plan, bench
    from qcc.runtime.bench.table import lines

    cpus = usable_cpus()
    most = max(args.threads) if args.threads else None
    llm = load(argparse.Namespace(**{**vars(args), "threads": most}), max(args.batch))
    grid = Grid(args.prompt, args.generate, args.depth, args.batch)
    threads = args.threads or (llm.threads,)
    plan = Plan(grid, threads, args.repeats, args.profile, cpus)
    found = {**bench(llm, plan, shown_progress()), "precision": llm.model.precision}
    print(json.dumps(found) if args.json else "\n".join(lines(found)))
    return 0
