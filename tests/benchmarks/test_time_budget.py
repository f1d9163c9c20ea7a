"""Right answers within a time: answers are read as they stand, votes count what is finished, and runs go on."""

import itertools
import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from hf_specdiff.benchmarks import time_budget
from hf_specdiff.benchmarks.journal import LINES
from hf_specdiff.benchmarks.methods import PLAIN
from hf_specdiff.benchmarks.methods import Method
from hf_specdiff.benchmarks.methods import Models
from hf_specdiff.benchmarks.plots import plot_accuracy
from hf_specdiff.benchmarks.plots import save


def test_answers_are_read_as_far_as_they_are_written() -> None:
    text = " At the start Maya has 12 coins. 12 + 30 = 42 coins. The answer is 42."
    assert time_budget.answer_in(text, is_whole=True) == "42"
    assert time_budget.answer_in(text[:-1], is_whole=True) is None
    assert time_budget.answer_in(" 12 + 30 = 4", is_whole=False) == "30"  # more digits may follow
    assert time_budget.answer_in(" 12 + 30 = 42 ", is_whole=False) == "42"
    assert time_budget.answer_in("none", is_whole=False) is None
    assert time_budget.answer_in(f"{text} Question: 9 + 9. The answer is 18.", is_whole=True) == "42"


def attempt(seconds: list[float], answers: list[str | None], problem: int = 0, method: str = PLAIN) -> time_budget.Attempt:
    return time_budget.Attempt(method, time_budget.VOTE, 2, problem, seconds, answers, "7")


def test_votes_count_what_is_finished() -> None:
    attempts = [attempt([0.1], ["5"]), attempt([0.2], ["7"]), attempt([0.3], ["7"]), attempt([0.4], [None])]
    assert [time_budget.vote(attempts, seconds) for seconds in (0.05, 0.15, 0.25, 0.35, 9.0)] == [None, "5", "5", "7", "7"]


def test_gains_are_stated_against_plain_decoding() -> None:
    rows = [
        {"method": method, "difficulty": 2, "strategy": strategy, "budget_seconds": budget, "accuracy": accuracy, "problems": 4}
        for strategy in (time_budget.ANSWER, time_budget.VOTE)
        for method, budget, accuracy in ((PLAIN, 1.0, 0.5), (PLAIN, 2.0, 1.0), ("fast", 1.0, 0.75), ("fast", 2.0, 1.0))
    ]
    found = [(gain["method"], gain["accuracy"], gain["gain_percent"]) for gain in time_budget.gains(rows, 1.0)]
    assert found == [(PLAIN, 0.5, 0.0), ("fast", 0.75, 50.0)] * 2


class WorkClock:
    """Seconds by counted work: each pass of the target takes a fiftieth, whatever the machine does besides."""

    def __init__(self, target: torch.nn.Module) -> None:
        self.num_passes = 0
        self.hook = target.register_forward_hook(self.count)

    def count(self, *arguments: object) -> None:
        self.num_passes += 1

    def __call__(self) -> float:
        return 0.02 * self.num_passes


@pytest.fixture
def work_clock(models: Models) -> Iterator[WorkClock]:
    clock = WorkClock(models.target)
    yield clock
    clock.hook.remove()


def test_accuracy_within_a_time_is_measured_and_resumed(
    models: Models, work_clock: WorkClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = time_budget.Plan(
        time_budget.scaling_methods(models, ("features",)),
        headline=0.12,
        difficulties=(2, 3),
        num_problems=1,
        max_new_tokens=64,
    )
    record = time_budget.benchmark_time_budget(models, plan, tmp_path / "out", {}, "command", work_clock)
    rows = record["rows"]
    assert len(rows) == 3 * 2 * 2 * len(time_budget.FRACTIONS)
    for row in rows:
        assert {"method", "difficulty", "strategy", "budget_seconds", "accuracy", "problems", "seed"} == row.keys()
        assert row["accuracy"] in (0.0, 1.0)
    assert record["conditions"]["headline_seconds"] == 0.12
    assert save(plot_accuracy(rows), tmp_path / "time_budget.png").is_file()
    lines = [json.loads(line) for line in (tmp_path / "out" / LINES).read_text().splitlines()]
    attempts = [time_budget.Attempt(**fields) for line in lines for fields in line]
    # Greedy answers are the same text, so whatever is right in the end is right for every method.
    greedy = [attempt for attempt in attempts if attempt.strategy == time_budget.ANSWER]
    assert len({(attempt.problem, attempt.answers[-1]) for attempt in greedy}) == 2
    # Plain decoding writes a token a pass; a drafter's passes are free here, so it is through in less than half the time.
    for problem in (0, 1):
        plain, chain, _ = [attempt.seconds for attempt in greedy if attempt.problem == problem]
        assert plain == pytest.approx([0.02 * (number + 1) for number in range(len(plain))])
        assert chain[-1] < plain[-1] / 2
    # Attempts are sampled until the last budget is over, and the one that goes beyond it is the last.
    for method, problem in itertools.product(plan.methods, (0, 1)):
        own = [a for a in attempts if (a.strategy, a.method, a.problem) == (time_budget.VOTE, method.name, problem)]
        assert own[-1].seconds[0] >= plan.budgets[-1]
        assert all(attempt.seconds[0] < plan.budgets[-1] for attempt in own[:-1])
    monkeypatch.setattr(time_budget.Solver, "solve", lambda *arguments: pytest.fail("solved again"))
    assert time_budget.benchmark_time_budget(models, plan, tmp_path / "out", {}, "command", work_clock)["rows"] == rows


def test_a_budget_without_time_for_a_token_is_refused(models: Models, work_clock: WorkClock) -> None:
    """The curve begins at a fifth of the budget, and a token takes a fiftieth of a second: less than 0.1 s is too little."""
    for headline, is_enough in ((0.099, False), (0.101, True)):
        solver = time_budget.Solver(models, time_budget.Plan([Method(PLAIN, {})], headline=headline), work_clock)
        with nullcontext() if is_enough else pytest.raises(ValueError, match=r"`budget` must be longer than 0\.100 s"):
            solver.check_budget()


def test_any_budget_has_its_gain() -> None:
    plan = time_budget.Plan([], headline=0.33333)
    assert plan.headline in plan.budgets
