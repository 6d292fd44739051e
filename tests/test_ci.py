"""What runs in CI: everything, by tools that the `test` extra installs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RUN = (ROOT / ".ci" / "run").read_text()
TOOLS = {"ruff check .": "ruff", "ruff format --check .": "ruff", "lint-imports": "import-linter", "mypy": "mypy"}


def test_the_second_command_runs_every_test() -> None:
    (command,) = re.findall(r"<!-- ci: tests -->\n```sh\n(.*?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)
    _, arguments = command.split("pytest")
    assert not re.search(r"-[mk] |--deselect|--ignore", arguments), "CI leaves nothing out"
    options = PROJECT["tool"]["pytest"]["ini_options"]["addopts"]
    assert not re.search(r"-[mk] |--deselect|--ignore", options)


def test_the_linters_run_and_are_installed() -> None:
    lines = RUN.splitlines()
    needs = " ".join(PROJECT["project"]["optional-dependencies"]["test"])
    for command, distribution in TOOLS.items():
        assert command in lines, f"{command} is not run"
        assert re.search(rf"(?<![\w-]){distribution}==", needs), f"{distribution} is not in the extra `test`"


def test_tiers_are_named() -> None:
    markers = [re.split(r"[(:]", marker)[0] for marker in PROJECT["tool"]["pytest"]["ini_options"]["markers"]]
    assert markers == ["gpu", "slow", "xdist_group"]


def test_every_marker_is_registered() -> None:
    """The last is known to pytest-xdist, which a contributor may not have."""
    known = {re.split(r"[(:]", marker)[0] for marker in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    known |= {"parametrize", "skip", "skipif", "usefixtures", "xfail", "filterwarnings"}
    texts = [path.read_text() for path in (ROOT / "tests").rglob("*.py")]
    used = {name for text in texts for name in re.findall(r"pytest\.mark\.(\w+)", text)}
    assert used >= {"gpu", "slow", "xdist_group"}
    assert used <= known
