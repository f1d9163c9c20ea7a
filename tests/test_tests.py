"""What no test does: patch a private name, or read a clock. Read from the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CLOCKS = {"time", "monotonic", "perf_counter", "process_time", "thread_time", "sleep"}
CLOCKS |= {f"{name}_ns" for name in CLOCKS}


def is_private(name: str) -> bool:
    """Whether a dotted name has a part with one underscore in front."""
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def strings_in(node: ast.AST) -> list[str]:
    return [part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)]


def private_patches(tree: ast.AST) -> Iterator[str]:
    """Yield the private names that `setattr` is given; of a name that a loop fills in, those in the function."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for function in functions:
        for call in ast.walk(function):
            if not (isinstance(call, ast.Call) and ast.unparse(call.func).endswith(("setattr", "delattr"))):
                continue
            named = [name for part in call.args[:2] for name in strings_in(part)]
            filled_in = [] if named else [name for name in strings_in(function) if name.isidentifier()]
            yield from filter(is_private, named + filled_in)


def clocks_read(tree: ast.AST) -> Iterator[str]:
    """Yield the calls of clocks."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"time.{name}" for name in CLOCKS} | {"datetime.now"}:
            yield ast.unparse(node)


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_private_name_is_patched_and_no_clock_read(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not list(private_patches(tree))
    assert not list(clocks_read(tree))


def test_both_would_be_seen() -> None:
    source = """
def test_it(monkeypatch):
    monkeypatch.setattr("hf_specdiff.core.trial._one", 1)
    monkeypatch.setattr(trial, "_two", 1)
    for module, name in ((trial, "_three"), (trial, "public")):
        monkeypatch.setattr(module, name, 1)
    monkeypatch.setattr(trial, "public", time.perf_counter())
"""
    tree = ast.parse(source)
    assert set(private_patches(tree)) == {"hf_specdiff.core.trial._one", "_two", "_three"}
    assert list(clocks_read(tree)) == ["time.perf_counter()"]
