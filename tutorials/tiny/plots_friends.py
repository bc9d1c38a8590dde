"""Plots about people: a race, a storm, a promise, a house, a journey, hide and seek."""

from __future__ import annotations

from qcc.tutorials.tiny import words as w
from qcc.tutorials.tiny.tale import Scene, Tale, opening
from qcc.tutorials.tiny.words import number


def race(t: Tale, s: Scene) -> None:
    """The one who boasts loses, for a reason; the one who keeps on wins."""
    h, f, o = s.hero, s.friend, s.other
    place, at = t.rng.choice(w.PLACES)
    opening(t, s)
    t.say(
        f'"I am faster than anyone," said {f.name} the {f.kind}. "Then let us run a race to '
        f'{place}," said {h.name}.',
        f'{f.name} the {f.kind} laughed at {h.him}. "You are slow," said {f.name}. "We will see," '
        f'said {h.name}. "Let us run to {place}."',
    )
    t.say(
        f'{o.name} the {o.kind} counted: "One, two, three, go!"',
        f'"Ready?" called {o.name} the {o.kind}. "One, two, three, go!"',
    )
    t.turn()
    t.say(
        f"{f.name} ran very fast and was soon far ahead.",
        f"At first {f.name} was in front, and {h.name} was behind.",
    )
    why = t.rng.choice((
        "stopped to eat some berries", "lay down under a tree and fell asleep",
        "took the wrong path", "fell into a puddle", "stopped to talk to a bird",
    ))  # fmt: skip
    t.say(
        f"But then {f.name} {why}.",
        f"But because {f.he} felt so sure, {f.name} {why}.",
    )
    t.say(
        f"{h.name} did not stop. {h.He} ran and ran, step by step.",
        f"{h.name} went on and on and did not look back.",
    )
    t.turn()
    t.say(
        f'So {h.name} came to {place} first. "{h.name} is the winner!" shouted {o.name}.',
        f'{o.name} was waiting {at}. "{h.name} has won!" said {o.name}.',
    )
    c, thing = t.pick(w.COLORS), t.pick(w.THINGS)
    t.say(
        f"{h.name} got {w.a(f'{c} {thing}')} as a prize.",
        f"The prize was {w.a(f'{c} {thing}')}, and {h.name} was proud of it.",
    )
    t.say(
        f'"I lost because I {why}," said {f.name}. "You ran well, {h.name}."',
        f'{f.name} was sorry. "I will not laugh at you again," said {f.name}.',
        f"{h.name} let {f.name} hold the {c} {thing}, because a friend is worth more than a prize.",
    )
    t.fact("Who won the race?", f"{h.name} the {h.kind} won the race.")
    t.fact(f"Why did {f.name} lose?", f"{f.name} lost because {f.he} {why}.")
    t.fact("What was the prize?", f"The prize was {w.a(f'{c} {thing}')}.")
    t.fact("Who was faster at first?", f"{f.name} was faster at first.")


def storm(t: Tale, s: Scene) -> None:
    """The color of a friend's door, told early, is the way out of the storm."""
    h, f = s.hero, s.friend
    color, other = t.two(w.COLORS)
    opening(t, s)
    t.say(
        f'"If you ever get lost," said {h.his} friend {f.name} the {f.kind}, "look for my house. '
        f'It has {w.a(color)} door."',
        f"Not far away lived {f.name} the {f.kind}, in a house with {w.a(color)} door.",
    )
    place, at = t.rng.choice(w.PLACES)
    t.say(
        f"That day {h.name} went to {place}. In the afternoon, dark clouds came.",
        f"In the afternoon, {h.name} was alone {at} when the sky turned dark.",
    )
    storm_is = "snow" if s.season == "winter" else "rain"
    t.say(
        f"Then the {storm_is} began to fall, and {h.he} could not see the path.",
        f"The wind howled, and the {storm_is} was so thick that {h.name} lost {h.his} way.",
    )
    t.turn()
    t.say(
        f"{h.name} was cold and afraid. {h.He} walked and walked.",
        f'"What shall I do?" cried {h.name}. {h.He} was cold and wet.',
    )
    t.say(
        f"First {h.he} came to a house with {w.a(other)} door. It was not the right one, and nobody"
        " was there.",
        f"{h.He} saw a house, but the door was {other}, so {h.he} went on.",
    )
    t.say(
        f'At last {h.he} saw {w.a(color)} door. "That is the house of {f.name}!" said {h.name}.',
        f"Then there was a light, and next to it {w.a(color)} door. {h.name} remembered {f.name} "
        "and knocked.",
    )
    t.turn()
    drink = t.rng.choice(("hot soup", "warm milk", "hot tea", "bread and honey"))
    t.say(
        f'"Come in, come in!" said {f.name}. {f.He} gave {h.him} {drink} and a dry coat.',
        f'{f.name} opened the door. "You must be cold," {f.he} said and brought {drink}.',
    )
    t.say(
        f"They sat by the fire until the {storm_is} stopped.",
        f"{h.name} stayed for the night, because the {storm_is} did not stop.",
    )
    t.say(
        f'"I am so glad that your door is {color}," said {h.name}, and both of them laughed.',
        f"The next morning was {s.later(1)}, and the sky was blue. {h.name} thanked {f.name} for "
        f"the {drink}.",
        f"On {s.later(1)}, {h.name} told {h.his} {s.elder} about the {drink} and the {color} door.",
    )
    t.fact(f"What color was {f.name}'s door?", f"The door was {color}.")
    t.fact(f"Who helped {h.name}?", f"{f.name} the {f.kind} helped {h.name}.")
    t.fact(f"What did {f.name} give {h.name}?", f"{f.name} gave {h.name} {drink}.")
    t.fact(f"Where was {h.name} when the sky turned dark?", f"{h.name} was {at}.")


