"""Acceleration-compute scaling: what faster decoding is worth in right answers within a fixed wall-clock time.

Problems whose answer is a number, the bundled word problems or those of a published set, and two ways to spend the time on
each: one greedy step-by-step answer, read where the time is up, or sampled attempts one after the other, the majority of those
that are finished deciding. Every piece of text is kept with the second it came at, so that one run tells the accuracy at every
budget, and all methods take turns on each problem.

Source: SpecDiff-2, arXiv:2511.00606 (one budget of 15 s and the first way only).
"""

import itertools
import re
import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_specdiff.benchmarks.answers import final_number
from hf_specdiff.benchmarks.answers import number_so_far
from hf_specdiff.benchmarks.clocks import Clock
from hf_specdiff.benchmarks.clocks import Recording
from hf_specdiff.benchmarks.clocks import wait
from hf_specdiff.benchmarks.data_sets import Questions
from hf_specdiff.benchmarks.journal import Journal
from hf_specdiff.benchmarks.methods import PLAIN
from hf_specdiff.benchmarks.methods import Method
from hf_specdiff.benchmarks.methods import Models
from hf_specdiff.benchmarks.methods import ours
from hf_specdiff.benchmarks.standard import PROFILES
from hf_specdiff.benchmarks.standard import RESULTS
from hf_specdiff.benchmarks.standard import claim_of
from hf_specdiff.benchmarks.standard import conditions_of
from hf_specdiff.benchmarks.standard import progress_bar
from hf_specdiff.benchmarks.standard import write_record
from hf_specdiff.core.own_drafter import is_own_drafter
from hf_specdiff.core.profiling import isolated_profiles
from hf_specdiff.demo.word_problems import iter_problems
from hf_specdiff.training.prompts import Prompt
from hf_specdiff.training.prompts import encode

ANSWER, VOTE = STRATEGIES = "one answer", "majority vote"
STATED = re.compile(r"The answer is (\d+)\.")
NUMBER = re.compile(r"\d+")
# Of the problems: no other set of this package is made with it.
SEED = 11
HEADLINE = 0.5
FRACTIONS = (0.2, 0.3, 0.4, 0.6, 1.0, 1.5, 2.0, 3.0, 4.0)


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem whose answer is a number.

    Attributes:
        prompt (`str` or `list[dict]`): a text or a chat.
        answer (`str`): the number.
        difficulty (`int` or `str`): steps of its solution; of a published set the set's name.
    """

    prompt: Prompt
    answer: str
    difficulty: int | str


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured, all of it decided before the run.

    Attributes:
        methods (`list[Method]`): who solves the problems; plain `generate` first.
        headline (`float`): seconds for a problem, the budget at which gains are stated; the curve runs through `FRACTIONS` of
            it.
        difficulties (`tuple[int, ...]`): steps of a problem's solution.
        num_problems (`int`): of each difficulty.
        max_new_tokens (`int`): of an answer.
        temperature (`float`): of sampled attempts.
        seed (`int`): of sampled attempts.
        strategies (`tuple[str, ...]`): of `STRATEGIES`.
        given (`tuple[Problem, ...]`): what to solve in place of the bundled problems; an answer is the last number of a text.
    """

    methods: list[Method]
    headline: float = HEADLINE
    difficulties: tuple[int, ...] = (2, 3, 4)
    num_problems: int = 20
    max_new_tokens: int = 256
    temperature: float = 0.7
    seed: int = 0
    strategies: tuple[str, ...] = STRATEGIES
    given: tuple[Problem, ...] = ()

    @property
    def groups(self) -> tuple[int | str, ...]:
        """The difficulties that figures are given for."""
        return tuple(dict.fromkeys(problem.difficulty for problem in self.given)) or self.difficulties

    @property
    def budgets(self) -> list[float]:
        """Seconds for a problem, rising."""
        return [self.headline * fraction for fraction in FRACTIONS]

    @property
    def sampling(self) -> dict[str, Any]:
        """How attempts are sampled."""
        return {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}

    def problems(self) -> Iterator[tuple[int, Problem]]:
        """Yield held-out problems with their number, the difficulties in turn."""
        if self.given:
            yield from enumerate(self.given)
            return
        sources = [iter_problems(SEED + steps, held_out=True, num_steps=(steps,)) for steps in self.difficulties]
        rounds = zip(*sources, strict=True)
        every = itertools.chain.from_iterable(itertools.islice(rounds, self.num_problems))
        yield from enumerate(Problem(problem.prompt, problem.answer, problem.num_steps) for problem in every)

    def answer_in(self, text: str, *, is_whole: bool) -> str | None:
        """Return the answer of a text, or of its beginning; see `answer_in` and `number_so_far`."""
        return (number_so_far if self.given else answer_in)(text, is_whole=is_whole)


