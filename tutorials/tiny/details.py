"""Details beside the plot: told early, remembered late.

Their choices are free, so a story holds more than its plot, and their echo at the end can only be
written by a model that has kept them in mind.
"""

from __future__ import annotations

from collections.abc import Callable

from qcc.tutorials.tiny import words as w
from qcc.tutorials.tiny.tale import Scene, Tale

_BEASTS = (
    "dog", "cat", "horse", "goose", "cow", "sheep", "crow", "hen", "donkey", "pig", "deer",
    "turtle",
)  # fmt: skip
_LOOKS = ("old", "fat", "thin", "sleepy", "small", "big", "lonely", "proud", "spotted", "gray")
# what it did, and what it is found doing later
_ACTS = (
    ("slept", "sleeping"), ("sat", "sitting"), ("stood", "standing"), ("waited", "waiting"),
    ("was eating", "eating"), ("rested", "resting"), ("was singing", "singing"),
)  # fmt: skip
_SPOTS = (
    "beside the well", "in front of a gate", "under a bush", "on a stone wall", "near a haystack",
    "at the crossroads", "behind a fence", "next to a cart", "in the shade of a tree",
    "by the side of the road",
)  # fmt: skip
_LUNCH = ("bread", "cheese", "soup", "milk", "honey", "jam", "rice", "butter", "tea", "cake")
_CRAFTS = (
    "baker", "miller", "sailor", "farmer", "painter", "teacher", "doctor", "singer", "captain",
    "gardener", "clockmaker", "shepherd",
)  # fmt: skip
_GOALS = (
    "see the sea", "learn to swim", "write a book", "fly like a bird", "find a treasure",
    "climb the highest hill", "count all the stars", "own a boat", "play in a band",
    "visit the moon", "bake the best cake", "ride on a train",
)  # fmt: skip

Detail = tuple[str, str, tuple[str, str]]  # early sentence, late sentence, fact


def sight(t: Tale, s: Scene) -> Detail:
    """Something that is seen on the way, and seen again on the way back."""
    beast = f"{t.pick(_LOOKS)} {t.pick(_BEASTS)}"
    did, doing = t.rng.choice(_ACTS)
    spot, h = t.pick(_SPOTS), s.hero
    early = t.pick((
        f"{w.a(beast).capitalize()} {did} {spot}.",
        f"That day {h.he} passed {w.a(beast)} that {did} {spot}.",
        f'"Good day," {h.name} said to {w.a(beast)} that {did} {spot}.',
    ))  # fmt: skip
    late = t.pick((
        f"The {beast} was still {doing} {spot}.",
        f"When {h.name} came back, the {beast} was still {spot}.",
        f"The {beast} {spot} had seen it all.",
    ))  # fmt: skip
    return early, late, (f"What did {h.name} see {spot}?", f"{h.name} saw {w.a(beast)} {spot}.")


def dress(t: Tale, s: Scene) -> Detail:
    """What the hero wears."""
    h = s.hero
    color, other = t.two(w.COLORS)
    one, two = t.rng.sample(("hat", "coat", "scarf", "shirt", "cap", "belt", "vest", "sweater"), 2)
    early = t.pick((
        f"{h.name} wore {w.a(f'{color} {one}')} and {w.a(f'{other} {two}')}.",
        f"That day {h.he} put on {w.a(f'{color} {one}')} and {w.a(f'{other} {two}')}.",
    ))  # fmt: skip
    late = t.pick((
        f"At home, {h.name} took off the {color} {one} and the {other} {two}.",
        f"Everyone remembered {h.name} in the {color} {one} and the {other} {two}.",
    ))  # fmt: skip
    what = f"{w.a(f'{color} {one}')} and {w.a(f'{other} {two}')}"
    return early, late, (f"What did {h.name} wear?", f"{h.name} wore {what}.")


def lunch(t: Tale, s: Scene) -> Detail:
    """What is in the bag."""
    h = s.hero
    one, two = t.two(_LUNCH)
    n = t.rng.randint(1, 6)
    fruit = w.count(n, t.rng.choice([x for x in w.FOODS if x[0] not in ("egg", "mushroom")]))
    early = t.pick((
        f"In {h.his} bag {h.he} had {one}, {two} and {fruit}.",
        f'"Take {one}, {two} and {fruit} with you," said {h.his} {s.elder}.',
    ))  # fmt: skip
    late = t.pick((
        f"In the evening {h.name} ate the {one}, the {two} and the {fruit}.",
        f"There was still some {one} in the bag, but the {two} and the {fruit} were gone."
        if n > 1 else
        f"The {one} and the {two} were gone, but the {fruit} was still in the bag.",
    ))  # fmt: skip
    return early, late, (
        f"What did {h.name} have in the bag?", f"{h.name} had {one}, {two} and {fruit} in the bag.",
    )  # fmt: skip


def dream(t: Tale, s: Scene) -> Detail:
    """What the hero would like to do or to be one day."""
    h = s.hero
    if t.rng.random() < 0.5:
        goal = t.pick(_GOALS)
        early = t.pick((
            f"More than anything, {h.name} wanted to {goal}.",
            f'"One day I will {goal}," {h.he} often said.',
        ))  # fmt: skip
        late = t.pick((
            f"And one day, many years later, {h.name} did {goal}.",
            f'"And tomorrow," said {h.name}, "I will {goal}."',
        ))  # fmt: skip
        return early, late, (f"What did {h.name} want to do?", f"{h.name} wanted to {goal}.")
    craft = t.pick(_CRAFTS)
    early = t.pick((
        f"{h.name} wanted to become {w.a(craft)}.",
        f'"When I am big, I will be {w.a(craft)}," said {h.name}.',
        f"{h.His} {s.elder} was {w.a(craft)}, and {h.name} wanted to be {w.a(craft)} too.",
    ))  # fmt: skip
    late = t.pick((
        f"Many years later, {h.name} became {w.a(craft)}.",
        f'"You will be a good {craft} one day," said {h.his} {s.elder}.',
    ))  # fmt: skip
    return early, late, (f"What did {h.name} want to become?",
                         f"{h.name} wanted to become {w.a(craft)}.")  # fmt: skip


DETAILS: tuple[Callable[[Tale, Scene], Detail], ...] = (sight, sight, dress, lunch, dream)


def embroider(t: Tale, s: Scene) -> None:
    """Add up to two details: told before the plot begins, remembered in the last paragraph."""
    for make in dict.fromkeys(t.rng.choices(DETAILS, k=t.rng.choice((0, 1, 1, 2)))):
        early, late, fact = make(t, s)
        t.paragraphs[0].insert(2, early)
        t.paragraphs[-1].append(late)
        t.facts.append(fact)
