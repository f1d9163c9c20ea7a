"""The documentation's tables hold the measured figures and no others."""

import json
import shlex
import shutil
from pathlib import Path

import pytest

from benchmarks.report import PAGES
from benchmarks.report import RESULTS
from benchmarks.report import SUMMARY
from benchmarks.report import main as report
from benchmarks.report import read_record
from benchmarks.report import row_of
from benchmarks.report import section_of
from benchmarks.report import summary_section

ROOT = Path(__file__).parents[2]
SECTIONS = [(page, name) for page, sections in PAGES.items() for name in sections]


@pytest.mark.parametrize(("page", "name"), SECTIONS)
def test_tables_hold_the_measured_figures(page: str, name: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert f"<!-- {name} -->\n{section_of(ROOT, page, name)}\n<!-- /{name} -->" in text


def test_the_readme_shows_where_drafting_does_not_pay() -> None:
    rows = [row_of(read_record(ROOT, "standard")["rows"], *key) for key in SUMMARY]
    assert len(rows) == 10
    assert sum(row["ratio_to_plain"] < 1 for row in rows if row["loop"] == "hf_specdiff") == 2


def test_rows_that_were_not_measured_are_asked_for() -> None:
    record = read_record(ROOT, "standard")
    rows = [row for row in record["rows"] if row["method"] != "features, tree of 15 with copies"]
    with pytest.raises(ValueError, match="must hold one measured row"):
        summary_section({**record, "rows": rows}, None)


def test_report_replaces_what_stands_between_the_markers(tmp_path: Path) -> None:
    shutil.copytree(ROOT / RESULTS, tmp_path / RESULTS)
    (tmp_path / "docs").mkdir()
    for page, sections in PAGES.items():
        markers = "".join(f"<!-- {name} -->\nlast year\n<!-- /{name} -->\nafter\n" for name in sections)
        (tmp_path / page).write_text(f"before\n{markers}", encoding="utf-8")
    report(tmp_path)
    for page, sections in PAGES.items():
        text = (tmp_path / page).read_text(encoding="utf-8")
        assert text.startswith(f"before\n<!-- {next(iter(sections))} -->\n")
        assert text.endswith("-->\nafter\n")
        assert "last year" not in text
    (tmp_path / "README.md").write_text("no markers", encoding="utf-8")
    with pytest.raises(ValueError, match="markers"):
        report(tmp_path)


def test_compiled_passes_are_worth_the_wait() -> None:
    rows = {row["method"]: row for row in read_record(ROOT, "compiled")["rows"]}
    for name in ("features, chain, compiled", "features, tree of 15, compiled"):
        assert rows[name]["ratio_to_eager"] >= 1.15
        assert rows[name]["ratio_to_compiled_plain"] >= 4
    assert all(row["identical"] for row in rows.values())


def test_no_other_kernel_is_faster_than_the_hosts_default() -> None:
    """What docs/results.md says of mixtures of experts."""
    seconds = {(row["width"], row["kernel"]): row["seconds"] for row in read_record(ROOT, "experts")["rows"]}
    assert all(seconds[width, "grouped_mm"] <= value for (width, _), value in seconds.items())


@pytest.mark.parametrize("path", sorted((ROOT / RESULTS).glob("*.json")), ids=lambda path: path.stem)
def test_no_path_of_a_machine_stands_in_a_command(path: Path) -> None:
    command = json.loads(path.read_text(encoding="utf-8")).get("conditions", {}).get("command", "")
    assert not [word for word in shlex.split(command) if Path(word).is_absolute()]
