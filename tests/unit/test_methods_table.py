"""docs/methods.md says what the code does."""

from pathlib import Path

import pytest

from sglang_metasoft.config import CONSOLIDATIONS, METHODS
from sglang_metasoft.consolidations import load_consolidation
from sglang_metasoft.methods import load_method
from tests.unit.methods import make_method

TEXT = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
YES = {True: "yes", False: "no"}


def rows(header: str) -> dict[str, dict[str, str]]:
    """The table whose header starts so: first cell, without backticks, to the row."""
    lines = TEXT[TEXT.index(header) :].split("\n\n")[0].splitlines()
    names = [cell.strip() for cell in lines[0].strip("|").split("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert all(len(row) == len(names) for row in cells)
    return {row[0].strip("`"): dict(zip(names, row, strict=True)) for row in cells}


def test_every_method_and_consolidation_has_a_row():
    assert list(rows("| method |")) == list(METHODS)
    assert list(rows("| consolidation |")) == list(CONSOLIDATIONS)


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_row_is_what_its_class_says(name):
    row, method = rows("| method |")[name], load_method(name)
    assert row["trained"] == YES[method.reads_path]
    assert row["tensor parallel"] == YES[not method.needs_all_heads]
    assert row["default consolidation"] == f"`{make_method(name).default_consolidation}`"
    assert (row["probe"] == "none") is not method.needs_probe
    module = __import__(method.__module__, fromlist=["__doc__"])
    assert row["source"] in module.__doc__


@pytest.mark.parametrize("name", CONSOLIDATIONS)
def test_a_consolidations_row_is_what_its_class_says(name):
    row, consolidation = rows("| consolidation |")[name], load_consolidation(name)
    assert row["needs queries"] == YES[consolidation.needs_queries]
