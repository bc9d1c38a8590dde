"""Plots about a thing: one that is lost, given, hidden in a box, or missing from the table."""

from __future__ import annotations

from qcc.tutorials.tiny import words as w
from qcc.tutorials.tiny.tale import Scene, Tale, opening


def lost(t: Tale, s: Scene) -> None:
    """A thing is lost for a reason, and the reason decides where it is found."""
    h, f, o = s.hero, s.friend, s.other
    color, thing = t.pick(w.COLORS), t.pick(w.THINGS)
    it, x = f"{color} {thing}", f"the {color} {thing}"
    opening(t, s)
    t.say(
        f"{h.name} had {w.a(it)}. It was a gift from {h.his} {s.elder}, so {h.he} took good care "
        "of it.",
        f"{h.His} {s.elder} had given {h.him} {w.a(it)}, and {h.he} loved it very much.",
        f"{h.name} had {w.a(it)} from {h.his} {s.elder}. {h.He} took it everywhere.",
    )
    place, _ = t.rng.choice(w.PLACES)
    cause, found, hint = t.rng.choice((
        ("a strong wind came and carried it away", "in the branches of a tree",
         "The wind blew toward the trees"),
        ("it fell into the stream and floated away", "between two stones in the water",
         "The stream carries everything to the stones"),
        ("a bird picked it up and flew away with it", "in a nest on the roof",
         "The bird has its nest on the roof"),
        ("it slipped out of the bag without a sound", "in the grass beside the path",
         "Look along the path where you walked"),
        ("the cart shook so much that it fell off", "in a hole in the road",
         "There is a big hole in the road"),
    ))  # fmt: skip
    t.say(
        f"That morning {h.he} went to {place}. On the way, {cause}.",
        f"{h.He} was walking to {place} when {cause}.",
        f"{h.He} wanted to show it to a friend at noon, but on the way to {place} {cause}.",
    )
    t.turn()
    t.say(f"{h.name} was very sad.", f"{h.name} began to cry.", f'"Oh no!" cried {h.name}.')
    t.say(
        f"{h.He} looked for it all morning, but {h.he} could not find it.",
        f"{h.He} looked left and right, but {x} was gone.",
        f"{h.He} ran back, but there was nothing to see.",
    )
    t.say(
        f'Then {h.he} met {f.name} the {f.kind}. "Have you seen my {it}?" asked {h.name}. "No, I '
        f'have not seen your {thing}," said {f.name}, "but I will help you look for it."',
        f'{h.He} met {f.name}, {w.a(f"{f.nature} {f.kind}")}. "Why are you sad?" asked {f.name}. '
        f'"Because I lost my {it}," said {h.name}. "Then we will look for it together," said '
        f"{f.name}.",
    )
    t.say(
        f'They asked {o.name} the {o.kind}, who lived near {place}. "{hint}," said {o.name}. '
        '"That is where I would look."',
        f'{o.name} the {o.kind} heard them. "How did you lose it?" asked {o.name}. {h.name} told '
        f'the whole story. "{hint}," said {o.name}.',
    )
    t.turn()
    finder = t.rng.choice((h, f))
    t.say(
        f"So they went to look, and there it was! {finder.name} found {x} {found}.",
        f"So they looked again. After a while, {finder.name} saw something {color}. It was the "
        f"{thing}, {found}.",
    )
    helper = f"you for helping me, {f.name}" if finder is h else f"you, {f.name}"
    t.say(
        f'"Thank {helper}!" said {h.name}. "My {s.elder} gave me this {thing}."',
        f'"Hooray!" shouted {h.name}. "Here is my {thing}!"',
    )
    t.say(
        f"{h.name} took {x} home and told {h.his} {s.elder} how {f.name} had helped.",
        f"From then on, {h.name} held the {thing} with both hands, because {h.he} did not want to "
        "lose it again.",
        f"{h.name} thanked {f.name} for the help and {o.name} for the good advice.",
    )
    t.fact(f"Who found {x}?", f"{finder.name} found {x}.")
    t.fact(f"Where was {x}?", f"It was {found}.")
    t.fact(f"What did {h.name} lose?", f"{h.name} lost {w.a(it)}.")
    t.fact(f"What color was the {thing}?", f"The {thing} was {color}.")


