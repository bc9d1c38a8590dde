"""Plots in which things are counted, and the counts add up: sharing, buying, growing, a week."""

from __future__ import annotations

from qcc.tutorials.tiny import words as w
from qcc.tutorials.tiny.tale import Scene, Tale, opening
from qcc.tutorials.tiny.words import count, number


def share(t: Tale, s: Scene) -> None:
    """Someone has n, gives some away, perhaps twice, perhaps finds more."""
    h, f, o = s.hero, s.friend, s.other
    noun = t.rng.choice(w.FOODS + w.KEEPSAKES)
    food = noun in w.FOODS
    many = noun[1]
    n = t.rng.randint(4, 12) if t.rng.random() < 0.7 else t.rng.randint(10, 25)
    first = t.rng.randint(1, min(n - 2, 9))
    rest = n - first
    place, at = t.rng.choice(w.PLACES)
    opening(t, s)
    t.say(
        f"{h.name} had {count(n, noun)} in a basket and went to {place}.",
        f"{h.His} {s.elder} gave {h.him} {count(n, noun)} to take along.",
        f"{h.name} counted {h.his} {many}. There were {number(n)} of them.",
    )
    t.turn()
    why = t.rng.choice(
        ("was hungry", "had not eaten all day", "had nothing for lunch")
        if food else ("had none", "was sad that day", "liked them so much")
    )  # fmt: skip
    t.say(
        f"Near {place} {h.he} met {f.name} the {f.kind}. {f.name} {why}, so {h.name} gave "
        f"{f.him} {count(first, noun)}.",
        f'"Hello, {h.name}! May I have {count(first, noun)}?" asked {f.name} the {f.kind}. '
        f'"Of course," said {h.name}, because {f.name} {why}.',
        f"{h.name} saw {f.name} sitting {at}. {f.name} {why}. So {h.name} gave {f.him} "
        f"{count(first, noun)}.",
    )
    t.say(
        f"Now {h.name} had {count(rest, noun)} left.",
        f"{number(n).capitalize()} minus {number(first)} is {number(rest)}, so {h.name} had "
        f"{count(rest, noun)} left.",
        f'"Now I have {number(rest)}," said {h.name}.',
    )
    t.fact(f"How many {many} did {h.name} have at first?", f"{h.name} had {count(n, noun)}.")
    t.fact(f"How many {many} did {f.name} get?", f"{f.name} got {count(first, noun)}.")
    if t.rng.random() < 0.6:
        t.turn()
        if t.rng.random() < 0.5 and rest > 1:
            k = t.rng.randint(1, min(rest - 1, 9))
            rest -= k
            t.say(
                f"Then {o.name} the {o.kind} came by. {h.name} gave {count(k, noun)} to {o.name}.",
                f"A little later, {h.he} met {o.name} the {o.kind} and gave {o.him} "
                f"{count(k, noun)}.",
            )
            t.say(
                f"Now {'there was one' if rest == 1 else f'there were {number(rest)}'} left.",
                f"So {h.name} had {count(rest, noun)} left.",
            )
            t.fact(f"How many {many} did {o.name} get?", f"{o.name} got {count(k, noun)}.")
        else:
            k = t.rng.randint(1, 6)
            rest += k
            t.say(
                f"On the way home, {h.name} found {number(k)} more.",
                f"{o.name} the {o.kind} saw how kind {h.name} was and gave {h.him} {number(k)} "
                "more.",
            )
            t.say(
                f"That made {number(rest)}.",
                f"{h.name} counted again. Now there were {number(rest)}.",
            )
    t.turn()
    t.say(
        f'"How many {many} do you have?" asked {h.his} {s.elder} at home. "I had {number(n)}, and '
        f'now I have {number(rest)}," said {h.name}. "I shared with {f.name}."',
        f"In the morning {h.name} had had {count(n, noun)}, and in the evening {h.he} had "
        f"{number(rest)}. But {h.he} also had a new friend.",
        f"At home, {h.name} put the {count(rest, noun)} on the table and thought of {f.name}."
        if rest > 1 else
        f"At home, {h.name} put {count(rest, noun)} on the table and thought of {f.name}.",
    )  # fmt: skip
    t.fact(f"How many {many} did {h.name} have at the end?", f"{h.name} had {count(rest, noun)}.")


