"""What contributors are told is true of the tree, and what they run before a commit is what CI runs."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
ROOMS = [f"core/ramp_moe/{path.parent.name}" for path in sorted(ROOT.glob("core/ramp_moe/*/__init__.py"))]
README = (ROOT / "README.md").read_text()
PATH = re.compile(r"(?<![\w/])(?:(?:core|kernels|adapters|profiles|examples|tests)/|\.ci/)[\w./-]*\w")
NAMED = sorted({path for page in (PAGE, README) for path in PATH.findall(page)})
TOOLS = ("ruff", "mypy", "import-linter")
HOOKS_PAGE = (ROOT / ".pre-commit-config.yaml").read_text()
HOOKS = re.findall(r"entry: ([\w -]+?),", HOOKS_PAGE)


def test_the_map_has_every_room_of_core_in_the_order_of_the_layers() -> None:
    listed = re.findall(r"^\| `core/ramp_moe/(\w+)` \|", PAGE, re.MULTILINE)
    assert sorted(f"core/ramp_moe/{room}" for room in listed) == ROOMS
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (c["layers"] for c in contracts if c["name"] == "the rooms of core")
    order = [room for layer in layers for room in re.findall(r"\w+", layer)]
    assert listed == [room for room in order if room in listed]


@pytest.mark.parametrize("path", NAMED)
def test_a_path_that_a_page_names_exists(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("room", ROOMS)
def test_the_readme_names_every_room(room: str) -> None:
    assert f"`{Path(room).name}`" in README


@pytest.mark.parametrize("tool", TOOLS)
def test_a_linter_is_pinned(tool: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (pinned,) = (r.partition("==")[2] for r in extras["test"] if re.match(rf"{tool}\b(?!-)", r))
    assert pinned == metadata.version(tool)


def test_no_test_measures_time() -> None:
    """A deadline of minutes, after which a test gives up, uses time.monotonic."""
    clocks = re.compile(r"\b(perf_counter|process_time|timeit)\b")
    files = [file for file in ROOT.glob("tests/**/*.py") if file != Path(__file__)]
    assert len(files) > 100
    assert [file.name for file in files if clocks.search(file.read_text())] == []


@pytest.mark.parametrize("page", [PAGE, HOOKS_PAGE], ids=["CONTRIBUTING", "hooks"])
def test_a_page_says_how_the_fast_tests_are_run(page: str) -> None:
    assert 'python -m pytest -n auto -m "not slow"' in page


def test_hooks_run_what_ci_runs() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    linters = [line.removesuffix(" .") for line in lines if re.match(r"(ruff|mypy|lint-imports)\b", line)]
    assert sorted(HOOKS) == sorted(linters)
