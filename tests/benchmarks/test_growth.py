"""How acceptance grows, from what training runs have logged."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import growth


def write_run(folder: Path, rates: list[float], step: int = 0) -> Path:
    """Write the log of a run that is evaluated every 100 steps of 36 seconds each: an hour."""
    history = []
    for number, rate in enumerate(rates, 1):
        history.append({"step": 100 * number, "loss": 1.0, "seconds_per_step": 36.0, "epoch": number / 2})
        history.append({"step": 100 * number, "eval_tokens_per_round": rate, "epoch": number / 2})
    folder.mkdir(parents=True)
    state = {"global_step": step or 100 * len(rates), "log_history": history}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


def test_runs_are_read_laid_side_by_side_and_drawn(tmp_path: Path) -> None:
    write_run(tmp_path / "small" / "checkpoint-200", [1.2, 1.3])
    write_run(tmp_path / "small" / "checkpoint-300", [1.2, 1.3, 1.25])
    write_run(tmp_path / "large", [1.5, 1.6, 1.7, 1.8, 1.9, 2.0])
    app = typer.Typer()
    app.command()(growth.main)
    arguments = [str(tmp_path / "out"), f"little={tmp_path / 'small'}", f"much={tmp_path / 'large'}"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    points = json.loads((tmp_path / "out" / "growth.json").read_text())["points"]
    assert [(point["run"], point["step"], point["tokens_per_round"]) for point in points[:3]] == [
        ("little", 100, 1.2),
        ("little", 200, 1.3),
        ("little", 300, 1.25),
    ]
    assert [point["hours"] for point in points] == pytest.approx([1, 2, 3, 1, 2, 3, 4, 5, 6])
    table = (tmp_path / "out" / "growth.md").read_text()
    assert "| little | 200 | 1.0 | 2.00 | 1.30 | best |" in table
    assert "| much | 600 | 3.0 | 6.00 | 2.00 | best |" in table
    assert table.count("| much |") == growth.POINTS
    assert (tmp_path / "out" / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_folders_without_runs_or_evaluations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no trainer_state\.json"):
        growth.history_of(tmp_path)
    with pytest.raises(ValueError, match="must have decoded held-out prompts, got none in 'x'"):
        growth.points_of("x", [{"step": 1, "loss": 1.0}])


def test_a_run_whose_steps_were_not_timed_has_no_hours() -> None:
    assert growth.points_of("x", [{"step": 5, "eval_tokens_per_round": 1.5}]) == [
        {"run": "x", "step": 5, "epoch": None, "hours": None, "tokens_per_round": 1.5}
    ]
