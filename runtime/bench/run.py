"""A whole bench of a loaded model: rows for every case and number of threads, and a profile."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qcc.runtime.artifact import running_versions
from qcc.runtime.bench.bandwidth import TOTAL, Bandwidth, measured_apart
from qcc.runtime.bench.cases import Case, Grid, check_cases
from qcc.runtime.bench.measure import Contexts, Timing, measure
from qcc.runtime.bench.report import Sizes, profile, row
from qcc.runtime.bench.step import Watch
from qcc.runtime.engine.llm import LLM
from qcc.runtime.engine.tvm_runtime import set_threads

Progress = Callable[[str, int, int], None]  # what, runs done, runs in all
PROFILED = 8  # tokens that the time of a profile's step is taken from


@dataclass(frozen=True)
class Plan:
    """What to measure; `cpus` are those of `usable_cpus`, asked before the model was loaded."""

    grid: Grid
    threads: Sequence[int]
    repeats: int
    with_profile: bool = False
    cpus: Sequence[int] = ()
    read_bytes: int = TOTAL  # memory that the bandwidth is measured on


def bench(llm: LLM, plan: Plan, progress: Progress | None = None) -> dict[str, Any]:
    """Figures of all rows as one JSON object.

    Numbers of threads run from the most to the fewest: TVM's pool can shrink, not grow.

    Raises:
        QccError: the model cannot hold a case.
    """
    cases = plan.grid.cases()
    check_cases(cases, llm.limits)
    counts = sorted(set(plan.threads), reverse=True)
    bench = _Bench(llm, plan, progress, (plan.repeats + 1) * len(cases) * len(counts))
    parts = [bench.with_threads(count, cases) for count in counts]
    bench.contexts.close()
    found: dict[str, Any] = {
        "artifact": str(llm.artifact.folder),
        "scheme": llm.artifact.manifest.scheme,
        "library": llm.model.library.path.stem,
        "kv": llm.model.library.metadata.kv,
        **running_versions(),
        "load_s": round(llm.load_seconds, 3),
        "repeats": plan.repeats,
        "memory": [part["memory"] for part in parts],
        "rows": [item for part in parts for item in part["rows"]],
    }
    if plan.with_profile:
        found["profile"] = parts[0]["profile"]
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    found["peak_rss_MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 10**6
    return found


class _Bench:
    """What the parts of a bench share."""

    def __init__(self, llm: LLM, plan: Plan, progress: Progress | None, total: int) -> None:
        self.llm, self.plan, self.progress, self.total = llm, plan, progress, total
        self.done = 0
        self.contexts = Contexts(llm.model)
        self.watch = Watch(llm.artifact, llm.model)
        self.sizes = Sizes(llm.artifact, llm.model.library.metadata)
        batches = {case.batch for case in plan.grid.cases()}
        self.steps = {batch: self.watch.step(self.contexts, batch, 1) for batch in batches}
        self.grows = True  # from depth to depth

    def with_threads(self, count: int, cases: Sequence[Case]) -> dict[str, Any]:
        """Rows, bandwidth and, where it is wanted, the profile with so many threads."""
        threads = set_threads(count)
        before = measured_apart(threads, self.plan.cpus, self.plan.read_bytes)
        shown = self._profile(cases[0].depth) if self.plan.with_profile and self.grows else None
        # There and back again: contexts that are long by now need not be filled anew.
        timings = {case: self._time(case) for case in (cases if self.grows else cases[::-1])}
        self.grows = not self.grows
        after = measured_apart(threads, self.plan.cpus, self.plan.read_bytes)
        # Another program can only make it less.
        memory = max(before, after, key=lambda item: item.bytes_per_second)
        rows = [
            row(timings[case], threads, self.steps[case.batch], self.sizes, memory.bytes_per_second)
            for case in cases
        ]
        return {
            "memory": _memory(memory),
            "rows": rows,
            "profile": shown and {"threads": threads, **shown},
        }

    def _time(self, case: Case) -> Timing:
        def ran() -> None:
            self.done += 1
            if self.progress:
                self.progress(f"{case}, depth {case.depth}", self.done, self.total)

        return measure(self.contexts, case, self.plan.repeats, ran)

    def _profile(self, depth: int) -> dict[str, Any]:
        tokens = min(PROFILED, max(1, (self.llm.limits.max_length or 1 << 30) - depth))
        usual = measure(self.contexts, Case("decode", tokens, depth), self.plan.repeats)
        step = self.watch.step(self.contexts, 1, depth, self.plan.repeats)
        return profile(step, usual.step_seconds, depth, self.sizes)


def _memory(read: Bandwidth) -> dict[str, Any]:
    return {
        "threads": read.threads,
        "read_GB_s": round(read.bytes_per_second / 1e9, 2),
        "huge_pages": round(read.huge_bytes / max(1, read.bytes_read), 2),
        "load_average": round(os.getloadavg()[0], 2),
    }
