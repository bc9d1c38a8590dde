"""Stop strings: found however the text is cut, and never shown in part."""

from __future__ import annotations

import itertools
import random

import pytest

from qcc.runtime.engine.stop import StopStrings


def run(pieces: list[str], stops: list[str], include: bool = False) -> tuple[str, str | None]:
    """(what was shown, what matched)."""
    stop = StopStrings(stops, include)
    shown = "".join([*map(stop.push, pieces), stop.finish()])
    return shown, stop.matched


def test_a_stop_string_over_several_pieces_never_leaks() -> None:
    stop = StopStrings(["<END>"])
    assert [stop.push(piece) for piece in ("a<", "EN", "D", ">b")] == ["a", "", "", ""]
    assert (stop.matched, stop.finish()) == ("<END>", "")
    assert stop.push("more") == ""


def test_what_becomes_no_stop_string_comes_out() -> None:
    stop = StopStrings(["<END>"])
    assert [stop.push(piece) for piece in ("a<EN", "X")] == ["a", "<ENX"]
    assert (stop.push("<"), stop.finish(), stop.matched) == ("", "<", None)


def test_included_it_is_shown_and_nothing_after() -> None:
    assert run(["one. t", "wo"], [". "], include=True) == ("one. ", ". ")
    assert run(["one. t", "wo"], [". "]) == ("one", ". ")


def test_no_stop_strings_hold_nothing_back() -> None:
    stop = StopStrings([])
    assert stop.push("abc") == "abc"


def test_held_text_may_begin_anew() -> None:
    assert run(list("aaab"), ["aab"]) == ("a", "aab")
    assert run(list("ababc"), ["abc"]) == ("ab", "abc")


def test_the_one_that_is_complete_first_wins() -> None:
    assert run(["xabcd"], ["abcd", "bc"]) == ("xa", "bc")
    assert run(["xabcd"], ["bc", "abc"]) == ("x", "abc")


@pytest.mark.parametrize("include", [False, True])
def test_the_cut_into_pieces_does_not_matter(include: bool) -> None:
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choices("ab", k=9))
        stops = ["".join(rng.choices("ab", k=rng.randint(2, 4))) for _ in range(2)]
        whole = run([text], stops, include)
        cuts = sorted(rng.sample(range(10), 3))
        pieces = [text[i:j] for i, j in itertools.pairwise([0, *cuts, len(text)])]
        assert run(pieces, stops, include) == whole
        assert run(list(text), stops, include) == whole
        shown, matched = whole
        assert text.startswith(shown)
        if matched is None or not include:
            assert not any(stop in shown for stop in stops)