@dataclass(slots=True)
class Attempt:
    """One text.

    Attributes:
        method (`str`): who wrote it.
        strategy (`str`): `"one answer"` or `"majority vote"`.
        difficulty (`int` or `str`): of the problem.
        problem (`int`): its number.
        seconds (`list[float]`): when each piece came, since the work on the problem began; of a vote's attempts the end alone.
        answers (`list[str | None]`): what the text answers from then on.
        expected (`str`): the right answer.
    """

    method: str
    strategy: str
    difficulty: int | str
    problem: int
    seconds: list[float]
    answers: list[str | None]
    expected: str

    def answer_at(self, seconds: float) -> str | None:
        """Return what is answered when the time is up."""
        known = [answer for when, answer in zip(self.seconds, self.answers, strict=True) if when <= seconds]
        return known[-1] if known else None


def answer_in(text: str, *, is_whole: bool) -> str | None:
    """Return the answer that a text states, or, of a text cut off, the last number that it came to.

    Args:
        text (`str`): a solution or its beginning.
        is_whole (`bool`): whether it must have been stated.

    Returns:
        `str`: digits; `None` if there is none.
    """
    stated = STATED.search(text)  # the first: whoever goes on writes of something else
    if stated or is_whole:
        return stated[1] if stated else None
    # A number at the very end may have more digits to come.
    numbers = NUMBER.findall(re.sub(r"\d+$", "", text))
    return numbers[-1] if numbers else None


def problems_of(name: str, questions: Questions) -> tuple[Problem, ...]:
    """Return a published set's problems.

    Args:
        name (`str`): of the set.
        questions (`Questions`): its prompts and answers.

    Returns:
        `tuple[Problem, ...]`: with the number alone as answer.

    Raises:
        ValueError: if the set has no answers.
    """
    if questions.answers is None:
        raise ValueError(f"`--prompts` must be gsm8k with `--time-budget`, which needs right answers, got {name!r}.")
    pairs = zip(questions.prompts, questions.answers, strict=True)
    return tuple(Problem(prompt, str(final_number(answer)), name) for prompt, answer in pairs)


def scaling_methods(models: Models, drafters: Sequence[str]) -> list[Method]:
    """Return who solves problems: plain `generate`, the chain of each drafter, and the full loop with the last one.

    A drafter of the user's own drafts in one way only.

    Args:
        models (`Models`): who decodes.
        drafters (`Sequence[str]`): names of drafters.

    Returns:
        `list[Method]`: plain `generate` first.
    """
    own = {name for name in drafters if is_own_drafter(models.drafters[name])}
    first = [
        ours(name, "auto") if name in own else ours(name, "chain", draft_shape="chain", prompt_lookup_num_tokens=0)
        for name in drafters
    ]
    last = [] if drafters[-1] in own else [ours(drafters[-1], "auto", tree_budget="auto")]
    return [Method(PLAIN, {}), *first, *last]


