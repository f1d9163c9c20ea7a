"""The map of modules in docs/layout.md, from the first lines of their docstrings: `python -m benchmarks.layout`."""

import ast
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.report import between_markers
from hf_specdiff.benchmarks.journal import write_text

PAGE = Path("docs") / "layout.md"
FOLDERS = ("", "core", "diffusion", "formats", "hub", "training", "benchmarks", "commands", "demo")


def first_line(path: Path) -> str:
    """Return the first line of a module's docstring.

    Args:
        path (`pathlib.Path`): a Python file.

    Raises:
        ValueError: if it has no docstring.
    """
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not text:
        raise ValueError(f"`path` must be a module with a docstring, got {str(path)!r} without one. Say what it knows.")
    return text.splitlines()[0]


def module_map(root: Path) -> str:
    """Return every module of the package, the recipes and the benchmarks with what it is about, folder by folder.

    Args:
        root (`pathlib.Path`): the repository.

    Returns:
        `str`: Markdown; links lead from `docs/`.
    """
    parts = []
    for folder in [*(Path("hf_specdiff") / name for name in FOLDERS), Path("recipes"), Path("benchmarks")]:
        parts += [f"### `{folder.as_posix()}/`", "", first_line(root / folder / "__init__.py"), ""]
        modules = sorted(path for path in (root / folder).glob("*.py") if path.name != "__init__.py")
        parts += [f"- [`{path.name}`](../{folder.as_posix()}/{path.name}): {first_line(path)}" for path in modules]
        parts += [""] if modules else []
    return "\n".join(parts).rstrip()


def main(root: Annotated[Path, typer.Argument(help="the repository")] = Path()) -> None:
    """Bring the map up to date."""
    text = (root / PAGE).read_text(encoding="utf-8")
    write_text(root / PAGE, between_markers(text, "modules", module_map(root)))


if __name__ == "__main__":
    typer.run(main)
