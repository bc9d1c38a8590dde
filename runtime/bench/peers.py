"""qcc beside other engines, on the same checkpoint, turn by turn in one run.

    python -m qcc.runtime.bench.peers CHECKPOINT --qcc ARTIFACT --python VENV/bin/python \\
        --peer llama_cpp:Q4_0 --peer openvino:int4 --peer mnn:int4@OTHER/bin/python --files FOLDER

Every engine is a process of its own that stays alive; one run of one case at a time, each engine in
its turn, so that what disturbs the machine disturbs them alike. Prompts are random token ids,
answers greedy. A row is the median of several runs after a warm-up. Peers live in an environment of
their own; what is missing there is skipped, with how to get it. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qcc.runtime.bench.bandwidth import measured_apart, usable_cpus
from qcc.runtime.bench.peer_process import INSTALL, Case, Engine
from qcc.runtime.bench.table import table
from qcc.runtime.errors import QccError


def engines(args: argparse.Namespace) -> list[Engine]:
    """Those of the flags; qcc's come first.

    Raises:
        QccError: a peer that is unknown, or without its kind.
    """
    found = [
        Engine(f"qcc:{Path(path).name}", "qcc", str(Path(path).resolve()), sys.executable)
        for path in args.qcc
    ]
    for text in args.peer:
        label, _, python = text.partition("@")
        module, _, kind = label.partition(":")
        if module not in INSTALL or not kind:
            known = ", ".join(INSTALL)
            raise QccError(f"--peer {text}: give NAME:KIND[@PYTHON], NAME one of {known}")
        found.append(Engine(label, module, kind, python or args.python))
    return found


def measure(ready: list[Engine], cases: Sequence[Case], repeats: int) -> dict[str, str]:
    """Fill `seconds` of every engine, the engines taking turns within each case.

    An engine that ends on the way is taken out of `ready`; returns label -> why.
    """
    failed: dict[str, str] = {}
    for case in cases:
        for _ in range(repeats + 1):
            for engine in list(ready):
                try:
                    engine.run(case)
                except QccError as err:
                    failed[engine.label] = f"{case_name(case)}: {err}"
                    ready.remove(engine)
        print(f"{case_name(case)}: done", file=sys.stderr)
    return failed


def summary(ready: Sequence[Engine], cases: Sequence[Case]) -> dict[str, Any]:
    """tok/s of every engine and case, their spreads, and the ratios of qcc's to each peer's."""
    ours = [engine for engine in ready if engine.module == "qcc"]
    peers = [engine for engine in ready if engine.module != "qcc"]
    return {
        "names": {e.label: e.name for e in ready},
        "tok_s": {e.label: {case_name(c): round(e.rate(c), 2) for c in cases} for e in ready},
        "spread": {e.label: {case_name(c): round(e.spread(c), 3) for c in cases} for e in ready},
        "ratios": [
            {"qcc": mine.label, "peer": peer.label}
            | {case_name(c): round(mine.rate(c) / peer.rate(c), 3) for c in cases}
            for mine in ours
            for peer in peers
        ],
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The figures as two tables: tok/s, and ratios above 1 where qcc is faster."""
    rows = [
        {"tok/s": label, **{head: f"{rate:.1f}" for head, rate in rates.items()}}
        for label, rates in found["tok_s"].items()
    ]
    ratios = [
        {"ratio": f"{item['qcc']} / {item['peer']}"}
        | {head: f"{x:.2f}" for head, x in item.items() if head not in ("qcc", "peer")}
        for item in found["ratios"]
    ]
    shown = [*table(rows, left=("tok/s",)), "", *(table(ratios, left=("ratio",)) if ratios else ())]
    return [*shown, *(f"{label}: {name}" for label, name in found["names"].items())]


def case_name(case: Case) -> str:
    """`prefill 512`, `decode at 16`."""
    kind, tokens, depth = case
    return f"{kind} {tokens}" if kind == "prefill" else f"{kind} at {depth}"


def main(argv: Sequence[str] | None = None) -> int:
    """Start what can be started, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="that all are made of, as random_checkpoint makes it")
    parser.add_argument(
        "--qcc", action="append", default=[], metavar="ARTIFACT", help="compiled of it; repeatable"
    )
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME:KIND[@PYTHON]",
        help=f"an engine and its format; NAME is one of {', '.join(INSTALL)}; repeatable",
    )
    parser.add_argument("--python", default=sys.executable, help="interpreter of the peers")
    parser.add_argument("--files", default="peer-files", help="where peers keep what they convert")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt", type=int, nargs="+", default=[128, 512], help="prefill, tokens")
    parser.add_argument("--depth", type=int, nargs="+", default=[16, 1024], help="of the decodes")
    parser.add_argument("--generate", type=int, default=32, help="tokens of a decode")
    args = parser.parse_args(argv)
    cases: list[Case] = [("prefill", n, 0) for n in args.prompt]
    cases += [("decode", args.generate, depth) for depth in args.depth]
    cpus = usable_cpus()
    ready: list[Engine] = []
    skipped: dict[str, str] = {}
    chosen: list[Engine] = []
    try:
        if min(args.repeats, args.threads, args.generate, *args.prompt) < 1:
            raise QccError("--repeats, --threads, --generate and --prompt must be 1 or more")
        chosen += engines(args)
        for engine in chosen:
            print(f"{engine.label}: loads", file=sys.stderr)
            checkpoint, files = (str(Path(p).resolve()) for p in (args.checkpoint, args.files))
            reason = engine.start(checkpoint, files, args.threads)
            if reason:
                skipped[engine.label] = reason
            else:
                ready.append(engine)
        if not chosen:
            raise QccError("nothing to measure: give --qcc ARTIFACT or --peer NAME:KIND")
        before = measured_apart(args.threads, cpus)
        skipped |= measure(ready, cases, args.repeats)
        if not ready:
            reasons = "; ".join(f"{label}: {reason}" for label, reason in skipped.items())
            raise QccError(f"no engine is left: {reasons}")
        after = measured_apart(args.threads, cpus)
    except QccError as err:
        parser.exit(2, f"peers: error: {err}\n")
    finally:
        for engine in chosen:
            engine.stop()
    found = summary(ready, cases)
    read = max(before.bytes_per_second, after.bytes_per_second) / 1e9
    print("\n".join(lines(found)))
    print(f"memory reads {read:.1f} GB/s with {args.threads} threads")
    facts = {"checkpoint": args.checkpoint, "threads": args.threads, "repeats": args.repeats}
    facts |= {"generate": args.generate, "read_GB_s": round(read, 2), "skipped": skipped}
    for label, reason in skipped.items():
        print(f"{label}: skipped: {reason}")
    print(json.dumps({**facts, **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