def market(t: Tale, s: Scene) -> None:
    """Money in the purse, two prices, what is left."""
    h, f = s.hero, s.friend
    unit = t.rng.choice((1, 1, 1, 5))
    p1, p2 = t.rng.randint(2, 9) * unit, t.rng.randint(2, 9) * unit
    left = t.rng.randint(1, 9) * unit
    money = p1 + p2 + left
    one, two = t.two(w.THINGS)
    c1, c2 = t.two(w.COLORS)
    for_whom = t.pick(w.RELATIVES)
    coins = ("coin", "coins")
    opening(t, s)
    t.say(
        f"{h.name} had {count(money, coins)} in {h.his} purse and went to the market.",
        f'{h.His} {s.elder} gave {h.him} {count(money, coins)}. "Go to the market," said '
        f'{h.his} {s.elder}, "and buy something nice."',
        f"{h.name} had worked hard and had saved {count(money, coins)}. On {s.today} {h.he} went to"
        " the market.",
    )
    t.turn()
    t.say(
        f"{f.name} the {f.kind} was selling {w.a(f'{c1} {one}')} for {count(p1, coins)}.",
        f'"How much is the {c1} {one}?" asked {h.name}. "{count(p1, coins).capitalize()}," said '
        f"{f.name} the {f.kind}.",
    )
    mid = money - p1
    t.say(
        f"{h.name} bought it and had {count(mid, coins)} left.",
        f'"I will take it," said {h.name}. Now there were {count(mid, coins)} in the purse.',
    )
    t.say(
        f"Then {h.he} saw {w.a(f'{c2} {two}')} that {h.his} {for_whom} would like. It cost "
        f"{count(p2, coins)}.",
        f"Next to it lay {w.a(f'{c2} {two}')} for {count(p2, coins)}. {h.name} thought of {h.his} "
        f"{for_whom}.",
    )
    t.say(
        f"So {h.he} bought the {two} too, and {count(left, coins)} {'was' if left == 1 else 'were'}"
        " left.",
        f"{h.He} bought it as well. {number(mid).capitalize()} minus {number(p2)} is "
        f"{number(left)}, so {h.he} had {count(left, coins)} left.",
    )
    t.turn()
    t.say(
        f"At home {h.he} gave the {c2} {two} to {h.his} {for_whom} and kept the {c1} {one}.",
        f"{h.name} kept the {c1} {one}, but the {c2} {two} was for {h.his} {for_whom}.",
    )
    spent = count(p1 + p2, coins)
    t.say(
        f'"How much did you spend?" asked {h.his} {s.elder}. "{spent.capitalize()}," said '
        f"{h.name}.",
        f"In all, {h.name} had spent {spent}.",
    )
    t.fact(f"How much was the {one}?", f"The {one} was {count(p1, coins)}.")
    t.fact(f"How many coins did {h.name} have left?", f"{h.name} had {count(left, coins)} left.")
    t.fact(f"Who got the {two}?", f"{h.name}'s {for_whom} got the {c2} {two}.")
    t.fact(f"What color was the {one}?", f"The {one} was {c1}.")


