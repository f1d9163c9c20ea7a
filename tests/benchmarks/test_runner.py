"""What is timed is real, interrupted runs go on, and what cannot run is said."""

from pathlib import Path

import pytest
import torch

from hf_specdiff.benchmarks import standard
from hf_specdiff.benchmarks.figures import rows_of
from hf_specdiff.benchmarks.journal import LINES
from hf_specdiff.benchmarks.journal import Journal
from hf_specdiff.benchmarks.methods import PLAIN
from hf_specdiff.benchmarks.methods import Method
from hf_specdiff.benchmarks.methods import Models
from hf_specdiff.benchmarks.methods import host_methods
from hf_specdiff.benchmarks.methods import our_methods
from hf_specdiff.benchmarks.methods import ours
from hf_specdiff.benchmarks.runner import Block
from hf_specdiff.benchmarks.runner import run_block
from hf_specdiff.benchmarks.tables import speed_table
from hf_specdiff.benchmarks.tables import time_table

from .conftest import CHAIN
from .conftest import prompts

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


def test_every_method_of_the_standard_set_runs_and_keeps_the_tokens(models: Models) -> None:
    block = Block("math", prompts(1), standard.bundled_methods(models, 0.0, (1, 8)), max_new_tokens=24, num_detailed=1)
    journal = Journal()
    run_block(models, block, journal)
    rows = rows_of(block, models, journal)
    assert [row["method"] for row in rows] == [method.name for method in block.methods]
    for row in rows:
        assert row.keys() >= REQUIRED, row
        assert row["identical"] is True, row["method"]
        assert row["num_tokens"] == 24
        assert row["ratio_low"] is None  # one prompt is no sample
        assert min(row["target_seconds"], row["rest_seconds"]) > 0
        assert 0 < row["share_of_limit"] < 1
        assert row["first_token_seconds"] > 0
        if row["method"] not in (PLAIN, "untrained, auto"):
            # Where the size follows the machine's clock, a busy one may leave drafting be.
            assert row["tokens_per_round"] > 1 or "auto" in row["method"], row["method"]
            # The first token, or more of them, come with the pass over the prompt.
            assert 12 <= sum(size * count for size, count in enumerate(row["histogram"])) <= 23, row["method"]
        if row["loop"] == "hf_specdiff" and not row["method"].startswith("un"):
            assert row["best_to_this"] >= 1
        if row["loop"] == "hf_specdiff":
            assert "auto" in row["method"] or 0 < row["between_share"] < 1
            assert ("perfect_ratio" in row) == ("auto" not in row["method"])
    assert rows[0]["ratio_to_plain"] == 1
    assert rows[0]["drafter_seconds"] == 0  # it has none
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
    kept = Journal(tmp_path / "out", {"a": 1}).records
    assert {(record["kind"], record["batch"]) for record in kept} == {("call", 0), ("call", 1)}
    decoded: list[int] = []
    decode = Method.decode

    def counting(self: Method, models: Models, inputs: dict[str, torch.Tensor], **settings: object) -> object:
        decoded.append(inputs["input_ids"].shape[1])
        return decode(self, models, inputs, **settings)

    monkeypatch.setattr(Method, "decode", counting)
    journal = Journal(tmp_path / "out", {"a": 1})
    run_block(models, block, journal)
    assert journal.records[: len(kept)] == kept
    lengths = [models.tokenizer(text, return_tensors="pt").input_ids.shape[1] for text in block.texts]
    # Both methods: the longest prompt to warm up, the third one, and the first one once more with clocks in the models.
    assert decoded == [length for length in (max(lengths), lengths[2], lengths[0]) for _ in block.methods]
    rows = rows_of(block, models, journal)
    assert [row["num_prompts"] for row in rows] == [3, 3]
    decoded.clear()
    again = Journal(tmp_path / "out", {"a": 1})
    run_block(models, block, again)
    assert not decoded
    assert rows_of(block, models, again) == rows


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


def test_rounds_leave_the_pass_over_the_prompt_out(models: Models) -> None:
    """Its token belongs to no round, in transformers' dflash loop as in ours."""
    block = Block("math", prompts(1), [*host_methods(models, ("features",)), CHAIN], max_new_tokens=20, num_detailed=0)
    journal = Journal()
    run_block(models, block, journal)
    rounds = {call["method"]: call["rounds"] for call in journal.select(kind="call")}
    assert sum(rounds["transformers' dflash loop, features"]) == sum(rounds[CHAIN.name]) == 19
