"""Imports point one way only; files that go to the Hub are self-contained. Read from the source."""

import ast
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_imports

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_specdiff"
CORE = PACKAGE / "core"
# Which folders a folder may import from; "" is the package's front, "core" is looked at file by file below.
ARROWS = {
    "core": set(),
    "formats": {"core"},
    "hub": {"core", "formats", "demo"},
    "training": {"core", "formats"},
    "demo": {"core", "formats", "training"},
    "benchmarks": {"", "core", "formats", "training", "demo"},
    "commands": {"", "core", "formats", "hub", "training", "demo", "benchmarks"},
    "": {"core", "formats", "demo"},
}
# A file may import files of lower levels only.
LEVELS = [
    {"attention", "cache", "calibration", "config_checks", "denoising", "draft", "files", "inference", "stopwatch", "text"}
    | {"tree", "weights"},
    {"budget", "configuration_specdiff", "model_card", "sampling", "speculation"},
    {"acceptance", "checks", "record", "shapes", "stopping"},
    {"drafters", "rules"},
    {"conditioning"},
    {"candidate_generator", "target"},
    {"masked_target", "stateful_target", "decoding"},
    {"profiling", "trial"},
    {"generate"},
    {"repository"},
    {"modeling_specdiff"},
]
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
HUB_FILES = [CORE / f"{name}.py" for name in sorted(LEVEL_OF)]
# safetensors and huggingface_hub are always there where transformers is.
ALLOWED = {"torch", "transformers", "safetensors", "huggingface_hub"} | set(sys.stdlib_module_names)


def imports_of(path: Path) -> list[ast.Import | ast.ImportFrom]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def folder_of(parts: tuple[str, ...] | list[str]) -> str:
    """Return the package's folder that a path or a dotted name inside the package belongs to."""
    return parts[0] if parts and parts[0] in ARROWS else ""


def test_every_file_of_the_core_has_its_level() -> None:
    assert {path.stem for path in CORE.glob("*.py")} - {"__init__"} == set(LEVEL_OF)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_folders_import_one_way_only(path: Path) -> None:
    folder = folder_of(path.relative_to(PACKAGE).parts)
    for node in imports_of(path):
        names = [str(node.module)] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        assert not {name.split(".")[0] for name in names} & {"recipes", "benchmarks", "tests"}
        for name in names:
            if name.split(".")[0] == "hf_specdiff":
                reached = folder_of(name.split(".")[1:])
                assert reached == folder or reached in ARROWS[folder], f"{folder or 'the front'} imports {name}"


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
            queue += [str(node.module) for node in imports_of(CORE / f"{name}.py") if getattr(node, "level", 0)]
    assert "modeling_specdiff" not in reached
