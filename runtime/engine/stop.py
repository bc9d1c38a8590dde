"""Stop strings, found while a text grows: no part of one is ever shown."""

from __future__ import annotations

from collections.abc import Iterable


class StopStrings:
    """Passes on text that no stop string can begin in; ends at the first that is complete."""

    def __init__(self, stops: Iterable[str], include: bool = False) -> None:
        """`include`: the stop string itself is shown, what follows it is not."""
        self.stops = tuple(stops)
        self.include = include
        self.held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Add text; returns what can be shown now. After a match: nothing more."""
        if self.matched is not None:
            return ""
        self.held += text
        found = self._first_match()
        if found is not None:
            start, self.matched = found
            shown = self.held[: start + (len(self.matched) if self.include else 0)]
            self.held = ""
            return shown
        keep = self._possible_start()
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown

    def finish(self) -> str:
        """The text is over: what was held back, since it became no stop string."""
        shown, self.held = self.held, ""
        return shown

    def _first_match(self) -> tuple[int, str] | None:
        """(start, string) of the match that ends first; of those that end there, the longest.

        This does not depend on how the text was cut into pieces.
        """
        found = [(self.held.find(stop), stop) for stop in self.stops if stop in self.held]
        if not found:
            return None
        return min(found, key=lambda match: (match[0] + len(match[1]), match[0]))

    def _possible_start(self) -> int:
        """Length of the longest tail that a stop string may begin with."""
        longest = min(len(self.held), max(map(len, self.stops), default=1) - 1)
        for size in range(longest, 0, -1):
            if any(stop.startswith(self.held[-size:]) for stop in self.stops):
                return size
        return 0
