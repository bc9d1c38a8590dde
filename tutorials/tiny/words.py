"""The vocabulary of the tiny stories: names, kinds, things, places, numbers in words.

Data and three small functions; the sentences stand in the ``plots_*.py`` files and in ``chat.py``.
"""

from __future__ import annotations

GIRLS = (
    "Mia", "Lily", "Anna", "Nora", "Ella", "Ruby", "Clara", "Rose", "Zoe", "Ivy", "Lucy", "Hazel",
    "Tilda", "Greta", "Molly", "Wilma", "Daisy", "Petra", "Sofia", "Fern",
    "Alma", "Berta", "Carla", "Dora", "Edith", "Flora", "Gloria", "Helen", "Iris", "Julia",
)  # fmt: skip
BOYS = (
    "Tom", "Ben", "Max", "Leo", "Sam", "Oscar", "Felix", "Hugo", "Jack", "Otto", "Finn", "Paul",
    "Rufus", "Milo", "Emil", "Karl", "Toby", "Bruno", "Henry", "Noah",
    "Adam", "Boris", "Conrad", "David", "Erik", "Frank", "Gustav", "Harry", "Ivan", "Jonas",
)  # fmt: skip
KINDS = (
    "fox", "bear", "rabbit", "mouse", "hedgehog", "squirrel", "badger", "otter", "cat", "dog",
    "goat", "frog", "duck", "owl", "mole", "beaver", "pony", "goose",
)  # fmt: skip
NATURES = (
    "little", "young", "brave", "kind", "clever", "cheerful", "quiet", "curious", "shy", "friendly",
)  # fmt: skip
HOMES = (
    "in a small house by the river", "in a village near the sea", "at the edge of the forest",
    "on a farm in the valley", "in a cottage under an old oak", "on top of a green hill",
    "in a town with a tall clock tower", "beside a quiet lake", "next to the old mill",
    "at the end of a long lane",
)  # fmt: skip
RELATIVES = ("mother", "father", "grandmother", "grandfather", "aunt", "uncle", "sister", "brother")
ELDERS = ("mother", "father", "grandmother", "grandfather", "aunt", "uncle")
COLORS = (
    "red", "blue", "green", "yellow", "purple", "orange", "white", "black", "brown", "pink",
    "silver", "golden",
)  # fmt: skip
THINGS = (
    "kite", "ball", "hat", "scarf", "book", "bell", "drum", "key", "lantern", "basket", "boat",
    "whistle", "blanket", "cup", "flute", "ribbon", "button", "wagon", "coat", "ring",
)  # fmt: skip
# one, many: counted things that can be eaten, and counted things that can be kept
FOODS = (
    ("apple", "apples"), ("pear", "pears"), ("plum", "plums"), ("cookie", "cookies"),
    ("nut", "nuts"), ("berry", "berries"), ("carrot", "carrots"), ("cherry", "cherries"),
    ("mushroom", "mushrooms"), ("egg", "eggs"),
)  # fmt: skip
KEEPSAKES = (
    ("shell", "shells"), ("stone", "stones"), ("bead", "beads"), ("feather", "feathers"),
    ("marble", "marbles"), ("candle", "candles"), ("acorn", "acorns"), ("leaf", "leaves"),
)  # fmt: skip
# the place, and how one says where something is
PLACES = (
    ("the forest", "in the forest"), ("the river", "by the river"), ("the hill", "on the hill"),
    ("the market", "at the market"), ("the old mill", "behind the old mill"),
    ("the garden", "in the garden"), ("the bridge", "under the bridge"),
    ("the barn", "inside the barn"), ("the lake", "beside the lake"),
    ("the meadow", "in the meadow"), ("the school", "in front of the school"),
    ("the tall pine", "under the tall pine"), ("the well", "near the well"),
    ("the harbor", "at the harbor"), ("the cave", "in the cave"),
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
SEASONS = ("spring", "summer", "autumn", "winter")
WEATHER = {
    "spring": ("The air smelled of wet grass.", "The first flowers were open.",
               "Soft rain had fallen in the night."),
    "summer": ("The sun was hot and high.", "Bees hummed in the warm air.",
               "There was not a cloud in the sky."),
    "autumn": ("The leaves were red and brown.", "A cool wind moved the trees.",
               "Mist lay over the fields."),
    "winter": ("Snow lay on every roof.", "The pond was covered with ice.",
               "The air was cold and clear."),
}  # fmt: skip

_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
)  # fmt: skip
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def number(n: int) -> str:
    """``n`` in English words, for 0 <= n <= 199."""
    if not 0 <= n <= 199:
        raise ValueError(f"number: {n} is outside 0..199; the grammar counts no further")
    if n >= 100:
        return "one hundred" + (f" and {number(n - 100)}" if n > 100 else "")
    if n < 20:
        return _ONES[n]
    return _TENS[n // 10] + (f"-{_ONES[n % 10]}" if n % 10 else "")


def count(n: int, noun: tuple[str, str]) -> str:
    """``one apple``, ``two apples``, ``no apples``."""
    return f"{number(n) if n else 'no'} {noun[n != 1]}"


def a(noun: str) -> str:
    """The noun phrase with the article its first sound asks for."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"
