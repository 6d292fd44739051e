"""Paths that documents, docstrings and comments name are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATH = re.compile(r"(?<![\w./-])(?:\.\./|\./)?((?:adapters|core|examples|kernels|profiles|tests)/[\w./*-]*[\w*])")
FOLDERS = ("adapters", "core", "examples", "kernels", "profiles", "tests")
FILES = [
    *ROOT.glob("*.md"),
    *(f for folder in FOLDERS for f in (ROOT / folder).rglob("*") if f.suffix in {".md", ".py"}),
]
ELSEWHERE = ("core/gone", "examples/gone.py", "profiles/studies/made_up", "tests/test_moe_dispatch.py")
"""What tests make up, and what is in other repositories, begins so."""


def missing(text: str) -> list[str]:
    """The paths from the repository's root that a text names and that are not there."""
    named = dict.fromkeys(PATH.findall(text))
    return [path for path in named if not any(ROOT.glob(path))]


def test_a_path_that_is_gone_is_found() -> None:
    text = "`examples/gone.py`, ./core/gone, profiles/pages.py and [1](profiles/studies/families/winners.png)"
    assert missing(text) == ["examples/gone.py", "core/gone"]
    assert missing("a/core/gone, xcore/gone, core/ramp_moe/spec.") == []


def test_named_paths_exist() -> None:
    found = {str(file.relative_to(ROOT)): missing(file.read_text()) for file in FILES}
    stale = {file: here for file, paths in found.items() if (here := [p for p in paths if not p.startswith(ELSEWHERE)])}
    assert not stale
