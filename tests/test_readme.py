"""README.md's blocks run, its commands exist, its figures are those of the results file; so do the examples."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_specdiff.benchmarks.report import demo_section
from hf_specdiff.benchmarks.report import main as report
from hf_specdiff.benchmarks.report import shapes_section
from hf_specdiff.cli import app
from hf_specdiff.demo.cards import KINDS
from hf_specdiff.demo.cards import card_of

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # one of them saves a drafter
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_run_and_keep_the_tokens(path: Path) -> None:
    result = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    assert "same tokens: True" in result.stdout
    assert "False" not in result.stdout


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`?make (\w+)", README)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_result_tables_hold_the_measured_figures() -> None:
    results = ROOT / "benchmarks" / "results"
    demo = json.loads((results / "demo.json").read_text(encoding="utf-8"))
    shapes = json.loads((results / "shapes.json").read_text(encoding="utf-8"))
    assert {row["task"] for row in demo["rows"]} == {"math", "code"}
    assert demo_section(demo) in README
    assert shapes_section(shapes) in README
    for link in re.findall(r"\]\((benchmarks/[^)]+)\)", README):
        assert (ROOT / link).is_file(), link


@pytest.mark.parametrize("kind", KINDS)
def test_model_cards_hold_the_measured_figures(kind: str) -> None:
    shapes = json.loads((ROOT / "benchmarks" / "results" / "shapes.json").read_text(encoding="utf-8"))
    card = (ROOT / "model_cards" / f"{kind}.md").read_text(encoding="utf-8")
    assert card == card_of(kind, shapes)
    row = next(row for row in shapes["rows"] if row["method"] == f"{kind}, chain")
    assert f"{row['ratio_to_plain']:.2f}x" in card


def test_every_command_named_exists() -> None:
    commands = set(re.findall(r"^hf-specdiff (\w+)", README, flags=re.MULTILINE))
    assert commands == {command.name for command in app.registered_commands}


def test_report_replaces_what_stands_between_the_markers(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results -->\nlast year\n<!-- /results -->\nafter\n", encoding="utf-8")
    report(readme)
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- results -->\nThe bundled pair")
    assert text.endswith("<!-- /results -->\nafter\n")
    assert "last year" not in text
    readme.write_text("no markers", encoding="utf-8")
    with pytest.raises(ValueError, match="markers"):
        report(readme)


def test_every_mapped_file_exists() -> None:
    tree = re.search(r"## Map of the repository\n\n```\n(.*?)```", README, flags=re.DOTALL)
    assert tree is not None
    for name in re.findall(r"^  (\w+\.py|\w+/)", tree.group(1), flags=re.MULTILINE):
        assert (ROOT / "hf_specdiff" / name).exists(), name