def benchmark_time_budget(
    models: Models, plan: Plan, output: Path, names: dict[str, Any], command: str, clock: Clock = time.perf_counter
) -> dict[str, Any]:
    """Measure right answers within wall-clock budgets; what `hf-specdiff bench --time-budget` does.

    Args:
        models (`Models`): who decodes.
        plan (`Plan`): what is measured.
        output (`pathlib.Path`): the folder; gets `results.json`. An interrupted run goes on.
        names (`dict`): where the models came from.
        command (`str`): what was typed.
        clock (`Callable[[], float]`): tells the seconds.

    Returns:
        `dict`: what is in `results.json`: `conditions` and `rows`.

    Raises:
        ValueError: for a budget in which nothing can be written, or a folder of something else.
    """
    solver = Solver(models, plan, clock)
    solver.check_budget()
    journal = Journal(output, {**claim_of(models, names), **asdict(plan)})
    with isolated_profiles(output / PROFILES), progress_bar() as progress:
        bar = progress.add_task("problems", total=len(plan.given) or plan.num_problems * len(plan.difficulties))
        run_time_budget(solver, journal, partial(progress.advance, bar))
    settings = {name: value for name, value in asdict(plan).items() if name not in ("methods", "given")}
    settings["difficulties"] = list(plan.groups)
    settings["num_problems"] = len(plan.given) or plan.num_problems
    settings["headline_seconds"] = settings.pop("headline")
    rows = accuracy_rows(plan, journal)
    record = {"conditions": {**conditions_of(models, command), **settings}, "rows": rows}
    write_record(output / RESULTS, record)
    return record


def run_time_budget(solver: "Solver", journal: Journal, on_problem: Callable[[], None] = lambda: None) -> None:
    """Let every method solve every problem in both ways.

    Args:
        solver (`Solver`): who solves them.
        journal (`Journal`): gets a record for each text; what it holds already is not written again.
        on_problem (`Callable`): called after each problem.
    """
    is_warm = False
    for number, problem in solver.plan.problems():
        if not journal.select(problem=number):
            if not is_warm:
                solver.warm_up(problem)
                is_warm = True
            journal.append(asdict(attempt) for attempt in solver.solve(number, problem))
        on_problem()


def accuracy_rows(plan: Plan, journal: Journal) -> list[dict[str, Any]]:
    """Return the share of right answers of each method, difficulty, strategy and budget.

    Args:
        plan (`Plan`): what was measured.
        journal (`Journal`): with all texts.

    Returns:
        `list[dict]`: `method`, `difficulty`, `strategy`, `budget_seconds`, `accuracy`, `problems`, `seed`.
    """
    grouped: dict[tuple[str, int | str, str], dict[int, list[Attempt]]] = {}
    for record in journal.records:
        attempt = Attempt(**record)
        group = grouped.setdefault((attempt.method, attempt.difficulty, attempt.strategy), {})
        group.setdefault(attempt.problem, []).append(attempt)
    rows = []
    for method, difficulty, strategy in itertools.product(plan.methods, plan.groups, plan.strategies):
        problems = grouped[method.name, difficulty, strategy]
        for budget in plan.budgets:
            num_right = sum(vote(attempts, budget) == attempts[0].expected for attempts in problems.values())
            rows.append(
                {
                    "method": method.name,
                    "difficulty": difficulty,
                    "strategy": strategy,
                    "budget_seconds": budget,
                    "accuracy": num_right / len(problems),
                    "problems": len(problems),
                    "seed": plan.seed,
                }
            )
    return rows


def vote(attempts: list[Attempt], seconds: float) -> str | None:
    """Return what most attempts answer when the time is up; of several equally frequent answers the first one given."""
    answers = Counter(answer for attempt in attempts if (answer := attempt.answer_at(seconds)) is not None)
    return answers.most_common(1)[0][0] if answers else None


def gains(rows: list[dict[str, Any]], headline: float) -> list[dict[str, Any]]:
    """Return what each method gains at one budget, over all difficulties.

    Args:
        rows (`list[dict]`): of `accuracy_rows`.
        headline (`float`): the budget, in seconds.

    Returns:
        `list[dict]`: `strategy`, `method`, `accuracy`, `problems`, and `gain_percent` over plain `generate` (`None` where that
            solves none).
    """
    found = []
    for strategy in dict.fromkeys(row["strategy"] for row in rows):
        chosen = [row for row in rows if row["strategy"] == strategy and row["budget_seconds"] == headline]
        accuracies = {
            method: sum(row["accuracy"] * row["problems"] for row in chosen if row["method"] == method)
            / sum(row["problems"] for row in chosen if row["method"] == method)
            for method in dict.fromkeys(row["method"] for row in chosen)
        }
        plain = next(iter(accuracies.values()))
        problems = sum(row["problems"] for row in chosen) // len(accuracies)
        for method, accuracy in accuracies.items():
            gain = 100 * (accuracy / plain - 1) if plain else None
            row = {"strategy": strategy, "method": method, "accuracy": accuracy, "problems": problems, "gain_percent": gain}
            found.append(row)
    return found


