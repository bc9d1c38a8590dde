"""How fast this machine reads memory: all threads sum 1 GiB of int64 with numpy's wide loads."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

TOTAL = 1 << 30  # bytes


def read_bandwidth(threads: int, repeats: int = 5) -> float:
    """Bytes a second, the best of `repeats` passes; pages are touched first."""
    parts = [np.ones(TOTAL // 8 // threads, np.int64) for _ in range(threads)]
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            start = time.perf_counter()
            list(pool.map(np.sum, parts))
            best = min(best, time.perf_counter() - start)
    return sum(part.nbytes for part in parts) / best
