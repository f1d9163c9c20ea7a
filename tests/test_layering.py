"""Imports point one way only; files that go to the Hub are self-contained. Read from the source."""

import ast
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_imports

PACKAGE = Path(__file__).parents[1] / "hf_specdiff"
# A file may import files of lower levels only.
LEVELS = [
    {"attention", "draft", "text", "tree", "calibration", "cache", "denoising", "inference", "stopwatch"},
    {"budget", "configuration_specdiff", "model_card", "sampling", "speculation"},
    {"acceptance", "record", "shapes", "stopping"},
    {"drafters", "rules"},
    {"conditioning"},
    {"candidate_generator", "target"},
    {"masked_target", "decoding"},
    {"profiling"},
    {"generate"},
    {"attach", "repository"},
    {"modeling_specdiff"},
]
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
HUB_FILES = [PACKAGE / f"{name}.py" for name in sorted(LEVEL_OF)]
# What only the installed package needs.
PACKAGE_FILES = {"__init__", "cli", "doctor", "hub", "loading"}
# safetensors and huggingface_hub are always there where transformers is.
ALLOWED = {"torch", "transformers", "safetensors", "huggingface_hub"} | set(sys.stdlib_module_names)


def imports_of(path: Path) -> list[ast.Import | ast.ImportFrom]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def test_every_flat_file_has_its_level() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} - PACKAGE_FILES == set(LEVEL_OF)


@pytest.mark.parametrize("path", HUB_FILES, ids=lambda path: path.stem)
def test_hub_file_imports_only_lower_levels_and_what_the_hub_has(path: Path) -> None:
    for node in imports_of(path):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"line {node.lineno}"
            assert LEVEL_OF[str(node.module)] < LEVEL_OF[path.stem], f"{path.stem} imports {node.module}"
            continue
        names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        assert {str(name).split(".")[0] for name in names} <= ALLOWED


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_imported_inside_a_function(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert len(imports_of(path)) == sum(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body)


@pytest.mark.parametrize("path", HUB_FILES, ids=lambda path: path.stem)
def test_the_hub_loader_finds_the_imports_that_python_finds(path: Path) -> None:
    """The loader reads raw text: an import it misses, or one it sees in a docstring, breaks a published drafter."""
    relative = {str(node.module) for node in imports_of(path) if isinstance(node, ast.ImportFrom) and node.level}
    assert set(get_relative_imports(str(path))) == relative
    for node in imports_of(path):
        assert len(node.names) == 1


def test_the_entry_never_reaches_the_modelling_file() -> None:
    reached, queue = set(), ["generate"]
    while queue:
        name = queue.pop()
        if name not in reached:
            reached.add(name)
            queue += [str(node.module) for node in imports_of(PACKAGE / f"{name}.py") if getattr(node, "level", 0)]
    assert "modeling_specdiff" not in reached
