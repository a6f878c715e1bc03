"""No function over 60 lines and no module over 400, in the code and in its tests."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 60


def too_long(path: Path) -> Iterator[str]:
    """What is too long in a file, and how long it is."""
    text = path.read_text(encoding="utf-8")
    if (lines := len(text.splitlines())) > MOST_LINES:
        yield f"{path.relative_to(ROOT)}: {lines} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None:
            lines = node.end_lineno - node.lineno + 1
            if lines > MOST_LINES_OF_A_FUNCTION:
                yield f"{path.relative_to(ROOT)}:{node.lineno}: {node.name} has {lines} lines"


@pytest.mark.parametrize("folder", ["podquant", "jobs", "tests"])
def test_functions_and_modules_fit_on_a_few_screens(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert [found for file in files for found in too_long(file)] == []
