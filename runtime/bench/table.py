"""The figures of a bench as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """All that `run.bench` found, and the precision that the model was loaded with."""
    yield (
        f"{found['artifact']}: {found['scheme']}, library {found['library']}, precision "
        f"{found['precision']}, KV cache {found['kv']}"
    )
    yield f"load {found['load_s']:.2f} s, peak memory {found['peak_rss_MB']:,} MB"
    yield ""
    yield from table([_row(item) for item in found["rows"]], left=("test",))
    yield ""
    for memory in found["memory"]:
        pages = f"{memory['huge_pages']:.0%} in huge pages"
        yield (
            f"memory reads {memory['read_GB_s']:.1f} GB/s with {memory['threads']} threads: the "
            f"best pass over 1 GiB, {pages}; load average {memory['load_average']}"
        )
    yield (
        f"tok/s: median of {found['repeats']} runs after a warm-up, of all sequences together; "
        "+-: half of the slowest to the fastest"
    )
    if "profile" in found:
        yield ""
        yield from profile_lines(found["profile"])


def profile_lines(profile: Mapping[str, Any]) -> Iterator[str]:
    """The kernels of one decode step."""
    yield (
        f"one decode step at depth {profile['depth']}, {profile['threads']} threads: "
        f"{profile['step_ms']:.3f} ms; {profile['launches']} kernel launches and "
        f"{profile['attention_calls']} calls of the KV cache take {profile['kernels_ms']:.3f} ms, "
        f"{profile['other_calls']} other calls {profile['other_ms']:.3f} ms (watched: each a "
        "microsecond or so longer)"
    )
    rows = [
        {
            "kernel": item["kernel"],
            "calls": str(item["calls"]),
            "ms": f"{item['ms']:.3f}",
            "of step": f"{item['share']:.1%}",
            "MB": f"{item['bytes'] / 1e6:.2f}" if item["bytes"] else "",
            "GB/s": "" if item["GB_s"] is None else f"{item['GB_s']:.1f}",
            "weights": ", ".join(item["weights"]),
        }
        for item in profile["kernels"]
    ]
    yield from table(rows, left=("kernel", "weights"))


def table(rows: Sequence[Mapping[str, str]], left: Sequence[str] = ()) -> Iterator[str]:
    """Rows of equal keys below each other, numbers to the right; columns without values go."""
    keys = [key for key in rows[0] if any(item[key] for item in rows)]
    width = {key: max(len(key), *(len(item[key]) for item in rows)) for key in keys}
    for item in ({key: key for key in keys}, *rows):
        cells = (f"{item[key]:{'<' if key in left else '>'}{width[key]}}" for key in keys)
        yield "  ".join(cells).rstrip()


def _row(item: Mapping[str, Any]) -> dict[str, str]:
    is_decode = item["kind"] == "decode"
    read = (item["weight_bytes"] + item["context_bytes"]) / 1e6 if is_decode else 0
    return {
        "test": f"{item['kind']} {item['tokens']}",
        "depth": str(item["depth"]),
        "batch": str(item["batch"]),
        "threads": str(item["threads"]),
        "tok/s": f"{item['tok_s']:.1f}",
        "+-": f"{item['spread']:.1%}",
        "GFLOP/s": "" if is_decode else f"{item['gflop_s']:.0f}",
        "MB a step": f"{read:.1f}" if is_decode else "",
        "GB/s": f"{item['read_GB_s']:.1f}" if is_decode else "",
        "of bandwidth": f"{item['share_of_bandwidth']:.0%}" if is_decode else "",
    }
