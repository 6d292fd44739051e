"""Every generated page says what is computed from what the repository holds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pages
import pytest

FITTED = {"compiling", "cost_model", "families", "heldout", "profiles", "shortlists"}
"""Pages that fit cost models. They share fits, and so a process."""
COMPUTED = {"accuracy"}
"""Pages for which layers are computed."""
CASES = [
    pytest.param(
        name,
        marks=[pytest.mark.slow] * (name in FITTED | COMPUTED) + [pytest.mark.xdist_group("pages")] * (name in FITTED),
    )
    for name in pages.scripts()
]


@pytest.mark.parametrize("name", CASES)
def test_the_page_is_what_is_computed(name: str) -> None:
    wrong = pages.stale(name, heavy=False)
    assert not wrong, "\n".join([f"python profiles/pages.py --write {name} writes it anew", *wrong])


@pytest.mark.parametrize("readme", sorted(pages.HERE.glob("*/**/README.md")), ids=lambda f: f.parent.name)
def test_every_table_is_generated(readme: Path) -> None:
    """None is left behind by a script that does not make it any more, and each has rows or says that it has none."""
    tables = re.findall(r"<!-- table: (\w+) -->\n(.*?)<!-- end: (\w+) -->", readme.read_text(), re.DOTALL)
    made = {name for script in pages.scripts()[readme.parent.name] for name in pages.load(script).TABLES}
    assert {name for name, _, _ in tables} == made
    assert readme.read_text().count("<!-- table: ") == len(tables)
    for start, text, end in tables:
        assert start == end
        assert text.count("\n|") >= 2 or text.strip() == pages.UNMEASURED, f"{start} is empty"


@pytest.mark.slow
def test_the_command() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(pages.HERE / "pages.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run("--check", "wrap", "parallel")
    assert (done.returncode, done.stdout) == (0, "wrap: the same\nparallel: the same\n"), done.stderr
    assert run().returncode == 2
    unknown = run("--check", "nothing")
    assert unknown.returncode == 2
    assert f"no page is called nothing; there are {', '.join(pages.scripts())}" in unknown.stderr


def test_a_page_that_differs_is_named_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "profiles" / "studies" / "made_up"
    folder.mkdir(parents=True)
    (folder / "tables.py").write_text(
        "from pathlib import Path\n"
        "TABLES = {'figures': lambda: '| a |\\n| --- |\\n| 1.50 |', 'long': lambda: '| b |'}\n"
        "HEAVY = ('long',)\n"
        "FRONT = {'headline': lambda: '| c |'}\n"
        "FILES = {'cells.csv': lambda: 'x,1.00\\n'}\n"
        "def draw():\n    (Path(__file__).parent / 'plot.png').write_bytes(b'')\n"
    )
    old = {
        folder / "README.md": "<!-- table: figures -->\n| a |\n| --- |\n| 1.47 |\n<!-- end: figures -->\n"
        "<!-- table: long -->\nold\n<!-- end: long -->\n",
        tmp_path / "README.md": "<!-- table: headline -->\nold\n<!-- end: headline -->\n",
        folder / "cells.csv": "x,1.02\n",
    }
    for path, text in old.items():
        path.write_text(text)
    monkeypatch.setattr(pages, "HERE", tmp_path / "profiles")
    assert len(pages.stale("made_up", heavy=False)) == 3
    assert pages.main(["--check"]) == 1
    said = capsys.readouterr().out
    assert "made_up: differs; write it with --write" in said
    assert "profiles/studies/made_up/README.md, line 4\n  found    | 1.50 |\n  expected | 1.47 |" in said
    assert pages.main(["--write", "made_up"]) == 0
    assert (folder / "plot.png").exists()
    assert pages.main(["--check", "made_up"]) == 0
    assert "| c |" in (tmp_path / "README.md").read_text()
    monkeypatch.delitem(sys.modules, "studies.made_up.tables")


@pytest.mark.parametrize(
    "page",
    ["", "<!-- table: a -->\n", "<!-- end: a -->\n<!-- table: a -->\n", 2 * "<!-- table: a -->\n\n<!-- end: a -->"],
)
def test_a_page_without_the_markers_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="the page needs the lines <!-- table: a --> and <!-- end: a -->, once each"):
        pages.filled(page, {"a": lambda: "| a |"})


def test_sources_are_read_once_and_late() -> None:
    read: list[int] = []
    tables = pages.over(lambda: read.append(1) or read, {"a": str, "b": len})  # type: ignore[dict-item]
    assert not read
    assert (tables["a"](), tables["b"]()) == ("[1]", 1)
