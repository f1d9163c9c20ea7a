"""README.md's blocks run, its commands exist, its figures are those of the results file; so do the examples."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run_one_after_the_other() -> None:
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
    rows = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text(encoding="utf-8"))["rows"]
    assert {row["task"] for row in rows} == {"math", "code"}
    for row in rows:
        cells = [
            row["task"],
            row["decoder"],
            f"{row['tokens_per_second']:.0f}",
            f"{row['ratio_to_plain']:.2f}x",
            f"{row['tokens_per_round']:.2f}",
            f"{row['num_identical']}/{row['num_prompts']}",
        ]
        assert f"| {' | '.join(cells)} |" in README


def test_every_mapped_file_exists() -> None:
    tree = re.search(r"## Map of the repository\n\n```\n(.*?)```", README, flags=re.DOTALL)
    assert tree is not None
    for name in re.findall(r"^  (\w+\.py|\w+/)", tree.group(1), flags=re.MULTILINE):
        assert (ROOT / "hf_specdiff" / name).exists(), name
