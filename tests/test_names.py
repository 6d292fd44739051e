"""Modules and files that documents and code name, in strings too, are there."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("core", "adapters", "kernels", "profiles", "tests", "examples")
PACKAGES = {"ramp_moe": "core", "ramp_moe_adapters": "adapters", "ramp_moe_kernels": "kernels"}
IMPORT = re.compile(r"(?m)^\s*(?:>>> )?(?:from|import) ((?:ramp_moe|ramp_moe_adapters|ramp_moe_kernels)(?:\.\w+)+)")
FILE = re.compile(rf"\b(?:{'|'.join(FOLDERS)})/[\w/]+\.(?:py|md|json|png|csv)\b")


def texts(*suffixes: str) -> Iterator[Path]:
    yield from (path for path in ROOT.iterdir() if path.suffix in suffixes)
    for folder in FOLDERS:
        yield from (path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes)


def there(module: str) -> bool:
    """Whether a dotted name is a module's. One that a package's own `__getattr__` finds is not looked for here."""
    path = (ROOT / PACKAGES[module.partition(".")[0]]).joinpath(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def test_modules_that_are_imported_anywhere_are_there() -> None:
    found = [(path, module) for path in texts(".py", ".md") for module in IMPORT.findall(path.read_text())]
    missing = {f"{path.relative_to(ROOT)}: {module}" for path, module in found if not there(module)}
    assert len(found) > 500
    assert not missing


def defined(module: str) -> set[str] | None:
    """Names at the top of a module, and modules beside its `__init__`; None if it finds names by itself."""
    path = (ROOT / PACKAGES[module.partition(".")[0]]).joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    names = {p.stem for p in path.glob("*")} if path.is_dir() else set[str]()
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.FunctionDef(name="__getattr__"):
                return None
            case ast.FunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.Name(ctx=ast.Store()):
                names.add(node.id)
            case ast.Import() | ast.ImportFrom():
                names |= {alias.asname or alias.name for alias in node.names}
    return names


def statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Every statement, within others too. Their expressions, of which there are ten times as many, are not visited."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        for block in ("body", "orelse", "finalbody", "handlers", "cases"):
            if isinstance(inner := getattr(node, block, None), list):
                waiting += inner


def test_names_that_are_imported_anywhere_are_there() -> None:
    """Scripts that no test runs, too."""
    missing, known, looked = set[str](), cache(defined), 0
    for path in texts(".py"):
        for node in statements(ast.parse(path.read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) and not node.level else None
            if module is None or module.partition(".")[0] not in PACKAGES or not there(module):
                continue
            if (names := known(module)) is not None:
                looked += 1
                strays = [alias.name for alias in node.names if alias.name not in names]
                missing |= {f"{path.relative_to(ROOT)}: {module}.{name}" for name in strays}
    assert looked > 500
    assert not missing


@pytest.mark.parametrize("path", [*texts(".md")], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_documents_name_are_there(path: Path) -> None:
    named = FILE.findall(path.read_text())
    assert not [name for name in named if not (ROOT / name).is_file() and not (path.parent / name).is_file()]


def code() -> dict[Path, str]:
    return {path: path.read_text() for folder in PACKAGES.values() for path in (ROOT / folder).rglob("*.py")}


TWICE = {"Batch", "Judged", "Launch", "Outcome", "Place", "Run", "Worker"}
"""Classes of two rooms that know nothing of each other."""


def test_a_class_has_its_name_for_itself() -> None:
    found = Counter(name for text in code().values() for name in re.findall(r"(?m)^class (\w+)", text))
    assert {name for name, n in found.items() if n > 1} <= TWICE


@pytest.mark.parametrize(
    ("word", "instead"),
    [
        (r"expert_of_tile", "expert_ids"),
        (r"num_slots", "num_tokens_post_padded"),
        (r"retrofitted", "histogram"),
        (r"ranks: int\b", "ep_size"),
        (r"(?:weight_rows|block_tokens|block_weights)\b", "n, block_m, block_n"),
        (r"def dispatch(?:_kernel)?\(x\b", "permute"),
        (r"class RoutedExperts\b", "WrappedExperts, since vLLM has a class of that name"),
    ],
)
def test_the_fields_names_are_used(word: str, instead: str) -> None:
    found = [str(path.relative_to(ROOT)) for path, text in code().items() if re.search(word, text)]
    assert not found, f"say {instead}"