def promise(t: Tale, s: Scene) -> None:
    """A day and a place are agreed, something comes between, the promise is kept all the same."""
    h, f, o = s.hero, s.friend, s.other
    place, at = t.rng.choice(w.PLACES)
    days = t.rng.randint(2, 5)
    plan, past, tool = t.rng.choice((
        ("fly a kite", "flew the kite", "kite"), ("sail a boat", "sailed the boat", "boat"),
        ("play the drum", "played the drum", "drum"), ("read a book", "read the book", "book"),
        ("play with a ball", "played with the ball", "ball"),
        ("play the flute", "played the flute", "flute"),
    ))  # fmt: skip
    color = t.pick(w.COLORS)
    opening(t, s)
    t.say(
        f'"Let us meet {at} on {s.later(days)} and {plan}," said {f.name} the {f.kind}. "I promise '
        f'to be there," said {h.name}.',
        f"{h.name} promised {f.name} the {f.kind} to come to {place} on {s.later(days)}. They "
        f"wanted to {plan}.",
    )
    t.say(
        f'"I will bring my {color} {tool}," said {f.name}.',
        f"{f.name} had a new {color} {tool}.",
    )
    t.turn()
    t.say(f"Then {s.later(days)} came.", f"Soon it was {s.later(days)}.")
    cause, help_, done = t.rng.choice((
        ("had a broken wheel on the cart", "mend the wheel", "the wheel was round again"),
        ("had hurt a foot", "walk home", "they came to the door"),
        ("had lost a purse", "look for the purse", "they found the purse"),
        ("had too much wood to carry", "carry the wood", "all the wood was in the shed"),
        ("had to bring the sheep home", "bring the sheep home", "the last sheep was in the barn"),
    ))  # fmt: skip
    t.say(
        f"{h.name} was on the way to {place} when {h.he} met {o.name} the {o.kind}, who {cause}.",
        f"But on the way {h.name} saw {o.name} the {o.kind}, who {cause}.",
    )
    t.say(
        f'"Please help me," said {o.name}. So {h.name} helped {o.him} to {help_}.',
        f'"I have little time," said {h.name}, "but I will help you to {help_}."',
    )
    t.say(
        f"It took a long time until {done}.",
        f'After an hour {done}. "Thank you, {h.name}!" said {o.name}.',
    )
    t.turn()
    t.say(
        f'"Now I must run," said {h.name}, "because I made a promise to {f.name}."',
        f"Then {h.name} ran to {place} as fast as {h.he} could.",
    )
    t.say(
        f'{f.name} was still waiting {at}. "You are late," said {f.name}. "I am late because '
        f'{o.name} {cause}," said {h.name}.',
        f'"I knew that you would come," said {f.name}. "I had to help {o.name} to {help_}," said '
        f"{h.name}.",
    )
    t.say(
        f"So they {past} until the sun went down.",
        f"Then they {past}, and {o.name} came too.",
        f"{f.name} took out the {color} {tool}, and they {past} until evening.",
    )
    t.fact(f"Why was {h.name} late?", f"{h.name} was late because {o.name} {cause}.")
    t.fact("Where did they meet?", f"They met {at}.")
    t.fact("On which day did they meet?", f"They met on {s.later(days)}.")
    t.fact(f"What color was the {tool}?", f"The {tool} was {color}.")


