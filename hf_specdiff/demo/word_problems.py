"""Templated arithmetic word problems with worked solutions and checkable answers.

Knows how to write one problem from a random generator and how to tell held-out problems from training ones. Knows nothing
about tokens or models.
"""

import hashlib
import random
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass

HELD_OUT_ONE_IN = 32

PEOPLE = [
    ("Maya", "she", "her"), ("Leo", "he", "his"), ("Nora", "she", "her"), ("Omar", "he", "his"), ("Ruth", "she", "her"),
    ("Hugo", "he", "his"), ("Iris", "she", "her"), ("Paul", "he", "his"), ("Vera", "she", "her"), ("Sam", "he", "his"),
    ("Tina", "she", "her"), ("Karl", "he", "his"), ("Anna", "she", "her"), ("Ben", "he", "his"), ("Lucy", "she", "her"),
    ("Ivan", "he", "his"),
]  # fmt: skip
ITEMS = [
    "apples", "marbles", "books", "coins", "stamps", "pencils", "stickers", "cards", "shells", "buttons", "eggs", "candles",
    "tickets", "flowers", "cookies", "stones",
]  # fmt: skip
BOXES = ["boxes", "bags", "packs", "jars", "baskets"]
OPENINGS = ["Let's solve this step by step.", "We go through the story one step at a time.", "Here is how to work it out."]


@dataclass(frozen=True, slots=True)
class WordProblem:
    """A problem, its worked solution and its answer.

    Attributes:
        prompt (`str`): the question, ending in "Answer:".
        solution (`str`): the text that follows the prompt, starting with a space.
        answer (`str`): the final number, decimal digits.
        num_steps (`int`): changes of the count, the problem's difficulty.
    """

    prompt: str
    solution: str
    answer: str
    num_steps: int

    @property
    def is_held_out(self) -> bool:
        """Whether the problem belongs to the evaluation split: a hash of its prompt decides, so the split needs no list."""
        digest = hashlib.sha256(self.prompt.encode()).digest()
        return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


@dataclass(frozen=True, slots=True)
class _Story:
    """Who and what a problem is about: the words that its templates are filled with."""

    name: str
    pronoun: str
    possessive: str
    friend: str
    items: str

    @property
    def subject(self) -> str:
        return self.pronoun.capitalize()


@dataclass(frozen=True, slots=True)
class _Step:
    """One change of the count: the sentence of the question, the sentence of the solution, the new count."""

    question: str
    solution: str
    count: int


def _find(rng: random.Random, story: _Story, count: int) -> _Step:
    n = rng.randint(2, 40)
    place = rng.choice(["in the garden", "at home", "under the bed", "at school", "in the old house"])
    return _Step(
        f"{story.subject} finds {n} more {story.items} {place}.",
        f"{story.subject} finds {n} more {story.items} {place}, "
        f"so now {story.pronoun} has {count} + {n} = {count + n} {story.items}.",
        count + n,
    )


def _buy(rng: random.Random, story: _Story, count: int) -> _Step:
    boxes, k, m = rng.choice(BOXES), rng.randint(2, 6), rng.randint(2, 9)
    return _Step(
        f"{story.subject} buys {k} {boxes} with {m} {story.items} in each of them.",
        f"The {k} {boxes} with {m} {story.items} in each of them hold {k} * {m} = {k * m} {story.items}. "
        f"Adding them to the {count} {story.items} gives {count} + {k * m} = {count + k * m} {story.items}.",
        count + k * m,
    )


def _earn(rng: random.Random, story: _Story, count: int) -> _Step:
    k, m = rng.randint(2, 7), rng.randint(2, 8)
    giver = rng.choice(["grandmother", "uncle", "neighbor", "teacher"])
    return _Step(
        f"For {k} days, {story.possessive} {giver} brings {m} {story.items} every day.",
        f"In {k} days {story.possessive} {giver} brings {k} * {m} = {k * m} {story.items}, "
        f"so now {story.pronoun} has {count} + {k * m} = {count + k * m} {story.items}.",
        count + k * m,
    )


