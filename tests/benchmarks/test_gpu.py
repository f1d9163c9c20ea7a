"""The GPU's benchmark, on the CPU: a pair is made and measured, nothing is done twice, a machine without a GPU is refused."""

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import LlamaForCausalLM
from transformers import TrainerControl
from transformers import TrainerState
from typer.testing import CliRunner

from benchmarks import gpu
from benchmarks import pair
from hf_specdiff.benchmarks import methods
from hf_specdiff.benchmarks import standard
from hf_specdiff.benchmarks.clocks import PassClock
from hf_specdiff.benchmarks.methods import PLAIN
from hf_specdiff.benchmarks.methods import PLAIN_COMPILED
from hf_specdiff.benchmarks.methods import Method
from hf_specdiff.commands.main import app

from .conftest import traced_only

# Under autocast a norm's weights are float32 and what it reads is not.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
CPU = torch.device("cpu")


def never(*arguments: Any, **settings: Any) -> None:
    pytest.fail("done again")


def plain_and_chains(eager: list[Method]) -> list[Method]:
    """Run the host's methods and two of ours, and compile a chain: the others run in the tests of the runner."""
    ours = (", chain", ", chain by block", ", auto")
    return methods.with_compiled([method for method in eager if not method.is_ours or method.name.endswith(ours)])


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A dry run that was interrupted when the drafter was to be trained, and went on."""
    folder = tmp_path_factory.mktemp("gpu") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(methods, "compile_config", traced_only)
        patch.setattr(standard, "with_compiled", plain_and_chains)
        with pytest.MonkeyPatch.context() as interruption:
            interruption.setattr(pair, "fit_drafter", lambda *arguments, **settings: False)
            with pytest.raises(typer.Exit):
                gpu.main(folder, dry_run=True)
        assert not (folder / "gpu.json").exists()
        patch.setattr(pair, "train_language_model", never)
        gpu.main(folder, dry_run=True)
        yield folder


def test_the_target_has_at_least_100_million_parameters() -> None:
    with torch.device("meta"):
        target, tiny = LlamaForCausalLM(pair.FULL.config), LlamaForCausalLM(pair.TINY.config)
    assert 100e6 < target.num_parameters() < 120e6
    assert tiny.num_parameters() < 1e6


def test_figures_of_both_loops_come_of_a_dry_run(output: Path) -> None:
    record = json.loads((output / "gpu.json").read_text())
    rows = record["rows"]
    assert {row["loop"] for row in rows if "refusal" not in row} - {"dflash"} == {"transformers", "hf_specdiff"}
    assert {(row["task"], row["temperature"], row["batch_size"]) for row in rows} == {
        (task, temperature, size) for task in ("math", "code") for temperature in (0.0, 1.0) for size in (1, 8)
    }
    assert not [row["refusal"] for row in rows if row["loop"] == "hf_specdiff" and "refusal" in row]
    compiled = [row for row in rows if row["method"].endswith(", compiled")]
    assert {(row["task"], row["temperature"], row["batch_size"]) for row in compiled} == {
        (row["task"], row["temperature"], row["batch_size"]) for row in rows
    }
    assert all(row["ratio_to_eager"] > 0 and row["first_call_seconds"] > 0 for row in compiled)
    assert record["conditions"]["dtype"] == "bfloat16"
    assert str(output) not in json.dumps(record)
    made = record["pair"]
    assert made["target_parameters"] == LlamaForCausalLM(pair.TINY.config).num_parameters()
    seconds = made["seconds"]
    assert all(value > 0 for value in seconds.values())
    assert seconds["whole"] >= seconds["target"] + seconds["text"] + seconds["drafter"]
    assert record["rows"] == json.loads((output / "bench" / "results.json").read_text())["rows"]


def test_what_was_settled_before_an_interruption_is_kept(output: Path) -> None:
    records = [record for line in (output / "journal.jsonl").read_text().splitlines() for record in json.loads(line)]
    settled = [record["stage"] for record in records if record["kind"] == pair.EXTENT]
    assert settled == [pair.TARGET, pair.TEXT, pair.DRAFTER]
    assert {path.name for path in output.iterdir()} == {
        "target", "texts", "drafter", "bench", "gpu.json", "settings.json", "journal.jsonl"
    }  # fmt: skip
    assert not [folder for name in ("target", "drafter") if (folder := output / name / "work").exists()]


def test_finished_stages_are_skipped(output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads((output / "gpu.json").read_text())
    for owner, name in ((pair, "make_target"), (pair, "make_drafter"), (Method, "decode")):
        monkeypatch.setattr(owner, name, never)
    gpu.main(output, dry_run=True)
    after = json.loads((output / "gpu.json").read_text())
    assert (after["rows"], after["pair"]) == (before["rows"], before["pair"])
    printed = capsys.readouterr().out
    assert gpu.bench_command(output) in printed
    assert f"Of all greedy outputs {100 * gpu.share_identical(after['rows']):.1f} % are" in printed


def test_a_folder_of_a_run_with_other_settings_is_refused(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "find_device", lambda *, is_dry_run: CPU)
    with pytest.raises(ValueError, match="where minutes, size differ"):
        gpu.main(output)


def test_the_command_that_is_printed_takes_the_pair(output: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(output, tmp_path / "a pair")
    program, *arguments = shlex.split(gpu.bench_command(copy))
    assert program == "hf-specdiff"
    few = ["--num-prompts", "1", "--max-new-tokens", "4", "--temperature", "0", "--method", "chain"]
    result = CliRunner().invoke(app, [*arguments, *few])
    assert result.exit_code == 0, result.output
    record = json.loads((copy / "again" / "results.json").read_text())
    names = {PLAIN, PLAIN_COMPILED, "drafter, chain", "drafter, chain, compiled"}
    assert {row["method"] for row in record["rows"]} == names
    assert {row["batch_size"] for row in record["rows"]} == {1, 8}
    assert record["conditions"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("count", "has_bfloat16", "words"),
    [(0, False, "got none. Pass --dry-run"), (2, True, "must be one GPU, got 2"), (1, False, "must compute in bfloat16")],
)
def test_unfit_machines_are_refused(
    count: int, has_bfloat16: bool, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpus(monkeypatch, count, has_bfloat16)
    with pytest.raises(ValueError, match=words):
        gpu.main(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_takes_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 1, True)
    assert gpu.find_device(is_dry_run=True) == gpu.find_device(is_dry_run=False) == torch.device("cuda", 0)
    gpus(monkeypatch, 0, False)
    assert gpu.find_device(is_dry_run=True) == CPU


def gpus(monkeypatch: pytest.MonkeyPatch, count: int, has_bfloat16: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bfloat16)


def test_the_timer_times_the_steps_after_the_first_and_keeps_nothing() -> None:
    state, control = TrainerState(), TrainerControl(should_save=True)
    seconds = {10: 100.0, 40: 106.0}
    timer = pair.StepTimer(pair.FULL, CPU, lambda: seconds[state.global_step])
    assert (timer.first, timer.last) == (10, 40)
    for step in range(1, 41):
        assert not control.should_training_stop
        state.global_step = step
        timer.on_step_end(None, state, control)
    assert control.should_training_stop
    assert not control.should_save
    assert timer.seconds_per_step == pytest.approx(0.2)


def test_as_many_steps_are_trained_as_fit_into_the_minutes(tmp_path: Path) -> None:
    job = pair.Job(tmp_path, pair.Journal(tmp_path / "journal", {}), pair.FULL, {pair.TARGET: 2.0}, CPU)
    calls = []

    def train(num_steps: int, folder: Path, callbacks: list[pair.StepTimer]) -> None:
        calls.append((num_steps, folder))
        (folder / "work").mkdir(parents=True)
        for timer in callbacks:
            timer.seconds_per_step = 0.25

    pair.train_in_time(job, pair.TARGET, train)
    assert calls[1:] == [(480, tmp_path / "target")]
    assert calls[0][0] > pair.FULL.num_untimed_steps + pair.FULL.num_timed_steps  # the timer ends the run, not the schedule
    assert not calls[0][1].exists()


def test_the_share_counts_greedy_outputs_of_other_methods_than_plain_generate() -> None:
    rows = [
        {"temperature": 0.0, "method": PLAIN, "num_identical": 4, "num_prompts": 4},
        {"temperature": 0.0, "method": "chain", "num_identical": 3, "num_prompts": 4},
        {"temperature": 0.0, "method": "tree", "num_identical": 4, "num_prompts": 4},
        {"temperature": 0.0, "method": "broken", "refusal": "for a reason"},
        {"temperature": 1.0, "method": "chain", "num_identical": 0, "num_prompts": 4},
    ]
    assert gpu.share_identical(rows) == 7 / 8


def test_on_a_gpu_a_pass_takes_the_time_between_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events are stamped when the queue of the modules' own device comes to them, here every 5 ms."""
    stamps = iter(range(0, 100, 5))

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            assert stream == "stream of cuda:1"
            self.when = next(stamps)

        def elapsed_time(self, end: "Event") -> float:
            assert waited
            return end.when - self.when

    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    module = torch.nn.Identity()
    with PassClock([module], torch.device("cuda", 1)) as clock:
        module(torch.zeros(1))
        module(torch.zeros(1))
        assert not waited
    assert clock.passes_of(module) == pytest.approx([0.005, 0.005])
