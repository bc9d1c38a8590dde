"""How fast this machine reads memory: all threads reduce 1 GiB of int64 with numpy's wide loads.

The memory lies in huge pages where the system gives them on request (Linux, madvise): with small
ones the same loop reads a fifth to a third less. `python -m qcc.runtime.bench.bandwidth 2` measures
two threads.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

TOTAL = 1 << 30  # bytes
PASSES = 12


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second with so many threads; of the `bytes_read`, those that lay in huge pages."""

    threads: int
    bytes_per_second: float
    huge_bytes: int
    bytes_read: int


def usable_cpus() -> tuple[int, ...]:
    """CPUs open to this thread; ask before TVM, which binds the thread that calls it."""
    affinity = getattr(os, "sched_getaffinity", None)
    return tuple(sorted(affinity(0))) if affinity else ()


def read_bandwidth(
    threads: int, cpus: Sequence[int] = (), passes: int = PASSES, total: int = TOTAL
) -> Bandwidth:
    """The best of `passes` over `total` bytes, an equal part for each thread.

    Thread i runs on `cpus[i]` (of `usable_cpus`), where there are so many.
    """
    before = _huge_bytes()
    # A bitwise or keeps up with memory in one thread; numpy's sum and max are slower on some CPUs.
    parts = [_part(total // threads) for _ in range(threads)]
    huge = _huge_bytes() - before
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        if len(cpus) >= threads:
            together = threading.Barrier(threads)
            list(pool.map(lambda cpu: _bind(cpu, together), cpus[:threads]))
        for _ in range(passes):
            start = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            best = min(best, time.perf_counter() - start)
    size = sum(part.nbytes for part in parts)
    return Bandwidth(threads, size / best, max(0, huge), size)


def measured_apart(threads: int, cpus: Sequence[int], total: int = TOTAL) -> Bandwidth:
    """`read_bandwidth` in a process of its own: its memory is not counted with that of a model."""
    words = [threads, total, *cpus]
    command = [sys.executable, "-m", __spec__.name, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Bandwidth(**json.loads(done.stdout))


def main(words: Sequence[str]) -> None:
    """Print one JSON object; words: threads, bytes, CPUs."""
    threads, total, *cpus = [*map(int, words), TOTAL][: max(2, len(words))]
    print(json.dumps(asdict(read_bandwidth(threads, cpus or usable_cpus(), total=total))))


def _part(size: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """int64[size // 8], written once, so that its pages are there."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    part = np.frombuffer(memory, np.int64)
    part[:] = 1
    return part


def _bind(cpu: int, together: threading.Barrier) -> None:
    """Keep the calling thread on one CPU; it waits, else it would do another's binding as well."""
    os.sched_setaffinity(0, [cpu])
    together.wait()


def _huge_bytes() -> int:
    """Anonymous memory of this process in huge pages; 0 where the system does not tell."""
    try:
        text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return 0
    found = re.search(r"^AnonHugePages:\s+(\d+) kB", text, flags=re.M)
    return 1024 * int(found[1]) if found else 0


if __name__ == "__main__":
    main(sys.argv[1:])
