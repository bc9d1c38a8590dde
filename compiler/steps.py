"""What a compile tells while it works: one line a step, with its time and what it made."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


class Step:
    """One step under way; `note` is printed behind its time."""

    def __init__(self, name: str) -> None:
        """Start the clock."""
        self.name = name
        self.note = ""
        self.started = time.perf_counter()


class Steps:
    """Prints steps to a stream (None: standard error), a progress line only on a terminal."""

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        """Remember where to print; `quiet`: nowhere."""
        self.stream = None if quiet else stream or sys.stderr
        self.times: dict[str, float] = {}
        self._begun: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """Time a step and print its line when it is done."""
        step = Step(name)
        self.transient(f"{name} ...")
        yield step
        seconds = time.perf_counter() - step.started
        self.times[name] = seconds
        self.line(f"  {name:<28}{seconds:7.1f} s  {step.note}".rstrip())

    def progress(self, name: str, done: int, total: int, _what: str = "") -> None:
        """Show how far a long step is; `done` and `total` in bytes."""
        if total:
            size = f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB"
            self.transient(f"{name} {done / total:4.0%}  {size}")

    def count(self, name: str, done: int, total: int, unit: str) -> None:
        """Show how far a long step is, and the time that it will still take at this speed."""
        begun = self._begun.setdefault(name, time.perf_counter())
        if done >= total:
            del self._begun[name]
        spent = time.perf_counter() - begun
        left = f", {duration(spent / done * (total - done))} left" if done else ""
        self.transient(f"{name} {done / max(total, 1):4.0%}  {done:,} of {total:,} {unit}{left}")

    def transient(self, text: str) -> None:
        """Show a text until the next one, on a terminal only."""
        if self.stream is not None and self.stream.isatty():
            self.stream.write(f"\r\x1b[K  {text}")
            self.stream.flush()

    def line(self, text: str) -> None:
        """Print a line of its own."""
        if self.stream is not None:
            lead = "\r\x1b[K" if self.stream.isatty() else ""
            self.stream.write(f"{lead}{text}\n")
            self.stream.flush()


def duration(seconds: float) -> str:
    """40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