def garden(t: Tale, s: Scene) -> None:
    """Seeds in spring, losses for a reason, a harvest that is shared."""
    h, f, o = s.hero, s.friend, s.other
    plant, fruit = t.rng.choice((
        ("pumpkin", ("pumpkin", "pumpkins")), ("bean", ("bean plant", "bean plants")),
        ("sunflower", ("sunflower", "sunflowers")), ("carrot", ("carrot", "carrots")),
        ("cabbage", ("cabbage", "cabbages")),
    ))  # fmt: skip
    n = t.rng.randint(6, 20)
    gone = t.rng.randint(1, n // 2)
    grown = n - gone
    seeds = ("seed", "seeds")
    t.say(
        f"Once upon a time, there was {h.described} with a garden {s.home}.",
        f"In spring, {h.described} wanted to have a garden.",
        f"Behind the house of {h.name} the {h.kind} there was a garden. {h.name} was {h.nature} "
        "and liked to work.",
    )
    t.say(
        f"On {s.today} {h.he} put {number(n)} {plant} seeds into the ground.",
        f"{h.name} planted {number(n)} {plant} seeds on {s.today}. {h.He} gave them water every "
        "day.",
    )
    thief = t.rng.choice((
        f"{count(gone, seeds)} {{were}} eaten by hungry birds",
        f"{count(gone, seeds)} {{were}} washed away by the rain",
        f"{count(gone, seeds)} {{were}} too dry to grow",
    )).format(were="was" if gone == 1 else "were")  # fmt: skip
    t.say(
        f"But {thief}, so only {number(grown)} came up.",
        f'But {thief}. "{number(n).capitalize()} minus {number(gone)} is {number(grown)}," said '
        f'{h.name}. "I have {count(grown, (plant + " plant", plant + " plants"))}."',
    )
    t.turn()
    t.say(
        f"In summer it was hot, so {f.name} the {f.kind} helped to carry water from the well.",
        f"All summer {f.name} the {f.kind} helped {h.him}, because there was a lot to do.",
    )
    t.perhaps(
        f'"They grow so slowly," said {f.name}. "Be patient," said {h.name}.',
        f'"When will they be ready?" asked {f.name}. "In autumn," said {h.name}.',
    )
    mine = t.rng.randint(0, grown - 1)
    given = grown - mine
    t.turn()
    t.say(
        f"In autumn there {'was' if grown == 1 else 'were'} {count(grown, fruit)} in the garden.",
        f"Autumn came, and {h.name} had {count(grown, fruit)}.",
    )
    t.say(
        f"{h.name} gave {number(given)} to {f.name}, because {f.name} had helped all summer.",
        f'"Thank you for the water, {f.name}," said {h.name}, and gave {f.him} {number(given)}.',
    )
    if mine:
        t.say(
            f"{number(mine).capitalize()} {'was' if mine == 1 else 'were'} left for the winter.",
            f"{h.name} kept {number(mine)} for {h.his} {s.elder}.",
        )
    else:
        t.say(f"None were left, but {h.name} did not mind.", f"{h.name} kept only the seeds.")
    t.perhaps(
        f'"Next year I will help too," said {o.name} the {o.kind}.',
        f"In winter, when snow lay on the garden, {h.name} dreamed of {plant} seeds.",
    )
    t.fact(f"How many seeds did {h.name} plant?", f"{h.name} planted {count(n, seeds)}.")
    t.fact("How many came up?", f"{number(grown).capitalize()} came up.")
    t.fact(f"Who helped {h.name}?", f"{f.name} the {f.kind} helped {h.name}.")
    t.fact(f"How many did {f.name} get?", f"{f.name} got {count(given, fruit)}.")


def week(t: Tale, s: Scene) -> None:
    """Three days, three finds, and the sum told day by day."""
    h, f = s.hero, s.friend
    noun = t.rng.choice(w.FOODS + w.KEEPSAKES)
    many = noun[1]
    finds = [t.rng.randint(1, 9) for _ in range(3)]
    if t.rng.random() < 0.25:
        finds = [x + 10 for x in finds]
    spots = t.rng.sample(w.PLACES, 3)
    opening(t, s)
    goal = sum(finds)
    t.say(
        f'"I want to have {count(goal, noun)}," {h.he} told {h.his} {s.elder}.',
        f"{h.name} needed {count(goal, noun)} for {h.his} {s.elder}.",
        f'"Can you bring me {count(goal, noun)}?" asked {h.his} {s.elder}. "Yes," said {h.name}.',
    )
    t.turn()
    total = 0
    for i, (found, (place, at)) in enumerate(zip(finds, spots, strict=True)):
        day = s.later(i)
        before, total = total, total + found
        t.say(
            f"On {day} {h.he} went to {place} and found {count(found, noun)}.",
            f"On {day} {h.name} found {count(found, noun)} {at}.",
        )
        if i:
            t.say(
                f"{number(before).capitalize()} and {number(found)} make {number(total)}.",
                f"Now {h.he} had {number(total)}.",
                f'"That makes {number(total)}," said {h.name}.',
            )
        else:
            t.perhaps(
                f'"That is a good start," said {f.name} the {f.kind}.',
                f"{h.He} put {'them' if found > 1 else 'it'} in a jar.",
            )
        t.fact(
            f"How many {many} did {h.name} find on {day}?",
            f"{h.name} found {count(found, noun)} on {day}.",
        )
        t.fact(f"Where did {h.name} go on {day}?", f"On {day} {h.name} was {at}.")
    t.turn()
    t.say(
        f"On {s.later(3)}, {h.name} showed the {many} to {f.name} the {f.kind}. "
        f'"{number(total).capitalize()}!" said {f.name}. "You did it!"',
        f'"I have all {number(total)}," {h.name} said on {s.later(3)}. {h.His} {s.elder} was '
        "proud.",
        f"On {s.later(3)} the work was done, and {h.name} had {count(total, noun)}, just as "
        f"{h.he} had wanted.",
    )
    best = max(finds)
    if finds.count(best) == 1:
        i = finds.index(best)
        t.perhaps(
            f"The best day was {s.later(i)}, when {h.he} found {number(best)}.",
            f'"Where did you find the most?" asked {f.name}. "{spots[i][1].capitalize()}," said '
            f"{h.name}.",
        )
    t.fact(f"How many {many} did {h.name} find in all?", f"{h.name} found {count(total, noun)}.")


PLOTS = (share, market, garden, week)
