"""The protocol: how a text becomes windows of tokens. Fixed, so that figures can be compared.

The text is split at end-of-text marks; a document loses the white space at both ends, and an empty
one is dropped. Each is tokenized without BOS and cut, without overlap, into windows of BOS and
context - 1 tokens (context tokens where the model has no BOS). Windows of MIN_WINDOW tokens or
fewer, BOS counted, are dropped.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qcc.runtime.errors import QccError
from qcc.runtime.files import os_errors

MARKS = ("<|endoftext|>", "</s>")
MIN_WINDOW = 8
MAX_CONTEXT = 2048  # tokens, where nothing is asked for


@dataclass(frozen=True)
class Text:
    """A text to evaluate on: its file's name, the sha256 of its bytes, its content."""

    name: str
    sha256: str
    content: str


@dataclass(frozen=True)
class Windows:
    """The windows of a text, and what was done to get them; counts in tokens unless named."""

    ids: tuple[tuple[int, ...], ...]
    context: int
    bos: int | None
    marks: tuple[str, ...]
    documents: int
    dropped: int  # windows that were too short
    max_tokens: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens of all windows, BOS included."""
        return sum(map(len, self.ids))

    @property
    def positions(self) -> int:
        """Positions whose next token is known: all but the last of each window."""
        return self.tokens - len(self.ids)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the ids, as JSON."""
        found = {key: value for key, value in asdict(self).items() if key != "ids"}
        return {
            **found,
            "marks": list(self.marks),
            "windows": len(self.ids),
            "tokens": self.tokens,
            "positions": self.positions,
            "min_window": MIN_WINDOW,
        }

    def describe(self) -> list[str]:
        """The protocol in words."""
        made = f"BOS (id {self.bos}) and {self.context - 1:,} tokens"
        if self.bos is None:
            made = f"{self.context:,} tokens (the model has no BOS)"
        cut = f", the first {self.max_tokens:,} tokens" if self.max_tokens else ""
        return [
            f"text split at {', '.join(self.marks)}, each document stripped of white space at both "
            f"ends, empty ones dropped: {self.documents:,} documents{cut}",
            f"windows of {made} without overlap, those of {MIN_WINDOW} tokens or fewer (BOS "
            f"counted) dropped: {len(self.ids):,} windows of {self.tokens:,} tokens, "
            f"{self.dropped:,} dropped",
            f"all positions but the last of each window: {self.positions:,}; "
            "KL(reference || ours) in nats; perplexity = exp of the mean negative log likelihood "
            "of the next token; se = standard deviation over positions / sqrt(positions)",
        ]


def read_text(path: Path | str) -> Text:
    """A UTF-8 text file.

    Raises:
        QccError: it cannot be read, or is something else.
    """
    path = Path(path)
    with os_errors(path, "read"):
        raw = path.read_bytes()
    try:
        content = raw.decode("utf-8")
    except UnicodeDecodeError as err:
        raise QccError(
            f"{path}: not UTF-8 text: {err.reason} at byte {err.start}; convert it to UTF-8"
        ) from err
    return Text(path.name, hashlib.sha256(raw).hexdigest(), content)


def cut_windows(
    text: Text,
    encode: Callable[[str], Sequence[int]],
    bos: int | None,
    context: int,
    end_mark: str | None = None,
    max_tokens: int | None = None,
) -> Windows:
    """The windows of a text.

    Args:
        text: what was read.
        encode: a document -> its token ids, without BOS.
        bos: id that begins each window; None: none does.
        context: tokens of a window, BOS counted.
        end_mark: the text of the tokenizer's own end-of-text token, split at as well.
        max_tokens: stop after as many; the last window is cut.

    Raises:
        QccError: a context too small, or no window is left.
    """
    if context <= MIN_WINDOW:
        raise QccError(f"--context {context}: must be more than {MIN_WINDOW} tokens")
    if max_tokens is not None and max_tokens <= MIN_WINDOW:
        raise QccError(f"--max-tokens {max_tokens}: must be more than {MIN_WINDOW}")
    marks = (*MARKS, *([end_mark] if end_mark and end_mark not in MARKS else []))
    pattern = "|".join(map(re.escape, marks))
    documents = [part.strip() for part in re.split(pattern, text.content)]
    documents = [part for part in documents if part]
    lead = () if bos is None else (bos,)
    found: list[tuple[int, ...]] = []
    step, dropped, room = context - len(lead), 0, max_tokens
    for document in documents:
        if room is not None and room <= MIN_WINDOW:
            break
        ids = tuple(encode(document))
        for start in range(0, len(ids), step):
            window = (*lead, *ids[start : start + step])[:room]
            if len(window) <= MIN_WINDOW:
                dropped += 1
                continue
            found.append(window)
            if room is not None:
                room -= len(window)
    if not found:
        raise QccError(
            f"{text.name}: too short: none of its {len(documents)} documents has more than "
            f"{MIN_WINDOW} tokens, BOS counted; give a longer text"
        )
    return Windows(tuple(found), context, bos, marks, len(documents), dropped, max_tokens)
