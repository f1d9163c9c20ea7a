"""The Python standard library's own source as text: one document per top-level function or class.

Knows where the running interpreter keeps its library and which modules are held out. Knows nothing about tokens or models.
"""

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELD_OUT_ONE_IN = 12
# Tables, generated parsers and tests are no code that anyone would want completed.
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "encodings",
    "site-packages",
    "__pycache__",
    "pydoc_data",
    "turtledemo",
}


def iter_modules(*, held_out: bool) -> Iterator[Path]:
    """Yield the library's modules of one split, in a fixed order.

    Args:
        held_out (`bool`): which split; a hash of the module's relative path decides, so whole modules are held out.

    Yields:
        `pathlib.Path`: a Python source file.
    """
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        digest = hashlib.sha256(relative.as_posix().encode()).digest()
        is_held_out = int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0
        if is_held_out == held_out and not SKIPPED_FOLDERS.intersection(relative.parts):
            yield path


def iter_definitions(path: Path, min_lines: int = 4) -> Iterator[str]:
    """Yield the source of each top-level function, class and method of a module.

    Args:
        path (`pathlib.Path`): a Python source file; one that does not parse yields nothing.
        min_lines (`int`): shorter definitions are left out.

    Yields:
        `str`: source text at its own indentation, without a trailing newline; classes are yielded whole.
    """
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (SyntaxError, UnicodeDecodeError):
        return
    lines = text.splitlines()
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.end_lineno is None:
            continue
        if node.end_lineno - node.lineno + 1 >= min_lines:
            yield "\n".join(lines[node.lineno - 1 : node.end_lineno])
