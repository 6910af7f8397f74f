"""Test files are independent of each other: shared code is in tests/helpers."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def imported_names(source):
    """Return the dotted names that a file imports, with and without what it takes from each module."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def imported_test_files(source):
    """Return the imported names with a part that is the name of a test file."""
    files = {file.stem for file in TESTS.rglob("test_*.py")}
    return {name for name in imported_names(source) if files & set(name.split("."))}


@pytest.mark.parametrize(
    "line",
    [
        "from tests.models.test_families import each_family",
        "from tests.models import test_families",
        "from . import test_docs",
        "def f():\n    import tests.test_docs",
    ],
)
def test_imports_of_test_files_are_found(line):
    assert imported_test_files(line)


@pytest.mark.parametrize("file", sorted(TESTS.rglob("*.py")), ids=lambda file: str(file.relative_to(TESTS)))
def test_no_file_imports_a_test_file(file):
    assert not imported_test_files(file.read_text())
