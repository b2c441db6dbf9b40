"""Tests stand where what they test stands, and share by tests/support alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
WINGS = {path.parent.name for path in (TESTS.parent / "raytrain").glob("*/__init__.py")}
# Of no one wing: what the project promises, what holds for its code as a whole, and what all of it is needed for.
CROSS_CUTTING = {"promises", "guards", "whole"}
FILES = {path.relative_to(TESTS).as_posix(): path for path in sorted(TESTS.rglob("*.py"))}
NAMES = {path.stem for path in FILES.values() if path.stem.startswith("test_") or path.stem == "conftest"}


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all that it imports, at any time."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("name", FILES)
def test_no_test_file_imports_another(name: str) -> None:
    """pytest would have it twice, each with fixtures and state of its own; what two of them need is in support/."""
    for line, dotted in imported(FILES[name]):
        assert not NAMES & set(dotted.split(".")), f"tests/{name}:{line} imports {dotted}"


def test_tests_stand_in_folders_named_like_the_wings() -> None:
    folders = {name.partition("/")[0] for name, path in FILES.items() if path.stem.startswith("test_") and "/" in name}
    assert folders <= WINGS | CROSS_CUTTING
    flat = {name.removeprefix("test_").removesuffix(".py") for name in FILES if "/" not in name} - {"conftest"}
    assert flat <= {path.stem for path in (TESTS.parent / "raytrain").glob("*.py")}
