"""Docstrings begin with what they document, and do without the turns that have to be read twice."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("core", "adapters", "kernels", "profiles", "examples", "tests/support")
"""The folders whose docstrings the rule holds for."""
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
TURNS = re.compile(r"\A\s*Of\b|\b(so many|the like|be had|as they lie|None where)\b|\bRaises? \w+ where\b")


def docstring(node: ast.AST) -> ast.Constant | None:
    """A string that stands by itself: of a module, class or function, or below a constant or field."""
    value = node.value if isinstance(node, ast.Expr) else None
    return value if isinstance(value, ast.Constant) and isinstance(value.value, str) else None


@cache
def docstrings(path: Path) -> list[tuple[int, str]]:
    """The line and text of every docstring of a file."""
    found = [text for node in ast.walk(ast.parse(path.read_text())) if (text := docstring(node))]
    return [(text.lineno, str(text.value)) for text in found]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_read_once(path: Path) -> None:
    found = [
        f"line {line}: {turn.group().strip()!r}" for line, text in docstrings(path) if (turn := TURNS.search(text))
    ]
    assert not found


MOST_WORDS = 40
"""Well above the 25 of the rule, which names and figures may exceed."""


def sentences(text: str) -> Iterator[str]:
    """The sentences of a docstring, without tables, whose columns are three spaces apart or more."""
    for paragraph in re.split(r"\n\s*\n|\n\s*- |\n(?=\s*[\w, ]+: )", text):
        if not re.search(r"\S {3,}\S", paragraph):
            yield from re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split()))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sentences_are_short(path: Path) -> None:
    found = [
        f"line {line}: {len(words)} words: {' '.join(words[:8])} ..."
        for line, text in docstrings(path)
        for sentence in sentences(text)
        if len(words := sentence.split()) > MOST_WORDS
    ]
    assert not found


FOREIGN = (
    *("get_moe_configs", "try_get_optimal_moe_config", "get_default_config", "moe_sum"),  # vLLM
    "vllm.general_plugins",  # an entry point of vLLM
    "setmaxnreg",  # an instruction of PTX
    *("get_best_config", "get_best_gemm_config", "grouped_gemm_dispatch"),  # DeepGEMM, and its copy in FlashInfer
    *("get_candidate_configs", "getTmaWarpSpecializedConfigs", "getAmpereConfigs"),  # FlashInfer
    *("target_parameters", "_dynamo", "allow_unspec_int_on_nn_module"),  # PEFT, torch
    "filled",  # a symbol of the cost model's formula
)
"""Names in docstrings that are other libraries', or defined in the docstring itself."""
NAME = re.compile(r"`([A-Za-z_][\w.]*)`")


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Every name that occurs in the folders' code, strings and paths."""
    found = set(FOREIGN)
    for path in FILES:
        found |= set(re.findall(r"\w+", str(path.relative_to(ROOT))))
        prose = set[ast.AST]()
        for node in ast.walk(ast.parse(path.read_text())):  # a docstring comes after the statement that it is
            if text := docstring(node):
                prose.add(text)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose:
                found |= set(re.findall(r"\w+", node.value))
            for field in ("id", "attr", "arg", "name", "module"):
                if isinstance(name := getattr(node, field, None), str):
                    found |= set(name.split("."))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_name_in_a_docstring_exists(path: Path, known: set[str]) -> None:
    missing = [
        f"line {line}: {name}"
        for line, text in docstrings(path)
        for name in NAME.findall(text)
        if name not in known and not set(name.split(".")) <= known
    ]
    assert not missing


PAGES = sorted(
    {*ROOT.glob("*.md"), *ROOT.glob("profiles/**/*.md"), *ROOT.glob("examples/**/*.md")} - {ROOT / "README.md"}
)


def paragraphs(page: str) -> Iterator[str]:
    """The paragraphs of a page in Markdown, without code, tables, headings and what is quoted."""
    page = re.sub(r"^```.*?^```|^( {4}|[|#<!]).*?$", "", page, flags=re.M | re.S)
    for paragraph in re.split(r"\n\s*\n|\n\s*(?:-|\d+\.) ", page):
        yield re.sub(r'"[^"]*"', "it", paragraph)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_read_once(path: Path) -> None:
    found = []
    for paragraph in paragraphs(path.read_text()):
        found += [turn.group() for turn in TURNS.finditer(paragraph)]
        found += [s for s in sentences(paragraph) if len(s.split()) > MOST_WORDS]
    assert not found
