"""The page of faults: every row has its tests, and they exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| (\d+) \| (.+?) \| (.+?) \| (.+) \|$", re.MULTILINE)


def test_every_row_names_tests_that_exist() -> None:
    rows = ROW.findall((ROOT / "docs" / "reliability.md").read_text("utf-8"))
    assert [int(number) for number, *_ in rows] == list(range(1, 57))
    for number, _, _, cell in rows:
        file = ""
        names = []
        for word in re.findall(r"`([^`]+)`", cell):
            if word.endswith(".py"):
                file = word
                continue
            names.append(word)
            tree = ast.parse((ROOT / file).read_text("utf-8"))
            assert word in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (number, file, word)
        assert any(f"row_{int(number):02d}_" in name or f"and_{int(number):02d}_" in name for name in names), number


def test_every_test_of_a_row_is_in_its_row() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text("utf-8")
    for path in (ROOT / "tests").glob("*/test_*.py"):
        for name in re.findall(r"^def (test_row_\w+)\(", path.read_text("utf-8"), re.MULTILINE):
            assert f"`{name}`" in page, (path.name, name)
