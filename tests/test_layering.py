"""Imports point one way only; files that go to the Hub are self-contained. Read from the source."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_imports

from tests.conftest import make_drafter

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_specdiff"
CORE = PACKAGE / "core"
# Which folders a folder may import from; "" is the package's front, "core" is looked at file by file below.
ARROWS = {
    "core": set(),
    "diffusion": {"core"},
    "formats": {"core", "diffusion"},
    "hub": {"core", "formats"},
    "training": {"core", "formats"},
    "demo": {"core", "formats", "training"},
    "benchmarks": {"", "core", "formats", "training", "demo"},
    "commands": {"", "core", "formats", "hub", "training", "demo", "benchmarks"},
    "": {"core", "diffusion", "formats", "demo", "hub"},
}
CORE_FILES = sorted(path for path in CORE.glob("*.py") if path.stem != "__init__")
# safetensors and huggingface_hub are always there where transformers is.
ALLOWED = {"torch", "transformers", "safetensors", "huggingface_hub"} | set(sys.stdlib_module_names)


def imports_of(path: Path) -> list[ast.Import | ast.ImportFrom]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def folder_of(parts: tuple[str, ...] | list[str]) -> str:
    """Return the package's folder that a path or a dotted name inside the package belongs to."""
    return parts[0] if parts and parts[0] in ARROWS else ""


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


def siblings_of(path: Path) -> set[str]:
    """Return the files beside `path` that it imports."""
    return {str(node.module) for node in imports_of(path) if isinstance(node, ast.ImportFrom) and node.level}


def closure_of(name: str) -> set[str]:
    """Return a file of the core and all that it reaches."""
    reached: set[str] = set()
    queue = [name]
    while queue:
        name = queue.pop()
        if name not in reached:
            reached.add(name)
            queue += siblings_of(CORE / f"{name}.py")
    return reached


def test_files_of_the_core_import_one_way_only() -> None:
    TopologicalSorter({path.stem: siblings_of(path) for path in CORE_FILES}).prepare()  # a circle is an error


@pytest.mark.parametrize("path", CORE_FILES, ids=lambda path: path.stem)
def test_a_file_of_the_core_imports_siblings_and_what_the_hub_has(path: Path) -> None:
    for node in imports_of(path):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"line {node.lineno}"
            assert (CORE / f"{node.module}.py").is_file()
            continue
        names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        assert {str(name).split(".")[0] for name in names} <= ALLOWED


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_imported_inside_a_function(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert len(imports_of(path)) == sum(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body)


@pytest.mark.parametrize("path", CORE_FILES, ids=lambda path: path.stem)
def test_the_hub_loader_finds_the_imports_that_python_finds(path: Path) -> None:
    """The loader reads raw text: an import it misses, or one it sees in a docstring, breaks a published drafter."""
    assert set(get_relative_imports(str(path))) == siblings_of(path)
    for node in imports_of(path):
        assert len(node.names) == 1


def test_what_lies_in_front_never_reaches_back() -> None:
    assert "modeling_specdiff" not in closure_of("generate")
    assert closure_of("features") == {"features"}
    assert not closure_of("target") & {"drafters", "conditioning", "rules"}
    network = closure_of("modeling_specdiff")
    assert not network & {"generate", "decoding", "acceptance", "rules", "target", "budget", "shapes", "tree"}
    assert len(network) <= 14


def test_a_saved_drafter_holds_few_files(tmp_path: Path) -> None:
    make_drafter().save_pretrained(tmp_path)
    code = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.py"))
    assert code == [Path("custom_generate", path.name) for path in CORE_FILES]  # each once, and nothing that it does not need
    assert len(code) <= 40


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_test_replaces_a_private_name(path: Path) -> None:
    """A stub through an open door says what is relied on; a private name may change with any line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("setattr", "delattr"):
            texts = [argument.value for argument in node.args[:2] if isinstance(argument, ast.Constant)]
            names = [part for text in texts for part in str(text).split(".")]
            private = [name for name in names if name.startswith("_") and not name.startswith("__")]
            assert not private, f"line {node.lineno} replaces {private}"
