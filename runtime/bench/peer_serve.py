"""Serves one peer to peers.py: a JSON object a line, in by standard input, out by standard output.

    python peer_serve.py MODULE CHECKPOINT KIND FOLDER THREADS

Run by path in the environment of the peer, so it imports nothing of qcc. MODULE is a file beside
this one that defines

    class Peer:
        name: str  # with its version, for the table
        def __init__(self, checkpoint: str, kind: str, folder: str, threads: int) -> None: ...
        def run(self, case: str, tokens: int, depth: int) -> float: ...

`kind` is its format of weights; what the peer makes of the checkpoint it keeps in `folder`. `run`
returns the seconds of `case` "prefill" (`tokens` at once, up to the logits of the last) or "decode"
(`tokens` one by one, greedy) after `depth` tokens that are in the context already.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main(words: list[str]) -> None:
    """Load the peer, say so, then answer requests until the input ends."""
    # Libraries print as they like; what they print goes to standard error.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(**fields: Any) -> None:
        out.write(json.dumps(fields) + "\n")
        out.flush()

    module, checkpoint, kind, folder, threads = words
    begun = time.perf_counter()
    try:
        peer = load(module).Peer(checkpoint, kind, folder, int(threads))
    except ImportError as err:
        say(missing=str(err))
        return
    say(name=peer.name, load_s=round(time.perf_counter() - begun, 2))
    for line in sys.stdin:
        say(seconds=peer.run(**json.loads(line)))


def load(module: str) -> Any:
    """A module from its file in this folder, which is on no search path: its names are common."""
    here = Path(__file__).parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here.resolve()]
    spec = importlib.util.spec_from_file_location(module, here / f"{module}.py")
    assert spec is not None and spec.loader is not None, module
    found = importlib.util.module_from_spec(spec)
    sys.modules[module] = found  # dataclasses look there
    spec.loader.exec_module(found)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