def build(t: Tale, s: Scene) -> None:
    """What is built badly breaks in the weather, the second try with better stuff holds."""
    h, f, o = s.hero, s.friend, s.other
    what = t.rng.choice(("house", "bridge", "boat", "tower", "wall", "tree house"))
    weak, strong = t.rng.choice((
        ("straw", "wood"), ("paper", "wood"), ("sand", "stone"), ("leaves", "bricks"),
        ("thin sticks", "thick boards"), ("mud", "bricks"),
    ))  # fmt: skip
    event, did = t.rng.choice((
        ("a storm came", "The wind blew it down"),
        ("it rained all day and all night", "The rain washed it away"),
        ("the river rose", "The water carried it away"),
        ("a big cow leaned on it", "The cow broke it"),
    ))  # fmt: skip
    opening(t, s)
    t.say(
        f"{h.name} wanted to build {w.a(what)}. {h.He} made it of {weak}, because {weak} "
        f"{'were' if weak in ('leaves', 'thin sticks') else 'was'} easy to find.",
        f'"I will build {w.a(what)}," said {h.name}. {h.He} took {weak}, because that was quick.',
    )
    d = t.rng.randint(2, 6)
    t.say(
        f'"{weak.capitalize()} will not hold," said {o.name} the {o.kind}. But {h.name} did not '
        "listen.",
        f'"You should take {strong}," said {o.name} the {o.kind}. "That is too much work," said '
        f"{h.name}.",
    )
    t.turn()
    t.say(
        f"After {number(d)} days, {event}. {did}.",
        f"On {s.later(d)}, {event}. {did}.",
    )
    t.say(
        f'"My {what} is gone!" cried {h.name}. "{o.name} was right."',
        f'{h.name} sat down and was sad. "I should have listened to {o.name}," {h.he} said.',
    )
    t.turn()
    t.say(
        f'"Do not be sad," said {f.name} the {f.kind}. "This time we will use {strong}."',
        f'Then {f.name} the {f.kind} came by. "I have {strong}," said {f.name}. "Let us build it '
        'again."',
    )
    long = d + t.rng.randint(1, 5)
    t.say(
        f"They worked for {number(long)} days, and {o.name} helped too.",
        f"It took {number(long)} days, because {strong} is heavy."
        if strong in ("wood", "stone") else
        f"It took {number(long)} days, because {strong} are heavy.",
    )  # fmt: skip
    t.say(
        f"Soon {event} again, but the new {what} of {strong} did not move."
        if not event.startswith("it rained") else
        f"Soon it rained again, but the new {what} of {strong} did not move.",
        f"This time the {what} was strong, because it was made of {strong} and not of {weak}.",
    )  # fmt: skip
    t.say(
        f'"Thank you, {f.name} and {o.name}," said {h.name}.',
        f"{h.name} painted it {t.pick(w.COLORS)} and asked {f.name} and {o.name} to dinner.",
    )
    t.fact(f"What did {h.name} build?", f"{h.name} built {w.a(what)}.")
    t.fact(f"What was the first {what} made of?", f"It was made of {weak}.")
    t.fact(f"What was the new {what} made of?", f"It was made of {strong}.")
    t.fact("Who was right?", f"{o.name} the {o.kind} was right.")


def journey(t: Tale, s: Scene) -> None:
    """Three things from three places for one who is ill, named again at the end in that order."""
    h, f, o = s.hero, s.friend, s.other
    sick = t.pick(w.RELATIVES)
    goods = t.rng.sample(
        ("honey", "milk", "bread", "mint", "butter", "salt", "lemons", "onions", "rice", "cheese"),
        3,
    )
    spots = t.rng.sample(w.PLACES, 3)
    a_, b_, c_ = goods
    opening(t, s)
    t.say(
        f"But {h.his} {sick} was ill and had to stay in bed.",
        f'That day {h.his} {sick} did not get up. "I feel ill," said {h.his} {sick}.',
    )
    t.say(
        f'"Bring {a_}, {b_} and {c_}," said the doctor. "Then your {sick} will get well."',
        f'"For a good soup I need {a_}, {b_} and {c_}," said {h.name}.',
    )
    t.turn()
    t.say(
        f"First {h.he} went to {spots[0][0]} and got the {a_}.",
        f"{h.name} found the {a_} {spots[0][1]}.",
    )
    price, got = t.rng.choice((
        ("sing a song", "sang a song"), ("tell a joke", "told a joke"),
        ("clean the floor", "cleaned the floor"), ("dance", "danced"),
    ))  # fmt: skip
    t.say(
        f'Then {h.he} went to {spots[1][0]}. {f.name} the {f.kind} had {b_}. "First you must '
        f'{price}," said {f.name}. So {h.name} {got} and got the {b_}.',
        f'{spots[1][1].capitalize()} lived {f.name} the {f.kind}. "I will give you {b_} if you '
        f'{price}," said {f.name}. {h.name} {got}, and {f.name} gave {h.him} the {b_}.',
    )
    t.say(
        f"Last {h.he} went to {spots[2][0]}, where {o.name} the {o.kind} gave {h.him} the {c_}.",
        f"{o.name} the {o.kind} was {spots[2][1]} and had the {c_}. \"Take it for your {sick},\" "
        f"said {o.name}."
        if not c_.endswith("ns") else
        f"{o.name} the {o.kind} was {spots[2][1]} and had the {c_}. \"Take them for your {sick},\" "
        f"said {o.name}.",
    )  # fmt: skip
    t.turn()
    t.say(
        f"Now {h.name} had {a_}, {b_} and {c_}. {h.He} ran home and made a soup.",
        f'"{a_.capitalize()}, {b_} and {c_}, I have it all," said {h.name} and went home.',
    )
    t.say(
        f"The next day, {h.his} {sick} got up and smiled.",
        f"On {s.later(1)} {h.his} {sick} was well again.",
        f"Because the soup was so good, {h.his} {sick} was soon well.",
    )
    t.perhaps(
        f'"Who helped you?" asked {h.his} {sick}. "{f.name} gave me {b_}, and {o.name} gave me '
        f'{c_}," said {h.name}.',
        f"{h.name} told {h.his} {sick} how {h.he} {got} for {f.name}.",
    )
    t.fact("Who was ill?", f"{h.name}'s {sick} was ill.")
    t.fact(f"Who gave {h.name} the {c_}?", f"{o.name} the {o.kind} gave {h.name} the {c_}.")
    t.fact(f"What did {h.name} do for {f.name}?", f"{h.name} {got} for {f.name}.")
    t.fact(f"Where did {h.name} find the {a_}?", f"{h.name} found the {a_} {spots[0][1]}.")


