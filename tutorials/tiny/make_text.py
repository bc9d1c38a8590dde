"""Writes the text that the tiny model learns from: stories and conversations, from a seed.

Every document has its own random generator, made from seed, kind and index. So the first 100 of
60000 stories are the first 100 of 200, and a test can look at a few without making them all.

    python make_text.py --seed 1 --stories 500 --chats 0 --out stories.txt
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from random import Random

from qcc.tutorials.tiny.chat import make_chat, render, tell
from qcc.tutorials.tiny.tale import make_scene

SEPARATOR = "<|endoftext|>"
TRAIN_SEED, HELDOUT_SEED = 1, 2
STORIES, CHATS = 60_000, 60_000
MIN_WORDS, MAX_WORDS = 80, 250


def story(seed: int, index: int) -> str:
    """Story number ``index`` of that seed, 80 to 250 words."""
    rng = Random(f"{seed} story {index}")
    while True:
        text = tell(rng, make_scene(rng)).text
        if MIN_WORDS <= len(text.split()) <= MAX_WORDS:
            return text


def stories(seed: int, n: int) -> Iterator[str]:
    """The first ``n`` stories of a seed."""
    return (story(seed, i) for i in range(n))


def chats(seed: int, n: int) -> Iterator[str]:
    """The first ``n`` conversations of a seed, rendered with their role tokens."""
    return (render(make_chat(Random(f"{seed} chat {i}"))) for i in range(n))


def write(path: Path, documents: Iterator[str]) -> int:
    """Write the documents, a line ``<|endoftext|>`` after each; return how many there were."""
    n = 0
    with path.open("w", encoding="utf-8") as file:
        for n, document in enumerate(documents, 1):
            file.write(f"{document}\n{SEPARATOR}\n")
            if n % 10_000 == 0:
                print(f"{n} documents")
    return n


def read(path: Path) -> list[str]:
    """The documents of a file that ``write`` wrote."""
    return [d.strip("\n") for d in path.read_text(encoding="utf-8").split(SEPARATOR)[:-1]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=TRAIN_SEED, help="seed of the text")
    parser.add_argument("--stories", type=int, default=STORIES, help="number of stories")
    parser.add_argument("--chats", type=int, default=CHATS, help="number of conversations")
    parser.add_argument("--out", type=Path, default=Path("tiny.txt"), help="file to write")
    args = parser.parse_args()

    def documents() -> Iterator[str]:
        yield from stories(args.seed, args.stories)
        yield from chats(args.seed, args.chats)

    n = write(args.out, documents())
    print(f"{n} documents, {args.out.stat().st_size / 1e6:.1f} MB in {args.out}")


if __name__ == "__main__":
    main()