def _give(rng: random.Random, story: _Story, count: int) -> _Step | None:
    if count < 4:
        return None
    n = rng.randint(2, min(count - 1, 50))
    return _Step(
        f"{story.subject} gives {n} {story.items} to {story.friend}.",
        f"{story.subject} gives {n} {story.items} to {story.friend}, so {count} - {n} = {count - n} {story.items} are left.",
        count - n,
    )


def _lose(rng: random.Random, story: _Story, count: int) -> _Step | None:
    if count < 4:
        return None
    n = rng.randint(2, min(count - 1, 30))
    place = rng.choice(["on the way home", "in the rain", "at the market", "on the train"])
    return _Step(
        f"{story.subject} loses {n} of the {story.items} {place}.",
        f"{story.subject} loses {n} of the {story.items} {place}, which leaves {count} - {n} = {count - n} {story.items}.",
        count - n,
    )


def _sell(rng: random.Random, story: _Story, count: int) -> _Step | None:
    k, m = rng.randint(2, 5), rng.randint(2, 8)
    if k * m >= count:
        return None
    return _Step(
        f"{story.subject} sells {m} {story.items} a week for {k} weeks.",
        f"In {k} weeks {story.pronoun} sells {k} * {m} = {k * m} {story.items}, "
        f"so {count} - {k * m} = {count - k * m} {story.items} are left.",
        count - k * m,
    )


def _double(rng: random.Random, story: _Story, count: int) -> _Step | None:
    if count > 80:
        return None
    return _Step(
        f"Then {story.friend} doubles the number of {story.items}.",
        f"{story.friend} doubles the number of {story.items}, "
        f"so now {story.pronoun} has {count} * 2 = {2 * count} {story.items}.",
        2 * count,
    )


def _halve(rng: random.Random, story: _Story, count: int) -> _Step | None:
    if count % 2 or count < 6:
        return None
    return _Step(
        f"{story.subject} sends half of the {story.items} to {story.friend}.",
        f"Half of the {story.items} go to {story.friend}, which leaves {count} / 2 = {count // 2} {story.items}.",
        count // 2,
    )


STEPS: list[Callable[[random.Random, _Story, int], _Step | None]] = [
    _find, _buy, _earn, _give, _lose, _sell, _double, _halve,
]  # fmt: skip


def make_problem(rng: random.Random, num_steps: int) -> WordProblem:
    """Write one problem.

    Args:
        rng (`random.Random`): the source of every choice.
        num_steps (`int`): changes of the count, at least 1; 2 to 5 in the bundled sets.

    Returns:
        `WordProblem`: a problem whose counts stay between 1 and 250.
    """
    (name, pronoun, possessive), (friend, _, _) = rng.sample(PEOPLE, 2)
    story = _Story(name, pronoun, possessive, friend, rng.choice(ITEMS))
    count = start = rng.randint(5, 60)
    steps: list[_Step] = []
    last_kind = None
    while len(steps) < num_steps:
        kind = rng.choice(STEPS)
        step = kind(rng, story, count) if kind is not last_kind else None
        if step is not None and 0 < step.count <= 250:
            steps.append(step)
            count, last_kind = step.count, kind
    question = " ".join(
        [f"{name} has {start} {story.items}."]
        + [step.question for step in steps]
        + [f"How many {story.items} does {name} have in the end?"]
    )
    solution = " ".join(
        [rng.choice(OPENINGS), f"At the start {name} has {start} {story.items}."]
        + [step.solution for step in steps]
        + [f"In the end {name} has {count} {story.items}. The answer is {count}."]
    )
    return WordProblem(f"Question: {question}\nAnswer:", f" {solution}", str(count), num_steps)


def iter_problems(seed: int, *, held_out: bool, num_steps: tuple[int, ...] = (2, 3, 4)) -> Iterator[WordProblem]:
    """Yield problems of one split without end.

    Args:
        seed (`int`): the same seed yields the same problems.
        held_out (`bool`): which split; the two never share a problem.
        num_steps (`tuple[int, ...]`): the difficulties to draw from, uniformly.

    Yields:
        `WordProblem`: the next problem of that split.
    """
    rng = random.Random(seed)
    while True:
        problem = make_problem(rng, rng.choice(num_steps))
        if problem.is_held_out == held_out:
            yield problem
