"""The page about shortlists says what is computed from the profiles that ship, and pruning keeps to its bar."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from pages import assert_same

FOLDER = Path(__file__).parents[2] / "examples" / "shortlists"
PAGE = (FOLDER / "README.md").read_text()
BAR = 0.005
"""What a shortlist of at most 8 may add to the regret of choosing from all candidates, on average."""


@pytest.fixture(scope="module")
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("shortlist_tables", FOLDER / "shortlist_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_profiles_and_pruning_keeps_to_its_bar(page: ModuleType) -> None:
    """One test, since both fit the same cost models."""
    assert_same(page.filled(PAGE, page.TABLES), PAGE)
    assert "| **mean** |" in PAGE
    assert page.FEWER[0] == 8
    for form in page.FORMS:
        lost = page.lost(form)
        assert (lost[:, 1] - lost[:, 0]).mean() <= BAR
        # By row, as the page says.
        assert (lost[:, 1] - lost[:, 0]).max() < 0.012


def test_the_overheads_are_those_said(page: ModuleType) -> None:
    said = {int(n): float(us) for us, n in re.findall(r"([\d.]+) us\s+with (\d)", PAGE)}
    assert {1: 0.0} | said == page.ADDED_US


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out.count("alpha_moe/") > 1
