"""Load, prefill and decode of an artifact, and of a peer in the same run.

    python -m qcc.runtime.bench.speed ARTIFACT --peer CHECKPOINT

Prompts are random token ids (seed 0). Each figure is the median of several runs after a warm-up;
with a peer the two take turns, and the ratio is of the medians. Decode is also given as a share
of the memory bandwidth measured in the same run (weights and KV cache read for each token). The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from typing import Any

import numpy as np

from qcc.runtime import LLM, SamplingParams
from qcc.runtime.artifact import running_versions
from qcc.runtime.bench.bandwidth import read_bandwidth


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact")
    parser.add_argument("--prompt", type=int, nargs="+", default=[16, 128, 512], help="tokens")
    parser.add_argument("--generate", type=int, default=32, help="tokens decoded after a prompt")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer", metavar="CHECKPOINT", help="run it in transformers as well")
    args = parser.parse_args()

    begun = time.perf_counter()
    llm = LLM(args.artifact, threads=args.threads, max_batch_size=1)
    load = time.perf_counter() - begun
    peer = None
    if args.peer:
        from qcc.runtime.bench.peer_transformers import TransformersPeer

        peer = TransformersPeer(args.peer, args.threads)
    bandwidth = read_bandwidth(args.threads)
    meta = llm.model.library.metadata
    found: dict[str, Any] = {
        "artifact": llm.artifact.folder.name,
        "scheme": llm.artifact.manifest.scheme,
        **running_versions(),
        "threads": args.threads,
        "load_s": round(load, 2),
        "read_GB_s": round(bandwidth / 1e9, 1),
        "peer": peer.name if peer else None,
        "runs": [],
    }
    print(f"load {load:.2f} s; memory reads {bandwidth / 1e9:.1f} GB/s with {args.threads} threads")
    for length in args.prompt:
        prompt = np.random.default_rng(0).integers(3, meta.vocab_size, length).tolist()
        ours, theirs = [], []
        for _ in range(args.repeats + 1):
            ours.append(measure(llm, prompt, args.generate))
            if peer:
                theirs.append(peer.measure(prompt, args.generate))
        row = summarize(length, ours[1:], theirs[1:])
        read = meta.weight_bytes + (length + args.generate // 2) * meta.kv_token_bytes
        row["decode_GB_s"] = round(row["decode_tok_s"] * read / 1e9, 1)
        row["share_of_bandwidth"] = round(row["decode_tok_s"] * read / bandwidth, 2)
        found["runs"].append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    found["peak_rss_MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000
    print(json.dumps(found))
    sys.stdout.flush()


def measure(llm: LLM, prompt: list[int], generate: int) -> tuple[float, float]:
    """(prefill tok/s, decode tok/s) of one greedy run."""
    params = SamplingParams(temperature=0, max_tokens=generate + 1, ignore_eos=True)
    (result,) = llm.generate([prompt], params)
    return result.prefill_tokens_per_second, result.decode_tokens_per_second


def summarize(
    length: int, ours: list[tuple[float, float]], theirs: list[tuple[float, float]]
) -> dict[str, Any]:
    """Medians, and the ratio to the peer's."""
    row: dict[str, Any] = {"prompt": length}
    for i, name in enumerate(("prefill", "decode")):
        mine = statistics.median(run[i] for run in ours)
        row[f"{name}_tok_s"] = round(mine, 1)
        if theirs:
            peer = statistics.median(run[i] for run in theirs)
            row[f"{name}_peer_tok_s"] = round(peer, 1)
            row[f"{name}_ratio"] = round(mine / peer, 2)
    return row


if __name__ == "__main__":
    main()
