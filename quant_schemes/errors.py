"""SchemeError: a user's mistake in a scheme or a format."""

import difflib
from collections.abc import Iterable


class SchemeError(ValueError):
    """A scheme or format that cannot be used; one line that says what is allowed."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest of `known`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
