"""Token ids into text as they come: characters are never split, spaces never lost.

The tokenizer's own decoder does the work on a short window, so byte-level, byte-fallback and
sentencepiece-like tokenizers need no case of their own. The pieces joined are the whole decoded,
but where a byte-fallback model writes invalid UTF-8: Hugging Face's decoder then spoils the valid
characters before it as well, which have been shown by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "�"  # what decoders write for bytes that are no character, or not yet one
CONTEXT = 8  # tokens of the prompt that the window begins with


class Detokenizer:
    """The text of one answer."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        """`tokenizer`: a tokenizers.Tokenizer. The answer's text continues that of the prompt.

        So a first word keeps its leading space where the prompt's text ends without one.
        """
        self._decode = tokenizer.decode
        size = CONTEXT
        self.window = list(prompt[-size:])
        while size < min(len(prompt), 8 * CONTEXT) and self._text().startswith(REPLACEMENT):
            size += 1  # the window would begin within a character
            self.window = list(prompt[-size:])
        # The prompt's last character may be incomplete; the answer then begins with it.
        self.shown = self._text().rstrip(REPLACEMENT)  # text of the window, as far as it is out
        self.start = len(self.window)  # tokens whose text was shown

    def push(self, token: int) -> str:
        """Add a token; returns the text that is certain now, often of this token."""
        self.window.append(token)
        text = self._text()
        if text.endswith(REPLACEMENT):
            return ""
        return self._show(text)

    def finish(self) -> str:
        """The answer is over: what was held back, its incomplete characters as U+FFFD."""
        return self._show(self._text())

    def _show(self, text: str) -> str:
        if text.startswith(self.shown):
            new = text[len(self.shown) :]
        else:  # later bytes spoilt what was shown: decode them alone
            new = self._decode(self.window[self.start :], skip_special_tokens=True)
        if new:
            # The window may begin anew where its text ended with a whole character.
            self.window = self.window[self.start :] or self.window
            self.shown = self._text()
            self.start = len(self.window)
        return new

    def _text(self) -> str:
        return str(self._decode(self.window, skip_special_tokens=True))
