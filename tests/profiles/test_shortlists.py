"""The page about shortlists says what is computed from the profiles that ship, and pruning keeps to its bar."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from studies.shortlists import tables

PAGE = (Path(tables.__file__).parent / "README.md").read_text()
BAR = 0.005
"""What a shortlist of at most 8 may add to the regret of choosing from all candidates, on average."""


@pytest.mark.slow
@pytest.mark.xdist_group("pages")
def test_pruning_keeps_to_its_bar() -> None:
    assert "| **mean** |" in PAGE
    assert tables.FEWER[0] == 8
    for form in tables.FORMS:
        lost = tables.lost(form)
        assert (lost[:, 1] - lost[:, 0]).mean() <= BAR
        # By row, as the page says.
        assert (lost[:, 1] - lost[:, 0]).max() < 0.012


def test_the_overheads_are_those_said() -> None:
    said = {int(n): float(us) for us, n in re.findall(r"([\d.]+) us\s+with (\d)", PAGE)}
    assert {1: 0.0} | said == tables.ADDED_US


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out.count("alpha_moe/") > 1
