"""Finds out what the names in a Python source stand for, from its syntax tree, without importing it."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import KernelError

OURS = "ramp_moe"
"""Beginning of the names of our top-level packages. The core has exactly this name."""
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
Function = ast.FunctionDef | ast.AsyncFunctionDef
Import = ast.Import | ast.ImportFrom


class Place(NamedTuple):
    """A name at the top level of a file."""

    file: Path
    name: str


Origin = str | Path | Place
"""What a name stands for: a dotted name of another library, one of our modules, or a definition in one."""


class Module:
    """The top-level statements of a source, including those in conditions, by the names that they bind.

    A statement that binds no name (it may fill a table) belongs to all names that it mentions. Raises KernelError if
    the file cannot be read or parsed, or uses `import *`.
    """

    def __init__(self, file: Path) -> None:
        try:
            tree = ast.parse(file.read_bytes())
        except (OSError, SyntaxError, ValueError) as e:
            raise KernelError(f"a kernel's version is made from its sources; cannot read {file}: {e}") from None
        self.bound: dict[str, list[ast.stmt]] = {}
        for statement in _unconditional(tree.body):
            mentioned = (x.id for x in ast.walk(statement) if isinstance(x, ast.Name))
            for name in dict.fromkeys([*binds([statement])] or mentioned):
                self.bound.setdefault(name, []).append(statement)
        if "*" in self.bound:
            raise KernelError(f"a kernel's version is made from its sources; {file} hides names in `import *`")


@functools.cache
def module(file: Path) -> Module:
    return Module(file)


def locate(file: Path, name: str, imported: bool = False) -> Origin:
    """Find what a module's name stands for, following all imports."""
    statement = next(iter(module(file).bound.get(name, [])), None)
    if isinstance(statement, Import):
        return origin_of(statement, name, file)
    return Place(file, name) if statement or imported else f"builtins.{name}"


def origin_of(statement: Import, name: str, file: Path) -> Origin:
    """Find what an import in a file binds a name to."""
    alias = next(a for a in statement.names if bound_by(a) == name)
    if isinstance(statement, ast.Import):
        dotted = alias.name if alias.asname else name
        path = _path_of(dotted)
        return dotted if path is None else _source(path) or path
    dotted, level = statement.module or "", statement.level
    folder = file.parents[level - 1].joinpath(*dotted.split(".")) if level else _path_of(dotted)
    if folder is None:
        return f"{dotted}.{alias.name}"
    source = _source(folder)
    if source and alias.name in module(source).bound:
        return locate(source, alias.name, imported=True)
    return _source(folder / alias.name) or Place(source or folder, alias.name)


def bound_by(alias: ast.alias) -> str:
    return alias.asname or alias.name.partition(".")[0]


def binds(nodes: Iterable[ast.AST], inner: bool = False) -> Iterator[str]:
    """Yield the names that syntax binds in its own scope. inner: only those that leave a comprehension."""
    for node in nodes:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name
            case ast.Import() | ast.ImportFrom():
                yield from map(bound_by, node.names)
            case ast.NamedExpr(target=ast.Name(id=name), value=value):
                yield name
                yield from binds([value], inner)
            case ast.Name(id=name, ctx=ast.Store()) if not inner:
                yield name
            case ast.Lambda():
                pass
            case _:
                if isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
                    yield node.name
                yield from binds(ast.iter_child_nodes(node), inner or isinstance(node, ast.comprehension))


def parameters(node: ast.AST | None) -> list[str]:
    """Names of the parameters of a function, or of a class' constructor, in order."""
    match node:
        case ast.FunctionDef(args=a) | ast.AsyncFunctionDef(args=a):
            return [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
        case ast.ClassDef(body=body):
            constructor = next((s for s in body if isinstance(s, FUNCTIONS) and s.name == "__init__"), None)
            fields = [s.target.id for s in body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)]
            return parameters(constructor) if constructor else fields
    return []


@functools.cache
def members(node: ast.ClassDef) -> dict[str, Function | None]:
    """A class' methods by name, and its fields with None; without the names of the language (`__init__`)."""
    found: dict[str, Function | None] = dict.fromkeys(binds(node.body))
    for s in (s for s in node.body if isinstance(s, FUNCTIONS)):
        found[s.name] = s
        for x in ast.walk(s) if s.args.args else ():
            match x:
                case ast.Attribute(value=ast.Name(id=me), attr=field, ctx=ast.Store()) if me == s.args.args[0].arg:
                    found.setdefault(field, None)
    return {name: method for name, method in found.items() if not name.startswith("__")}


@functools.cache
def folders_of(package: str) -> tuple[Path, ...]:
    """The folders of one of our top-level packages; none for another library's."""
    spec = importlib.util.find_spec(package) if package.startswith(OURS) else None  # imports nothing
    return tuple(map(Path, spec.submodule_search_locations or ())) if spec else ()


def _path_of(dotted: str) -> Path | None:
    """The path of one of our modules, without the suffix; None for another library's."""
    top, *rest = dotted.split(".")
    return next((folder.joinpath(*rest) for folder in folders_of(top)), None)


def _source(path: Path) -> Path | None:
    return next((f for f in (path.parent / f"{path.name}.py", path / "__init__.py") if f.is_file()), None)


def _unconditional(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for s in body:
        if not isinstance(s, ast.If | ast.Try | ast.With):
            yield s
            continue
        for part in ("body", "orelse", "finalbody"):
            yield from _unconditional(getattr(s, part, []))
        for handler in getattr(s, "handlers", []):
            yield from _unconditional(handler.body)
