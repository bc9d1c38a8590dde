"""Does it fit: the budget of a model against the memory that is available. Bytes everywhere."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from qcc.runtime.engine.library import total_pages
from qcc.runtime.engine.metadata import Metadata
from qcc.runtime.errors import QccError

SINGLE = ("embed", "prefill", "decode", "encode")
BATCHED = ("batch_prefill", "batch_decode")  # run for two sequences and more only


@dataclass(frozen=True)
class Budget:
    """What a model needs, in bytes."""

    weights: int
    kv_cache: int
    temporaries: int
    states: int = 0  # of recurrent layers

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv_cache + self.temporaries + self.states

    def __str__(self) -> str:
        parts = {"weights": self.weights, "KV cache": self.kv_cache}
        if self.states:
            parts["states"] = self.states
        parts["temporaries"] = self.temporaries
        return " + ".join(f"{name} {size / 1e6:,.0f}" for name, size in parts.items()) + " MB"


def budget(meta: Metadata, max_batch_size: int, total_tokens: int) -> Budget:
    """The budget with a KV cache of `total_tokens`, from the library's own figures."""
    pages = total_pages(meta, max_batch_size, total_tokens)
    # Each function's temporaries are sized for the library's bounds, however few sequences run.
    names = SINGLE + BATCHED if max_batch_size > 1 else SINGLE
    used = [size for name, size in meta.memory_usage.items() if name in names]
    return Budget(
        meta.weight_bytes,
        pages * meta.page_size * meta.kv_token_bytes
        + meta.rope_table_bytes
        + meta.kv_workspace_bytes,
        max(used, default=0),
        max_batch_size * meta.state_bytes,
    )


def choose_total_tokens(
    meta: Metadata, length: int, max_batch_size: int, available: int | None
) -> int:
    """Tokens of the KV cache: `length` for each of the batch if that fits, else as many as fit.

    `available` bytes; None: no one knows, and everything is tried.

    Raises:
        QccError: not even one sequence of `length` tokens fits.
    """
    total = length * max_batch_size
    if available is None:
        return total
    over = budget(meta, max_batch_size, total).total - available
    if over <= 0:
        return total
    fits = total - -(-over // max(meta.kv_token_bytes, 1))
    fits = fits // meta.page_size * meta.page_size
    if fits >= length:
        return fits
    need = budget(meta, max_batch_size, length)
    text = (
        f"the model needs {need.total / 1e6:,.0f} MB ({need}), available are "
        f"{available / 1e6:,.0f} MB"
    )
    if meta.sliding_window_size < 0 and fits >= meta.page_size:
        raise QccError(f"{text}; lower --context-window from {length} to {fits} or less")
    raise QccError(
        f"{text}; close other programs or choose a scheme of fewer bits (qcc list schemes)"
    )


def check_embedding(meta: Metadata, available: int | None) -> None:
    """Refuse an embedding model that does not fit: it has no cache that could be smaller.

    Raises:
        QccError: says what it needs.
    """
    need = budget(meta, meta.max_batch_size, 0)
    if available is not None and need.total > available:
        raise QccError(
            f"the model needs {need.total / 1e6:,.0f} MB ({need}), available are "
            f"{available / 1e6:,.0f} MB; compile it with a smaller --context-window than "
            f"{meta.context_window_size} or a scheme of fewer bits (qcc list schemes)"
        )


def report(meta: Metadata) -> dict[str, Any]:
    """The full budget of a library as plain data, for `qcc show`."""
    tokens = max(meta.context_window_size, meta.sliding_window_size) * meta.max_batch_size
    full = budget(meta, meta.max_batch_size, tokens)
    return {
        "budget": {**asdict(full), "total": full.total},
        "kv_tokens": tokens,
        "kv_bytes_per_token": meta.kv_token_bytes,
        "kv_caches": {
            name: budget(meta.with_kv(name), meta.max_batch_size, tokens).kv_cache
            for name in meta.kv_names
        },
        "state_bytes_per_sequence": meta.state_bytes,
        "memory_usage": dict(meta.memory_usage),
    }