def gift(t: Tale, s: Scene) -> None:
    """The right gift has the color that the friend named at the start."""
    h, f = s.hero, s.friend
    likes, wrong = t.two(w.COLORS)
    thing = t.pick(w.THINGS)
    opening(t, s)
    t.say(
        f"{h.His} friend {f.name} had a birthday on {s.later(1)}. {f.name} liked everything that "
        f"was {likes}.",
        f"{f.name} the {f.kind} had a birthday the next day. The color that {f.name} loved best "
        f"was {likes}.",
    )
    t.say(
        f'"What shall I give {f.him}?" {h.name} asked {h.his} {s.elder}. "{w.a(thing).capitalize()}'
        f' is a fine gift," said {h.his} {s.elder}.',
        f"{h.name} wanted to give {f.him} {w.a(thing)}.",
    )
    t.turn()
    seller = s.other
    t.say(
        f"So {h.name} went to the market. {seller.name} the {seller.kind} had a shop there.",
        f"So {h.he} went to the shop of {seller.name} the {seller.kind}.",
    )
    t.say(
        f'"I have {w.a(f"{wrong} {thing}")}," said {seller.name}. "No, thank you," said {h.name}, '
        f'"because my friend does not like {wrong}. Do you have a {likes} one?"'
        if likes != "orange" else
        f'"I have {w.a(f"{wrong} {thing}")}," said {seller.name}. "No, thank you," said {h.name}, '
        f'"because my friend likes orange best. Do you have an orange one?"',
    )  # fmt: skip
    t.say(
        f"{seller.name} looked in a big box and took out {w.a(f'{likes} {thing}')}.",
        f'"Let me see," said {seller.name}. At the back of the shop was {w.a(f"{likes} {thing}")}.',
    )
    coins = t.rng.randint(2, 12)
    t.say(
        f"{h.name} paid {w.number(coins)} coins and ran home.",
        f'"That is {w.number(coins)} coins," said {seller.name}. {h.name} paid and said goodbye.',
    )
    t.turn()
    t.say(
        f"On {s.later(1)}, {f.name} opened the gift.",
        f"The next day, {f.name} had a party. {h.name} gave {f.him} the gift.",
    )
    t.say(
        f'"{w.a(f"{likes} {thing}").capitalize()}!" said {f.name}. "You remembered that I like '
        f'{likes}. Thank you, {h.name}!"',
        f'{f.name} was very happy, because the {thing} was {likes}. "How did you know?" asked '
        f'{f.name}. "I listen to my friends," said {h.name}.',
    )
    t.fact(f"What color does {f.name} like?", f"{f.name} likes {likes}.")
    given = w.a(f"{likes} {thing}")
    t.fact(f"What did {h.name} give {f.name}?", f"{h.name} gave {f.name} {given}.")
    t.fact(f"How much did the {thing} cost?", f"The {thing} cost {w.number(coins)} coins.")
    t.fact(f"Who sold the {thing}?", f"{seller.name} the {seller.kind} sold the {thing}.")


def box(t: Tale, s: Scene) -> None:
    """A locked box, a key in a place that a letter names, and what was inside."""
    h, f = s.hero, s.friend
    c_box, c_thing = t.two(w.COLORS)
    c_key = t.rng.choice(("silver", "golden", "rusty"))
    thing = t.rng.choice([x for x in w.THINGS if x != "key"])
    place, at = t.rng.choice(w.PLACES)
    opening(t, s)
    t.say(
        f"In the attic {h.he} found {w.a(f'{c_box} box')}, but it was locked.",
        f"Under the bed there was {w.a(f'{c_box} box')}. {h.name} tried to open it, but it was "
        "locked.",
        f'{h.His} {s.elder} came with {w.a(f"{c_box} box")}. "I cannot open it," said '
        f'{h.his} {s.elder}, "because I lost the key."',
    )
    t.say(
        f'On the lid was a note. It said: "The {c_key} key is {at}."',
        f'A small letter lay next to it. "You will find the {c_key} key {at}," said the letter.',
    )
    t.say(
        f'{h.name} asked {f.name} the {f.kind} to come along. "I love secrets," said {f.name}.',
        f'{h.name} showed the note to {f.name} the {f.kind}. "Let us go at once!" said {f.name}.',
    )
    t.turn()
    t.say(
        f"They went to {place} and looked for a long time.",
        f"So the two friends walked to {place}.",
        f"It was a long way to {place}, so they sang a song.",
    )
    under = t.rng.choice(("a flat stone", "an old bucket", "some dry leaves", "a wooden bench"))
    finder = t.rng.choice((h, f))
    t.say(
        f"{finder.name} looked under {under}, and there was the {c_key} key.",
        f'"Here it is!" called {finder.name}. The {c_key} key was under {under}.',
    )
    t.turn()
    t.say(
        f"Back at home, {h.name} put the key into the {c_box} box. Click! The box was open.",
        f"They ran back to the {c_box} box. {h.name} turned the {c_key} key, and the lid opened.",
    )
    t.say(
        f"Inside was {w.a(f'{c_thing} {thing}')}. It had belonged to {h.his} {s.elder} many years "
        "ago.",
        f'There was {w.a(f"{c_thing} {thing}")} in it. "That was mine when I was small!" said '
        f"{h.his} {s.elder}.",
    )
    t.say(
        f"{h.name} put the {thing} on the shelf and thanked {f.name}.",
        f"{h.name} kept the {c_thing} {thing}, and {f.name} got the empty {c_box} box.",
        f"{h.name} gave the {c_key} key to {f.name}, because friends share secrets.",
    )
    t.fact("What was in the box?", f"There was {w.a(f'{c_thing} {thing}')} in the box.")
    t.fact("Where was the key?", f"The key was {at}, under {under}.")
    t.fact("Who found the key?", f"{finder.name} found the {c_key} key.")
    t.fact("What color was the box?", f"The box was {c_box}.")


