"""Conversations for the tiny model: stories on request, questions about them, sums, small talk.

A conversation is a list of ``Turn``; ``render`` writes it in the form that the chat template of
the model writes too (``train.CHAT_TEMPLATE``; a test compares the two).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from qcc.tutorials.tiny import words as w
from qcc.tutorials.tiny.details import embroider
from qcc.tutorials.tiny.plots_counts import PLOTS as COUNT_PLOTS
from qcc.tutorials.tiny.plots_friends import PLOTS as FRIEND_PLOTS
from qcc.tutorials.tiny.plots_things import PLOTS as THING_PLOTS
from qcc.tutorials.tiny.tale import Scene, Tale, closing, gossip, make_scene, make_who
from qcc.tutorials.tiny.words import a, count, number

PLOTS = (*THING_PLOTS, *COUNT_PLOTS, *FRIEND_PLOTS)


@dataclass(frozen=True)
class Turn:
    """One message; the role is ``system``, ``user`` or ``assistant``."""

    role: str
    text: str


QA = tuple[str, str]


def render(turns: list[Turn]) -> str:
    """``<|user|>Hello!<|end|><|assistant|>Hi!<|end|>``, without BOS and EOS."""
    return "".join(f"<|{t.role}|>{t.text}<|end|>" for t in turns)


def tell(rng: Random, scene: Scene) -> Tale:
    """A tale with that scene and a plot drawn at random, details, and sometimes an echo."""
    tale = Tale(rng)
    rng.choice(PLOTS)(tale, scene)
    embroider(tale, scene)
    closing(tale, scene)
    if rng.random() < 0.3:
        gossip(tale)
    return tale


def _story(rng: Random) -> list[Turn]:
    """A story for the hero whom the user names, then questions about it."""
    s = make_scene(rng)
    h, f = s.hero, s.friend
    asks = (
        f"Tell me a story about {a(h.kind)} named {h.name}.",
        f"Please tell me a story about {h.name} the {h.kind}.",
        f"Can you tell me a story about {a(h.kind)} named {h.name}?",
        f"I would like to hear about {a(h.kind)} named {h.name}.",
        f"Write a story about {a(f'{h.nature} {h.kind}')} named {h.name}.",
        f"Tell me a story about {a(h.kind)}.",
        f"Tell me a story about {h.name} the {h.kind} and {f.name} the {f.kind}.",
        "Tell me a story.",
        f"Write a story about {a(h.kind)} in {s.season}.",
    )
    tale = tell(rng, s)
    turns = [Turn("user", rng.choice(asks)), Turn("assistant", tale.text)]
    if rng.random() < 0.65:
        facts = rng.sample(tale.facts, rng.randint(1, min(3, len(tale.facts))))
        for question, answer in facts:
            turns += [Turn("user", question), Turn("assistant", answer)]
    return turns


def _sum(rng: Random) -> QA:
    top = 10 if rng.random() < 0.6 else rng.choice((20, 50))
    x, y = rng.randint(0, top), rng.randint(0, min(top, 20))
    word, res = ("plus", x + y) if rng.random() < 0.6 else ("minus", max(x, y) - min(x, y))
    if word == "minus":
        x, y = max(x, y), min(x, y)
    if rng.random() < 0.3:
        sign = "+" if word == "plus" else "-"
        return f"What is {x} {sign} {y}?", f"{x} {sign} {y} is {res}."
    answer = f"{number(x).capitalize()} {word} {number(y)} is {number(res)}."
    ask = rng.choice(("What is", "How much is"))
    return f"{ask} {number(x)} {word} {number(y)}?", answer


def _left(rng: Random) -> QA:
    p, q = make_who(rng), make_who(rng)
    noun = rng.choice(w.FOODS + w.KEEPSAKES)
    n = rng.randint(2, 15)
    k = rng.randint(1, n - 1)
    if rng.random() < 0.5:
        text = f"{p.name} has {count(n, noun)} and gives {count(k, noun)} away. How many are left?"
        return text, f"{p.name} has {count(n - k, noun)} left."
    k = rng.randint(1, 10)
    q = replace(q, name=rng.choice([x for x in w.GIRLS + w.BOYS if x != p.name]))
    text = (f"{p.name} has {count(n, noun)} and {q.name} has {count(k, noun)}. "
            "How many do they have together?")  # fmt: skip
    return text, f"Together they have {count(n + k, noun)}."


def _who_has(rng: Random) -> QA:
    names = rng.sample(w.GIRLS + w.BOYS, 3)
    things = [f"{c} {x}" for c, x in zip(rng.sample(w.COLORS, 3), rng.sample(w.THINGS, 3),
                                         strict=True)]  # fmt: skip
    told = " ".join(f"{n} has {a(x)}." for n, x in zip(names, things, strict=True))
    i = rng.randrange(3)
    thing = things[i].split()
    return rng.choice((
        (f"{told} Who has the {things[i]}?", f"{names[i]} has the {things[i]}."),
        (f"{told} What does {names[i]} have?", f"{names[i]} has {a(things[i])}."),
        (f"{told} What color is the {thing[1]}?", f"The {thing[1]} is {thing[0]}."),
    ))  # fmt: skip


def _where(rng: Random) -> QA:
    names = rng.sample(w.GIRLS + w.BOYS, 2)
    spots = rng.sample(w.PLACES, 2)
    i = rng.randrange(2)
    told = f"{names[0]} is {spots[0][1]}, and {names[1]} is {spots[1][1]}."
    if rng.random() < 0.5:
        return f"{told} Where is {names[i]}?", f"{names[i]} is {spots[i][1]}."
    return f"{told} Who is {spots[i][1]}?", f"{names[i]} is {spots[i][1]}."


def _calendar(rng: Random) -> QA:
    i, k = rng.randrange(7), rng.randrange(4)
    day, nxt, prev = w.DAYS[i], w.DAYS[(i + 1) % 7], w.DAYS[i - 1]
    season = w.SEASONS[k]
    return rng.choice((
        (f"What day comes after {day}?", f"{nxt} comes after {day}."),
        (f"What day comes before {day}?", f"{prev} comes before {day}."),
        (f"Today is {day}. What day is tomorrow?", f"Tomorrow is {nxt}."),
        (f"What season comes after {season}?",
         f"{w.SEASONS[(k + 1) % 4].capitalize()} comes after {season}."),
        ("How many days are in a week?", "There are seven days in a week."),
        ("How many seasons are in a year?", "There are four seasons in a year."),
    ))  # fmt: skip


def _count_up(rng: Random) -> QA:
    start = rng.randint(1, 15)
    stop = start + rng.randint(2, 9)
    if rng.random() < 0.7:
        counted = ", ".join(number(i) for i in range(start, stop + 1))
        return f"Count from {number(start)} to {number(stop)}.", f"{counted.capitalize()}."
    n = rng.randint(1, 98)
    return f"What number comes after {number(n)}?", f"{number(n + 1).capitalize()}."


_KNOWN: tuple[QA, ...] = (
    ("What color is the sky?", "On a clear day, the sky is blue."),
    ("What color is grass?", "Grass is green."),
    ("What color is snow?", "Snow is white."),
    ("What color is a lemon?", "A lemon is yellow."),
    ("What does a cow say?", "A cow says moo."),
    ("What does a cat say?", "A cat says meow."),
    ("What does a dog say?", "A dog says woof."),
    ("What does a duck say?", "A duck says quack."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("What is the opposite of big?", "The opposite of big is small."),
    ("What is the opposite of fast?", "The opposite of fast is slow."),
    ("What is the opposite of day?", "The opposite of day is night."),
    ("Where does an owl sleep?", "An owl sleeps in a tree."),
    ("Where does a fish live?", "A fish lives in the water."),
    ("What do bees make?", "Bees make honey."),
    ("What do rabbits eat?", "Rabbits eat grass and carrots."),
    ("When does snow fall?", "Snow falls in winter."),
    ("When do leaves fall?", "Leaves fall in autumn."),
    ("Why do we need an umbrella?", "We need an umbrella because it keeps us dry in the rain."),
    ("Why do birds build nests?", "Birds build nests because their eggs need a safe place."),
    ("How are you?", "I am well, thank you. Would you like to hear a story?"),
    ("Hello!", "Hello! What shall we talk about?"),
    ("Hi!", "Hi! Would you like to hear a story?"),
    ("Good morning!", "Good morning! How can I help you?"),
    ("Thank you!", "You are welcome!"),
    ("Goodbye!", "Goodbye! Come back soon."),
    ("What can you do?", "I can tell stories, answer small questions, and count."),
    ("Who are you?", "I am a very small model that likes to tell stories."),
    ("What is your name?", "I have no name, but you may call me Tiny."),
    ("Are you a person?", "No, I am a small language model."),
)


def _known(rng: Random) -> QA:
    return rng.choice(_KNOWN)


_SHORT: tuple[Callable[[Random], QA], ...] = (
    _sum, _sum, _left, _who_has, _who_has, _where, _calendar, _count_up, _known, _known,
)  # fmt: skip
_SYSTEM = (
    "You are a helpful assistant.", "You are a friendly storyteller.", "Be kind and clear.",
    "You like to tell stories.", "Answer the question.",
)  # fmt: skip


def _short(rng: Random) -> list[Turn]:
    turns: list[Turn] = []
    for _ in range(rng.choice((1, 2, 3, 4, 5))):
        question, answer = rng.choice(_SHORT)(rng)
        turns += [Turn("user", question), Turn("assistant", answer)]
    return turns


def _named(rng: Random) -> list[Turn]:
    """The system message gives the assistant a name, and it must be kept."""
    who = make_who(rng)
    system = rng.choice((
        f"You are {a(who.kind)} named {who.name}.", f"Your name is {who.name} the {who.kind}.",
    ))  # fmt: skip
    me = rng.choice((
        ("What is your name?", f"My name is {who.name}."),
        ("Who are you?", f"I am {who.name} the {who.kind}."),
        ("Are you a person?", f"I am {a(who.kind)}, and my name is {who.name}."),
    ))  # fmt: skip
    return [Turn("system", system), Turn("user", me[0]), Turn("assistant", me[1]), *_short(rng)]


def make_chat(rng: Random) -> list[Turn]:
    """One conversation; a third of them begin with a system message."""
    draw = rng.random()
    if draw < 0.08:
        return _named(rng)
    turns = _story(rng) if draw < 0.5 else _short(rng)
    if rng.random() < 0.3:
        turns.insert(0, Turn("system", rng.choice(_SYSTEM)))
    return turns
