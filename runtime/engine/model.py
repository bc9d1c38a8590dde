"""A model ready to run: library, slots and KV cache. Token ids in, logits out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qcc.runtime.artifact import Artifact
from qcc.runtime.engine.device import library_name, open_device
from qcc.runtime.engine.library import Floats, KVCache, Library, Tokens, total_pages
from qcc.runtime.engine.memory import choose_total_tokens
from qcc.runtime.engine.settings import choose_precision, default_kv, settings
from qcc.runtime.engine.weight_memory import Progress, check_weights
from qcc.runtime.engine.weights import load_slots, with_settings
from qcc.runtime.errors import QccError
from qcc.runtime.machine import enable_tiles


@dataclass(frozen=True)
class Limits:
    """Bounds of a run. In tokens, but for max_batch_size (sequences) and pages.

    `max_length` bounds prompt and answer together; None: a sliding window, no bound, and then
    `window` is the number of tokens that a sequence keeps. Where layers keep states, which cannot
    forget tokens, `forgets` is False.
    """

    vocab_size: int
    prefill_chunk_size: int
    max_batch_size: int
    max_length: int | None
    window: int | None
    page_size: int
    pages: int
    forgets: bool = True  # a sequence's last tokens can be forgotten

    def pages_of(self, length: int | None) -> int:
        """Pages that a sequence of `length` tokens (None: unbounded) may come to hold."""
        if self.window is not None:
            # Two more: the window begins and ends within a page.
            kept = self.window if length is None else min(length, self.window)
            return -(-kept // self.page_size) + 2
        assert length is not None, "without a sliding window every sequence has a bound"
        return -(-length // self.page_size)


class Model(Protocol):
    """What the scheduler runs; the tests have one in NumPy.

    Every run must stay within `limits`; the scheduler sees to it.
    """

    limits: Limits

    def add_sequence(self, seq: int) -> None:
        """Begin an empty sequence."""

    def remove_sequence(self, seq: int) -> None:
        """Forget a sequence."""

    def pop(self, seq: int, count: int) -> None:
        """Forget the last `count` tokens of a sequence that never slid, where `limits.forgets`."""

    def prefill(self, seqs: Sequence[int], tokens: Sequence[Tokens]) -> Floats:
        """Append int32[n_i] to each sequence -> logits f32[b, V] after the last of each."""
        ...

    def decode(self, seqs: Sequence[int], tokens: Tokens) -> Floats:
        """Append one token, int32[b], to each sequence -> logits f32[b, V]."""
        ...

    def verify(self, seq: int, tokens: Tokens) -> Floats:
        """Append int32[n] -> logits f32[n, V] of every position."""
        ...


class CompiledModel:
    """The Model of an artifact's library."""

    def __init__(
        self,
        artifact: Artifact,
        device: str,
        context_window: int | None = None,
        max_batch_size: int | None = None,
        progress: Progress | None = None,
        precision: str | None = None,
        kv: str | None = None,
        weights: str | None = None,
    ) -> None:
        """Load library and weights and reserve the KV cache, which keeps its numbers as `kv` says.

        Raises:
            QccError: a device without a library, sizes beyond the library's, not enough memory.
        """
        machine = open_device(device)
        path = artifact.library(library_name(device))
        machine.check_library(artifact, path)
        library = Library(path, machine)
        precision = self.precision = choose_precision(precision, library.metadata.precision)
        library.choose_kv(kv, default_kv(precision), precision != "high" and enable_tiles())
        meta = library.metadata
        batch = _at_most(max_batch_size, meta.max_batch_size, "max_batch_size")
        length = _length(meta.max_length, context_window, meta.sliding_window_size)
        # Before the weights are touched: what does not fit shall fail at once.
        total = choose_total_tokens(meta, length, batch, machine.memory)
        where = check_weights(weights)
        self.slots = load_slots(artifact, library, progress, settings(precision), where)
        library.bind(self.slots)
        slides = meta.max_length is None
        chunk = min(meta.prefill_chunk_size, length)
        self.library = library
        # Its temporary arrays hold a token of each sequence as well.
        self._sizes = batch, total, max(meta.prefill_chunk_size, batch)
        self.cache = KVCache(library, *self._sizes)
        self.limits = Limits(
            vocab_size=meta.vocab_size,
            prefill_chunk_size=chunk,
            max_batch_size=batch,
            max_length=None if slides else length,
            window=length if slides else None,
            page_size=meta.page_size,
            pages=total_pages(meta, batch, total),
            forgets=not meta.states,
        )

    def switch(self, precision: str | None, kv: str | None = None, tiles: bool = True) -> None:
        """Compute otherwise from now on, with an empty KV cache; the weights are not loaded again.

        `precision` and `kv` as at load. Without `tiles` low precision keeps from tile registers, as
        on a processor that has none: many rows are multiplied as int8 too.

        Raises:
            QccError: as at load.
        """
        precision = self.precision = choose_precision(precision, self.library.metadata.precision)
        found = settings(precision, tiles)
        tiled = tiles and precision != "high" and enable_tiles()
        self.library.choose_kv(kv, default_kv(precision), tiled)
        self.slots = with_settings(self.slots, self.library, found)
        self.library.bind(self.slots)
        del self.cache  # before the next one takes its memory
        self.cache = KVCache(self.library, *self._sizes)

    def add_sequence(self, seq: int) -> None:
        """Begin an empty sequence."""
        self.cache.add(seq)

    def remove_sequence(self, seq: int) -> None:
        """Forget a sequence."""
        self.cache.remove(seq)

    def pop(self, seq: int, count: int) -> None:
        """See Model."""
        self.cache.pop(seq, count)

    def prefill(self, seqs: Sequence[int], tokens: Sequence[Tokens]) -> Floats:
        """See Model."""
        lengths = [len(part) for part in tokens]
        with self._run("prefill", seqs, lengths):
            if len(seqs) == 1:
                return self.library.prefill(tokens[0], self.cache)
            last = (np.cumsum(lengths) - 1).astype(np.int32)
            return self.library.batch_prefill(np.concatenate(tokens), last, self.cache)

    def decode(self, seqs: Sequence[int], tokens: Tokens) -> Floats:
        """See Model."""
        with self._run("decode", seqs, [1] * len(seqs)):
            return self.library.decode(tokens, self.cache)

    def verify(self, seq: int, tokens: Tokens) -> Floats:
        """See Model."""
        with self._run("verify", [seq], [len(tokens)]):
            return self.library.verify(tokens, self.cache)

    @contextmanager
    def _run(self, name: str, seqs: Sequence[int], lengths: Sequence[int]) -> Iterator[None]:
        """A run of the library that appends to the cache; what a GPU refuses is a QccError."""
        with self.library.device.errors(name):
            self.cache.begin(seqs, lengths)
            yield
            self.cache.end()


def _at_most(wanted: int | None, limit: int, name: str) -> int:
    if wanted is None:
        return limit
    if not 1 <= wanted <= limit:
        raise QccError(f"{name} {wanted}: the library was compiled for 1 to {limit}")
    return wanted


def _length(max_length: int | None, wanted: int | None, window: int) -> int:
    """Tokens of one sequence in the cache."""
    if max_length is None:
        if wanted is not None:
            raise QccError(
                f"--context-window {wanted}: this model has a sliding window of {window} tokens "
                "and no bound on the context; leave the flag out"
            )
        return window
    if wanted is not None and not 1 <= wanted <= max_length:
        raise QccError(
            f"--context-window {wanted}: the library was compiled for 1 to {max_length} tokens; "
            "qcc compile --context-window makes one for more"
        )
    return wanted or max_length