def pie(t: Tale, s: Scene) -> None:
    """Something is eaten; two have been elsewhere, one has it on the face."""
    h, f, o = s.hero, s.friend, s.other
    fruit = t.rng.choice(("apple", "plum", "cherry", "berry", "pear"))
    alibi, at = t.rng.choice((
        ("fishing", "at the lake"), ("reading", "in the school"), ("sleeping", "in the barn"),
        ("swimming", "in the river"), ("picking flowers", "in the meadow"),
    ))  # fmt: skip
    opening(t, s)
    t.say(
        f"{h.name} baked {w.a(f'{fruit} pie')} and put it on the table. Then {h.he} went out to get"
        " water. When "
        f"{h.he} came back, the pie was gone!",
        f"{h.His} {s.elder} had made {w.a(f'{fruit} pie')}. It stood by the window to cool. But at "
        "noon the plate was empty!",
    )
    t.say(
        f'"Who ate the {fruit} pie?" asked {h.name}.',
        f'"Somebody ate the {fruit} pie!" said {h.name}. "I will find out who it was."',
    )
    t.turn()
    first, second = (f, o) if t.rng.random() < 0.5 else (o, f)
    guilty = t.rng.choice((first, second))
    where = f'"I was {alibi} {at}," said {{}}. {{}} was telling the truth.'
    mark = t.rng.choice((
        "crumbs on the nose", "juice on the chin", "a purple mouth", "sugar on both cheeks",
    ))  # fmt: skip
    for who in (first, second):
        t.say(
            f"{'First' if who is first else 'Then'} {h.he} asked {who.name} the {who.kind}.",
            f"{h.He} went to {who.name} the {who.kind}{' first' if who is first else ' next'}.",
        )
        if who is guilty:
            t.say(
                f'"I do not know anything about a pie," said {who.name}. But {who.name} had '
                f"{mark}.",
                f'"What pie?" asked {who.name}. But {h.name} saw that {who.he} had {mark}.',
            )
            t.perhaps(f"{h.name} thought about this.", f'"Hm," said {h.name}.')
        else:
            t.say(where.format(who.name, who.He))
    t.turn()
    t.say(
        f'"It was you, {guilty.name}," said {h.name}, "because you have {mark}."',
        f'{h.name} looked at {guilty.name}. "You have {mark}, so it was you," {h.he} said.',
    )
    t.say(
        f'"I am sorry," said {guilty.name}. "I was so hungry that I ate it all."',
        f'{guilty.name} looked at the floor. "Yes, I ate the pie," {guilty.he} said. "I am sorry."',
    )
    t.say(
        f"{h.name} was not angry for long. They baked a new {fruit} pie together, and this time "
        "everyone got a piece.",
        f'"Next time, please ask me," said {h.name}. So {guilty.name} helped to bake another '
        f"{fruit} pie.",
    )
    innocent = second if guilty is first else first
    t.perhaps(
        f"{innocent.name}, who had been {alibi} all the time, got the biggest piece.",
        f'{innocent.name} laughed and said, "I am glad that I was only {alibi}."',
    )
    t.fact("Who ate the pie?", f"{guilty.name} the {guilty.kind} ate the pie.")
    t.fact(f"What was {innocent.name} doing?", f"{innocent.name} was {alibi} {at}.")
    t.fact("What kind of pie was it?", f"It was {w.a(f'{fruit} pie')}.")
    t.fact(f"How did {h.name} know who it was?", f"{guilty.name} had {mark}.")


PLOTS = (lost, gift, box, pie)