class Solver:
    """All methods at a problem, in both ways, every piece of text with the second it came at.

    Args:
        models (`Models`): who decodes.
        plan (`Plan`): what is measured.
        clock (`Callable[[], float]`): tells the seconds.
    """

    def __init__(self, models: Models, plan: Plan, clock: Clock = time.perf_counter) -> None:
        self.models = models
        self.plan = plan
        self.clock = clock

    def check_budget(self) -> None:
        """Refuse budgets in which nothing can be written.

        Raises:
            ValueError: if the shortest one is shorter than the time to plain decoding's first token.
        """
        _, problem = next(self.plan.problems())
        for _ in range(2):  # the first call allocates
            first = self._write(self.plan.methods[0], problem, {"do_sample": False, "max_new_tokens": 1}).pieces[1][0]
        if self.plan.budgets[0] < first:
            raise ValueError(
                f"`budget` must be longer than {first / FRACTIONS[0]:.3f} s here, got {self.plan.headline}. The curve begins "
                f"at {FRACTIONS[0]:g} of it, which must be enough for one token."
            )

    def warm_up(self, problem: Problem) -> None:
        """Let every method write once in each way, and forget it."""
        ways = {ANSWER: {"do_sample": False}, VOTE: self.plan.sampling}
        for method, strategy in itertools.product(self.plan.methods, self.plan.strategies):
            self._write(method, problem, ways[strategy])

    def solve(self, number: int, problem: Problem) -> list[Attempt]:
        """Return every method's one answer and its sampled attempts, the methods in turn."""
        attempts = []
        if ANSWER in self.plan.strategies:
            attempts += [self._one_answer(method, number, problem) for method in self.plan.methods]
        if VOTE in self.plan.strategies:
            attempts += itertools.chain.from_iterable(self._votes(method, number, problem) for method in self.plan.methods)
        return attempts

    def _write(self, method: Method, problem: Problem, settings: dict[str, Any]) -> Recording:
        """Let a method write, and return what came when."""
        tokenizer, device = self.models.tokenizer, self.models.device
        ids = torch.tensor([encode(tokenizer, problem.prompt)], device=device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        wait(device)
        recording = Recording(clock=self.clock)
        method.decode(self.models, inputs, streamer=recording, **{"max_new_tokens": self.plan.max_new_tokens, **settings})
        return recording

    def _one_answer(self, method: Method, number: int, problem: Problem) -> Attempt:
        """Write one greedy answer and note what it says after each piece."""
        recording = self._write(method, problem, {"do_sample": False})
        answers, tokens = [], []
        num_tokens = sum(len(piece) for _, piece in recording.pieces[1:])
        for _, piece in recording.pieces[1:]:
            tokens += piece
            is_whole = bool(self.plan.given) and len(tokens) == num_tokens
            text = self.models.tokenizer.decode(tokens, skip_special_tokens=True)
            answers.append(self.plan.answer_in(text, is_whole=is_whole))
        times = [when for when, _ in recording.pieces[1:]]
        return Attempt(method.name, ANSWER, problem.difficulty, number, times, answers, problem.answer)

    def _votes(self, method: Method, number: int, problem: Problem) -> list[Attempt]:
        """Sample answers until the longest budget is over."""
        attempts: list[Attempt] = []
        elapsed = 0.0
        while elapsed < self.plan.budgets[-1]:
            torch.manual_seed(1_000 * (self.plan.seed * 10_000 + number) + len(attempts))
            recording = self._write(method, problem, self.plan.sampling)
            elapsed += recording.duration
            text = self.models.tokenizer.decode(recording.tokens_at(recording.duration), skip_special_tokens=True)
            answer = self.plan.answer_in(text, is_whole=True)
            attempts.append(Attempt(method.name, VOTE, problem.difficulty, number, [elapsed], [answer], problem.answer))
        return attempts
