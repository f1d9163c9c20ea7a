"""README.md's blocks run, its commands exist, its figures are those of the results file; so do the examples."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cards import KINDS
from benchmarks.cards import card_of
from benchmarks.report import SECTIONS
from benchmarks.report import main as report
from hf_specdiff.commands.main import app

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
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


@pytest.mark.parametrize("name", SECTIONS)
def test_result_tables_hold_the_measured_figures(name: str) -> None:
    record = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert f"<!-- {name} -->\n{SECTIONS[name](record)}\n<!-- /{name} -->" in README


def test_linked_results_are_there() -> None:
    for link in re.findall(r"\]\((benchmarks/[^)]+)\)", README):
        assert (ROOT / link).is_file(), link


@pytest.mark.parametrize("kind", KINDS)
def test_model_cards_hold_the_measured_figures(kind: str) -> None:
    record = json.loads((RESULTS / "standard.json").read_text(encoding="utf-8"))
    card = (ROOT / "model_cards" / f"{kind}.md").read_text(encoding="utf-8")
    assert card == card_of(kind, record)
    row = next(row for row in record["rows"] if row["method"] == f"{kind}, chain")
    assert f"{row['ratio_to_plain']:.2f}x" in card


def test_every_command_named_exists() -> None:
    commands = set(re.findall(r"^hf-specdiff (\w+)", README, flags=re.MULTILINE))
    assert commands == {command.name for command in app.registered_commands}


def test_report_replaces_what_stands_between_the_markers(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    readme = tmp_path / "README.md"
    markers = "".join(f"<!-- {name} -->\nlast year\n<!-- /{name} -->\nafter\n" for name in SECTIONS)
    readme.write_text(f"before\n{markers}", encoding="utf-8")
    report(readme)
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- standard -->\n16 held-out prompts")
    assert text.endswith("<!-- /alignment -->\nafter\n")
    assert "last year" not in text
    readme.write_text("no markers", encoding="utf-8")
    with pytest.raises(ValueError, match="markers"):
        report(readme)
