"""The benchmark: what it times is real, what it counts adds up, interrupted runs go on, and what cannot run is said."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import hf_specdiff
from hf_specdiff.benchmarks import runner
from hf_specdiff.benchmarks import standard
from hf_specdiff.benchmarks import time_budget
from hf_specdiff.benchmarks.clocks import PassClock
from hf_specdiff.benchmarks.clocks import PeakMemory
from hf_specdiff.benchmarks.clocks import Recording
from hf_specdiff.benchmarks.figures import _acceptance
from hf_specdiff.benchmarks.figures import _times
from hf_specdiff.benchmarks.figures import rows_of
from hf_specdiff.benchmarks.figures import share_interval
from hf_specdiff.benchmarks.figures import speed_ratio
from hf_specdiff.benchmarks.journal import LINES
from hf_specdiff.benchmarks.journal import Journal
from hf_specdiff.benchmarks.methods import PLAIN
from hf_specdiff.benchmarks.methods import Method
from hf_specdiff.benchmarks.methods import Models
from hf_specdiff.benchmarks.methods import host_methods
from hf_specdiff.benchmarks.methods import our_methods
from hf_specdiff.benchmarks.methods import ours
from hf_specdiff.benchmarks.plots import plot_accuracy
from hf_specdiff.benchmarks.plots import plot_all
from hf_specdiff.benchmarks.plots import save
from hf_specdiff.benchmarks.runner import Block
from hf_specdiff.benchmarks.runner import Call
from hf_specdiff.benchmarks.runner import Detail
from hf_specdiff.benchmarks.runner import run_block
from hf_specdiff.benchmarks.tables import speed_table
from hf_specdiff.benchmarks.tables import time_table
from hf_specdiff.commands.main import app
from hf_specdiff.commands.main import main
from hf_specdiff.core import profiling
from hf_specdiff.core.budget import Profile
from hf_specdiff.demo.bundle import PAIR

REQUIRED = {
    "task",
    "method",
    "temperature",
    "batch_size",
    "tokens_per_second",
    "ratio_to_plain",
    "ratio_low",
    "ratio_high",
    "tokens_per_round",
    "identical",
}
CHAIN = ours("features", "chain", draft_shape="chain")


@pytest.fixture(scope="module")
def models() -> Models:
    return standard.bundled_models()


def prompts(count: int, task: str = "math") -> list[str]:
    return [str(record["prompt"]) for record in hf_specdiff.load_prompts(task)[:count]]


def call_of(seconds: float, num_tokens: int) -> Call:
    return Call("b", "m", 0, seconds, num_tokens, 1, 1, [], [], [], [])


def test_every_method_of_the_standard_set_runs_and_keeps_the_tokens(models: Models) -> None:
    block = Block("math", prompts(2), standard.bundled_methods(models, 0.0, (1, 8)), max_new_tokens=24, num_detailed=1)
    journal = Journal()
    run_block(models, block, journal)
    rows = rows_of(block, models, journal)
    assert [row["method"] for row in rows] == [method.name for method in block.methods]
    for row in rows:
        assert row.keys() >= REQUIRED, row
        assert row["identical"] is True, row["method"]
        assert row["num_tokens"] == 48
        assert row["ratio_low"] is None  # two prompts are no sample
        assert min(row["target_seconds"], row["rest_seconds"]) > 0
        assert 0 < row["share_of_limit"] < 1
        assert row["first_token_seconds"] > 0
        if row["method"] not in (PLAIN, "untrained, auto"):
            assert row["tokens_per_round"] > 1, row["method"]
            # The first token, or more of them, come with the pass over the prompt.
            assert 24 <= sum(size * count for size, count in enumerate(row["histogram"])) <= 46, row["method"]
        if row["loop"] == "hf_specdiff" and not row["method"].startswith("un"):
            assert row["best_to_this"] >= 1
        if row["loop"] == "hf_specdiff":
            assert 0 < row["between_share"] < 0.9
            assert ("perfect_ratio" in row) == ("auto" not in row["method"])
    assert rows[0]["ratio_to_plain"] == 1
    assert rows[0]["drafter_seconds"] == pytest.approx(0, abs=1e-4)  # it has none; two clocks are not quite one
    assert all(row["drafter_seconds"] > 0 for row in rows[2:] if row["method"] != "untrained, auto")


def test_every_sampling_method_runs(models: Models) -> None:
    methods = [*host_methods(models, ("features", "tokens")), *our_methods("features", 1.0)]
    block = Block("math", prompts(1), methods, max_new_tokens=12, temperature=1.0, num_detailed=0)
    journal = Journal()
    run_block(models, block, journal)
    for row in rows_of(block, models, journal):
        assert row["identical"] is None
        assert row["num_tokens"] == 12
        rule = row["arguments"].get("acceptance")
        assert rule is None or row["shape_and_rule"][1] == rule


def test_batches_are_compared_row_by_row_and_the_hosts_loops_say_why_not(models: Models) -> None:
    """Transformers' assisted loops take one sequence: the table says so, and the others are compared all the same."""
    methods = [*host_methods(models, ("features",)), CHAIN]
    block = Block("math", prompts(3), methods, max_new_tokens=16, batch_size=2, num_detailed=1)
    journal = Journal()
    run_block(models, block, journal)
    rows = {row["method"]: row for row in rows_of(block, models, journal)}
    assert rows[CHAIN.name]["num_identical"] == rows[CHAIN.name]["num_prompts"] == 3
    assert rows[CHAIN.name]["first_token_seconds"] is None
    assert "perfect_ratio" not in rows[CHAIN.name]
    refused = [name for name, row in rows.items() if "refusal" in row]
    assert refused == ["transformers, prompt lookup", "transformers, AR assistant", "transformers' dflash loop, features"]
    table = speed_table(list(rows.values()))
    assert table.count("cannot run: ") == 3
    assert "batch" in rows[refused[0]]["refusal"]
    assert time_table(list(rows.values())).count("\n") == 3