def hide(t: Tale, s: Scene) -> None:
    """Hide and seek: two hide, each is given away by something."""
    h, f, o = s.hero, s.friend, s.other
    n = t.rng.choice((10, 12, 15, 20, 30))
    at1, at2 = t.two((
        "behind the door", "under the bed", "in the big basket", "behind the barn",
        "up in the apple tree", "under the bridge", "behind the curtain", "in the hay",
    ))  # fmt: skip
    sign1, sign2 = t.two((
        "sneezed", "laughed", "coughed", "dropped a spoon", "sang softly", "fell asleep and snored",
    ))  # fmt: skip
    opening(t, s)
    t.say(
        f"{h.name} played hide and seek with {f.name} the {f.kind} and {o.name} the {o.kind}.",
        f'"Let us play hide and seek," said {f.name} the {f.kind}. {o.name} the {o.kind} wanted to '
        "play too.",
    )
    t.say(
        f"{h.name} closed {h.his} eyes and counted to {number(n)}.",
        f'"I will count to {number(n)}," said {h.name} and closed {h.his} eyes.',
    )
    t.say(
        f"{f.name} hid {at1}, and {o.name} hid {at2}.",
        f"{o.name} ran to hide {at2}. {f.name} went to hide {at1}.",
    )
    t.turn()
    t.say(f'"I am coming!" called {h.name}.', f'"{number(n).capitalize()}! Here I come!" said '
          f"{h.name}.")  # fmt: skip
    order = [(f, at1, sign1), (o, at2, sign2)]
    t.rng.shuffle(order)
    (p, at_p, sign_p), (q, at_q, sign_q) = order
    t.say(
        f"At first it was quiet. Then {p.name} {sign_p}, and {h.name} found {p.him} {at_p}.",
        f"{h.name} listened. Because {p.name} {sign_p}, {h.name} found {p.him} {at_p}.",
    )
    t.say(
        f"Now {p.name} helped to look for {q.name}.",
        f'"Where is {q.name}?" asked {h.name}. "I will not tell you," said {p.name}.',
    )
    t.say(
        f"They looked for a long time, until {q.name} {sign_q} {at_q}.",
        f"{h.name} looked everywhere. Then somebody {sign_q}. It was {q.name}, {at_q}!",
    )
    t.turn()
    t.say(
        f'"You were hard to find, {q.name}," said {h.name}. "{q.name} wins!"',
        f"{q.name} was found last, so {q.name} won the game.",
    )
    t.say(
        f'"Next time I will not hide {at_p}," said {p.name}.',
        f"{p.name} was found first, so in the next game it was {p.name} who counted to "
        f"{number(n)}.",
    )
    t.fact("Who won the game?", f"{q.name} won the game.")
    t.fact("Who was found first?", f"{p.name} the {p.kind} was found first.")
    t.fact(f"Where did {f.name} hide?", f"{f.name} hid {at1}.")
    t.fact(f"Where did {o.name} hide?", f"{o.name} hid {at2}.")


PLOTS = (race, storm, promise, build, journey, hide)
