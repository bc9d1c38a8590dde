"""What is measured: prompts and answers of some lengths, at some depths, alone and together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qcc.runtime.engine.model import Limits
from qcc.runtime.errors import QccError


@dataclass(frozen=True)
class Case:
    """One row: `tokens` after `depth` others, of each of `batch` sequences.

    `kind` is "prefill" (the tokens at once) or "decode" (one after the other).
    """

    kind: str
    tokens: int
    depth: int
    batch: int = 1

    @property
    def length(self) -> int:
        """Tokens of a sequence at its end."""
        return self.depth + self.tokens

    def __str__(self) -> str:
        return f"{self.kind} {self.tokens}"


@dataclass(frozen=True)
class Grid:
    """Values of the flags; a 0 among the lengths stands for no such row."""

    prompts: Sequence[int] = (128, 512)
    answers: Sequence[int] = (32,)
    depths: Sequence[int] = (0,)
    batches: Sequence[int] = (1,)

    def cases(self) -> list[Case]:
        """All rows, the depths outermost, so that contexts only grow."""
        found = []
        for depth in sorted(set(self.depths)):
            found += [Case("prefill", n, depth) for n in self.prompts if n]
            found += [Case("decode", n, depth, b) for n in self.answers if n for b in self.batches]
        return found


def check_cases(cases: Sequence[Case], limits: Limits) -> None:
    """Refuse what the library, or the memory that is free, cannot hold.

    Raises:
        QccError: no row at all, a sequence beyond the context, too many of them.
    """
    if not cases:
        raise QccError("nothing to measure: give a prompt length (-p) or an answer length (-n)")
    for case in cases:
        where = f"{case} at depth {case.depth}"
        if limits.max_length is not None and case.length > limits.max_length:
            raise QccError(
                f"{where} needs {case.length} tokens, the context window has {limits.max_length}; "
                "take less (-p, -n, -d), or a larger --context-window (here, and of qcc compile)"
            )
        if case.batch > limits.max_batch_size:
            raise QccError(
                f"-b {case.batch}: the library was compiled for 1 to {limits.max_batch_size} "
                "sequences; qcc compile --max-batch makes one for more"
            )
    # Sequences that a larger batch needed stay in the cache, at the depth that they have.
    most = max(case.batch for case in cases)
    pages = most * limits.pages_of(max(case.length for case in cases))
    if pages > limits.pages:
        raise QccError(
            f"{most} sequences of this depth need {pages} pages of KV cache, memory allows "
            f"{limits.pages}; take less (-b, -d)"
        )
