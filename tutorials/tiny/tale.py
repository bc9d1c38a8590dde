"""What every plot needs: people with their pronouns, a scene to start from, a story in the making.

A plot is a function ``(tale, scene) -> None``. It says its sentences into the tale and notes facts,
pairs of a question and its answer, from which ``chat.py`` makes conversations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from qcc.tutorials.tiny import words as w


@dataclass(frozen=True)
class Who:
    """A person or an animal of a story, with the words that stand for it."""

    name: str
    kind: str  # "girl", "boy" or an animal
    nature: str
    he: str
    him: str
    his: str

    @property
    def He(self) -> str:
        return self.he.capitalize()

    @property
    def His(self) -> str:
        return self.his.capitalize()

    @property
    def described(self) -> str:
        """``a shy fox named Mia``"""
        return f"{w.a(f'{self.nature} {self.kind}')} named {self.name}"


@dataclass(frozen=True)
class Scene:
    """Who is there, where and when; fixed before the first sentence so that all of it agrees."""

    hero: Who
    friend: Who
    other: Who
    home: str
    elder: str
    season: str
    day: int

    @property
    def today(self) -> str:
        return w.DAYS[self.day]

    def later(self, days: int) -> str:
        """The name of the day that many days after today."""
        return w.DAYS[(self.day + days) % 7]


@dataclass
class Tale:
    """A story in the making: paragraphs of sentences, and the facts that were told."""

    rng: Random
    paragraphs: list[list[str]] = field(default_factory=lambda: [[]])
    facts: list[tuple[str, str]] = field(default_factory=list)

    def say(self, *options: str) -> None:
        """Add one of the options, each a sentence or a few."""
        self.paragraphs[-1].append(self.rng.choice(options))

    def perhaps(self, *options: str) -> None:
        """Add one of the options, or nothing."""
        if self.rng.random() < 0.5:
            self.say(*options)

    def turn(self) -> None:
        """Start a new paragraph."""
        self.paragraphs.append([])

    def fact(self, question: str, answer: str) -> None:
        self.facts.append((question, answer))

    def pick(self, options: tuple[str, ...]) -> str:
        return self.rng.choice(options)

    def two(self, options: tuple[str, ...]) -> list[str]:
        """Two different options."""
        return self.rng.sample(options, 2)

    @property
    def text(self) -> str:
        return "\n".join(" ".join(p) for p in self.paragraphs if p)


def make_who(rng: Random, taken: tuple[str, ...] = ()) -> Who:
    """A new character whose name is not taken."""
    female = rng.random() < 0.5
    name = rng.choice([n for n in (w.GIRLS if female else w.BOYS) if n not in taken])
    child = "girl" if female else "boy"
    kind = child if rng.random() < 0.35 else rng.choice(w.KINDS)
    he, him, his = ("she", "her", "her") if female else ("he", "him", "his")
    return Who(name, kind, rng.choice(w.NATURES), he, him, his)


def make_scene(rng: Random) -> Scene:
    hero = make_who(rng)
    friend = make_who(rng, (hero.name,))
    other = make_who(rng, (hero.name, friend.name))
    return Scene(
        hero, friend, other, rng.choice(w.HOMES), rng.choice(w.ELDERS), rng.choice(w.SEASONS),
        rng.randrange(7),
    )  # fmt: skip


def opening(t: Tale, s: Scene) -> None:
    """Who, where, when: the first lines of most stories."""
    h = s.hero
    t.say(
        f"Once upon a time, there was {h.described}. {h.He} lived {s.home} with {h.his} {s.elder}.",
        f"Once upon a time, {w.a(h.kind)} named {h.name} lived {s.home}. {h.He} was "
        f"{h.nature}, and everyone liked {h.him}.",
        f"There once was {h.described} who lived {s.home}.",
        f"Long ago, {h.described} lived {s.home}. {h.His} {s.elder} lived there too.",
        f"This is the story of {h.described}. {h.He} lived {s.home}.",
        f"Once upon a time, there was {h.described}. {h.His} best friend was {s.friend.name} the "
        f"{s.friend.kind}.",
    )
    weather = t.pick(w.WEATHER[s.season])
    t.say(
        f"It was {s.today}, a fine day in {s.season}. {weather}",
        f"One day in {s.season}, {h.name} woke up early. {weather}",
        f"One {s.season} morning, {h.he} looked out of the window. {weather}",
        f"{weather} It was {s.season}, and it was {s.today}.",
        f"It was a {s.today} in {s.season}.",
    )
    t.fact(f"Who is the story about?", f"The story is about {w.a(h.kind)} named {h.name}.")  # noqa: F541


def gossip(t: Tale) -> None:
    """Others talk about what happened: facts come back long after they were told."""
    first, second = t.rng.choice((
        ("an old crow", "the sparrow"), ("a small bird", "the wise owl"),
        ("a boy in the street", "his sister"), ("the baker", "the miller"),
        ("a neighbor", "the postman"),
    ))  # fmt: skip
    t.turn()
    t.say(
        "The next day, everyone talked about it.",
        "Soon all the neighbors had heard of it.",
        "People still tell this story.",
    )
    again = first.replace("a ", "the ", 1).replace("an ", "the ", 1)
    known = [x for x in t.facts if not x[0].startswith("Who is the story")]
    for i, (question, answer) in enumerate(t.rng.sample(known, t.rng.randint(1, 2))):
        asker = again if i else first
        t.say(
            f'"{question}" asked {asker}. "{answer[:-1]}," said {second}.',
            f'"{question}" {asker} wanted to know. {second.capitalize()} knew it: "{answer}"',
        )


def closing(t: Tale, s: Scene) -> None:
    """A last line that leans on nothing but the scene."""
    h, f = s.hero, s.friend
    t.perhaps(
        f"From that day on, {h.name} and {f.name} were the best of friends.",
        f"{h.name} went home happy, and {h.his} {s.elder} was waiting at the door.",
        f"That night, {h.name} told {h.his} {s.elder} everything.",
        f"{h.name} slept well that night.",
        f"It had been a good {s.today}.",
        f"And so the day ended well for {h.name} the {h.kind}.",
        f"{h.name} never forgot that day in {s.season}.",
    )