def test_an_output_that_differs_is_counted(models: Models) -> None:
    """The control of `identical`: a method that forbids a token of plain decoding's must not pass."""
    ids = models.tokenizer(prompts(1), return_tensors="pt").input_ids
    first = int(models.target.generate(ids, do_sample=False, max_new_tokens=1)[0, -1])
    other = ours("features", "other", draft_shape="chain", suppress_tokens=[first])
    block = Block("math", prompts(1), [Method(PLAIN, {}), CHAIN, other], max_new_tokens=8, num_detailed=0)
    journal = Journal()
    run_block(models, block, journal)
    assert [row["identical"] for row in rows_of(block, models, journal)] == [True, True, False]


def test_a_method_that_raises_is_noted_and_plain_decoding_must_run(models: Models) -> None:
    broken = ours("features", "broken", gamma=99)
    block = Block("math", prompts(1), [Method(PLAIN, {}), broken], max_new_tokens=4)
    journal = Journal()
    run_block(models, block, journal)
    assert "`gamma`" in rows_of(block, models, journal)[1]["refusal"]
    with pytest.raises(ValueError, match="no_such_argument"):
        run_block(models, Block("math", prompts(1), [Method(PLAIN, {"no_such_argument": 1})], max_new_tokens=4), Journal())


def test_an_interrupted_run_goes_on_where_it_was(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = Block("math", prompts(3), [Method(PLAIN, {}), CHAIN], max_new_tokens=6, num_detailed=1)
    seen = []

    def stop_at_the_second() -> None:
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_block(models, block, Journal(tmp_path / "out", {"a": 1}), stop_at_the_second)
    with (tmp_path / "out" / LINES).open("a") as file:
        file.write('[{"kind": "call", "block": "half a li')  # what a kill in the middle of a write leaves
    journal = Journal(tmp_path / "out", {"a": 1})
    timed: list[int] = []
    calls = runner._calls
    monkeypatch.setattr(runner, "_calls", lambda *arguments: timed.append(arguments[3]) or calls(*arguments))
    run_block(models, block, journal)
    assert timed == [2]
    rows = rows_of(block, models, journal)
    assert [row["num_prompts"] for row in rows] == [3, 3]
    again = Journal(tmp_path / "out", {"a": 1})
    run_block(models, block, again)
    assert timed == [2]
    assert rows_of(block, models, again) == rows


def test_folders_of_other_runs_are_refused(tmp_path: Path) -> None:
    Journal(tmp_path / "a", {"seed": 1, "x": 2})
    with pytest.raises(ValueError, match="where seed differs"):
        Journal(tmp_path / "a", {"seed": 2, "x": 2})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        Journal(tmp_path / "b", {})
    with pytest.raises(ValueError, match="which is a file"):
        Journal(tmp_path / "b" / "thesis.txt", {})


def test_the_interval_is_that_of_paired_prompts() -> None:
    """Prompts differ tenfold in length, but one method is twice as fast on each: the interval must not be wide."""
    plain = [call_of(seconds, 100) for seconds in (1.0, 10.0, 5.0, 2.0, 4.0)]
    steady = speed_ratio([call_of(call.seconds / 2, 100) for call in plain], plain)
    assert (steady.value, steady.low, steady.high) == pytest.approx((2, 2, 2))
    shaky = speed_ratio([call_of(seconds, 100) for seconds in (1.0, 2.5, 5.0, 1.0, 2.0)], plain)
    assert shaky.low is not None
    assert shaky.high is not None
    assert 1 <= shaky.low < shaky.value < shaky.high <= 4
    assert shaky.value == pytest.approx(22 / 11.5)
    assert speed_ratio(plain[:4], plain[:4]).low is None


def test_the_clock_counts_a_pass_inside_a_pass_once() -> None:
    class Slow(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.01)
            return x

    outer = torch.nn.Sequential(Slow(), Slow())
    with PassClock([outer, outer[0]], torch.device("cpu")) as clock:
        outer(torch.zeros(1))
        outer[0](torch.zeros(1))
    both, single = clock.passes
    assert both >= 0.02
    assert 0.01 <= single < both
    outer(torch.zeros(1))
    assert len(clock.passes) == 2


def test_peak_memory_sees_what_is_freed_again() -> None:
    with PeakMemory(torch.device("cpu")) as memory:
        torch.ones(64_000_000, dtype=torch.uint8).sum()
    if memory.num_bytes is None:
        pytest.skip("this kernel does not count")
    assert 60_000_000 < memory.num_bytes < 1_000_000_000


def test_recordings_tell_what_was_there_when() -> None:
    recording = Recording()
    for piece in ([1, 2, 3], [4], [5, 6]):
        recording.put(torch.tensor([piece]))
        time.sleep(0.005)
    assert recording.tokens_at(recording.duration) == [4, 5, 6]
    assert recording.tokens_at(recording.pieces[1][0]) == [4]
    assert recording.sizes == [1, 2]


def test_the_command_writes_figures_table_and_pictures(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts(2)))
    output = tmp_path / "out"
    arguments = ["bench", str(PAIR / "target"), str(PAIR / "tokens"), "--output", str(output), "--prompts-file", str(file)]
    arguments += ["--max-new-tokens", "8", "--assistant", str(PAIR / "autoregressive"), "--method", "tokens", "--seed", "3"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    record = json.loads((output / "results.json").read_text())
    assert {"torch", "transformers", "commit", "machine", "threads", "command", "dtype"} <= record["conditions"].keys()
    assert {row["task"] for row in record["rows"]} == {"mine"}
    assert {row["temperature"] for row in record["rows"]} == {0.0, 1.0}
    names = {row["method"] for row in record["rows"]}
    assert {PLAIN, "transformers, tokens", "tokens, chain", "tokens, auto"} <= names
    assert "transformers, AR assistant" not in names  # no part of its name was asked for
    assert "tokens, tree of 15" in (output / "table.md").read_text()
    assert {path.name for path in output.glob("*.png")} == {"ratio.png", "rounds.png", "acceptance.png", "time.png", "cost.png"}
    for path in output.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert record["profile"]["sizes"][0] == 1
    figures = (output / "results.json").read_text()
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0, again.output
    assert json.loads((output / "results.json").read_text())["rows"] == json.loads(figures)["rows"]
    refused = CliRunner().invoke(app, [*arguments[:-1], "4"])
    assert "where seed differs" in str(refused.exception)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--temperature", "-1"], "`temperature` must be at least 0"),
        (["--batch-size", "0"], "`batch_size` must be at least 1"),
        (["--method", "eagle"], "`method` must be part of a method's name"),
        (["--max-new-tokens", "1000"], "1024 positions free"),
        (["--budget", "1"], "`--budget` must come with"),
        (["--dtype", "bfloat16"], "must come with a target"),
        (["--time-budget", "--budget", "0.001"], "`budget` must be longer"),
        (["--time-budget", "--budget", "0"], "`budget` must be longer"),
        (["--time-budget", "--method", "auto"], "must stand without"),
        (["--assistant", "x"], "`--assistant` must come with a target"),
        (["--method", "chain", "--method", "eagle"], "got 'eagle'"),
        ([str(PAIR / "target"), str(PAIR / "autoregressive")], "must be SpecDiffDrafters"),
        ([str(PAIR / "target")], "`drafters` must be given"),
        ([str(PAIR / "target"), str(PAIR / "tokens"), str(PAIR / "tokens")], "different last parts"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["hf-specdiff", "bench", "--output", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit) as error:
        main()
    assert error.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_pictures_need_no_samples_and_no_profile(models: Models, tmp_path: Path) -> None:
    block = Block("math", prompts(1), [Method(PLAIN, {}), CHAIN], max_new_tokens=6)
    journal = Journal()
    run_block(models, block, journal)
    paths = plot_all({"rows": rows_of(block, models, journal), "profile": None}, tmp_path)
    assert {path.name for path in paths} == {"ratio.png", "rounds.png", "acceptance.png", "time.png"}


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


def test_accuracy_within_a_time_is_measured_and_resumed(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = time_budget.Plan(
        time_budget.scaling_methods(("features",)), headline=0.2, difficulties=(2, 3), num_problems=1, max_new_tokens=200
    )
    record = time_budget.benchmark_time_budget(models, plan, tmp_path / "out", {}, "command")
    rows = record["rows"]
    assert len(rows) == 3 * 2 * 2 * len(time_budget.FRACTIONS)
    for row in rows:
        assert {"method", "difficulty", "strategy", "budget_seconds", "accuracy", "problems", "seed"} == row.keys()
        assert row["accuracy"] in (0.0, 1.0)
    assert record["conditions"]["headline_seconds"] == 0.2
    assert save(plot_accuracy(rows), tmp_path / "time_budget.png").is_file()
    # Greedy answers are the same text, so whatever is right in the end is right for every method.
    lines = [json.loads(line) for line in (tmp_path / "out" / LINES).read_text().splitlines()]
    answers: dict[int, set[str]] = {}
    for written in (text for line in lines for text in line if text["strategy"] == time_budget.ANSWER):
        answers.setdefault(written["problem"], set()).add(written["answers"][-1])
    assert all(len(found) == 1 for found in answers.values())
    monkeypatch.setattr(time_budget, "_votes", lambda *arguments: pytest.fail("solved again"))
    assert time_budget.benchmark_time_budget(models, plan, tmp_path / "out", {}, "command")["rows"] == rows


@pytest.mark.parametrize("turn", [1, 2, 4])
def test_a_method_that_fails_later_is_out_for_good_and_the_others_finish(
    models: Models, turn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt too long for one method must not cost the whole benchmark; that it runs the next time changes nothing."""
    decode = Method.decode
    count = 0

    def fails_once(self: Method, *arguments: object, **settings: object) -> object:
        nonlocal count
        if self is CHAIN:
            count += 1
            if count == turn:
                raise RuntimeError("out of memory")
        return decode(self, *arguments, **settings)

    monkeypatch.setattr(Method, "decode", fails_once)
    block = Block("math", prompts(2), [Method(PLAIN, {}), CHAIN], max_new_tokens=4, num_detailed=1)
    journal = Journal()
    run_block(models, block, journal)
    plain, chain = rows_of(block, models, journal)
    assert plain["num_prompts"] == 2
    assert chain["refusal"] == "out of memory"
    run_block(models, block, journal)
    assert rows_of(block, models, journal)[1] == chain


def test_a_drafter_that_does_not_fit_is_in_the_table(tmp_path: Path) -> None:
    target, drafter, tokenizer = hf_specdiff.load_demo()
    drafter.config.target_layer_ids = [0, 1, 2, 99]
    extent = standard.Extent({"any": prompts(1)}, {"any": 4}, temperatures=(0.0,), words=("chain",))
    record = standard.benchmark(Models(target, tokenizer, {"mine": drafter}), extent, tmp_path / "out", {}, "command")
    assert "`target_layer_ids`" in record["rows"][1]["refusal"]
    assert record["profile"] is None


def test_figures_of_times_are_those_worked_out_by_hand() -> None:
    """Two calls of 10 s and 6 s: prefill 1 s each, 4 + 2 passes of 1 s, drafter 2 s and 1 s."""
    common = {"block": "b", "method": "m", "batch": 0, "prefill_seconds": 1.0, "num_tokens": 17, "peak_bytes": 5}
    one = {"seconds": 10, "target_seconds": 4, "drafter_seconds": 2, "rest_seconds": 3, "loop_seconds": 8, "num_rounds": 4}
    two = {"seconds": 6, "target_seconds": 2, "drafter_seconds": 1, "rest_seconds": 2, "loop_seconds": 5, "num_rounds": 2}
    details = [Detail(**common, **one, first_token_seconds=2), Detail(**common, **two, first_token_seconds=1)]
    found = _times(details, [replace(detail, seconds=20) for detail in details], window=8)
    assert found["target_seconds"] == 1
    assert found["drafter_seconds"] == 0.5
    assert found["rest_seconds"] == pytest.approx(5 / 6)
    assert found["between_share"] == pytest.approx((13 - 11) / (13 - 2))  # loops of 13 s, passes of 11 s, prefill of 2 s
    assert found["first_token_seconds"] == 1.5
    assert found["share_of_limit"] == 8 / 16
    assert found["limit_ratio"] == 40 / 8
    assert found["perfect_ratio"] == 40 / (2 + 2 + 2)  # 16 tokens after the first: two rounds of eight in each call


def test_acceptance_counts_the_drafts_that_reach_a_position() -> None:
    assert _acceptance([1, 3, 4], [3, 3, 2]) == pytest.approx([2 / 3, 2 / 3, 0.0])
    assert _acceptance([], []) == []


def test_rounds_leave_the_pass_over_the_prompt_out(models: Models) -> None:
    """Its token belongs to no round, in transformers' dflash loop as in ours."""
    block = Block("math", prompts(1), [*host_methods(models, ("features",)), CHAIN], max_new_tokens=40, num_detailed=0)
    journal = Journal()
    run_block(models, block, journal)
    rounds = {call["method"]: call["rounds"] for call in journal.select(kind="call")}
    assert sum(rounds["transformers' dflash loop, features"]) == sum(rounds[CHAIN.name]) == 39


def test_standard_blocks_have_names_of_their_own(models: Models) -> None:
    extent = standard.Extent({"math": prompts(2), "code": prompts(2, "code")}, {"math": 8, "code": 8})
    for sizes in ((1,), (1, 8)):
        blocks = standard.blocks_of(models, replace(extent, batch_sizes=sizes), is_standard=True)
        names = [block.name for block in blocks]
        assert len(set(names)) == len(names)
        assert "math, temperature 0.0, batch 8" in names


def test_profiles_of_a_benchmark_are_its_own(tmp_path: Path) -> None:
    before = profiling.cache_folder()
    profiling._KNOWN["mine"] = Profile([1, 2], [0.1, 0.2], 0.1)
    with profiling.isolated_profiles(tmp_path):
        assert profiling.cache_folder() == tmp_path / "profiles"
        assert "mine" not in profiling._KNOWN
        profiling._KNOWN["other"] = Profile([1, 2], [0.1, 0.2], 0.1)
    assert profiling.cache_folder() == before
    assert profiling._KNOWN.pop("mine")
    assert "other" not in profiling._KNOWN


def test_a_shares_interval_is_wilsons() -> None:
    assert share_interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    low, high = share_interval(1.0, 10)
    assert low == pytest.approx(0.7225, abs=1e-4)
    assert high == 1


def test_any_budget_has_its_gain() -> None:
    plan = time_budget.Plan([], headline=0.33333)
    assert plan.headline in plan.budgets
