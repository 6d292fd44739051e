"""Rewrites code without changing what it does: names and files are renamed, docstrings and messages reworded, and
definitions reordered."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterable
from pathlib import Path

from ramp_moe.spec import sources
from ramp_moe.spec.versions import Place, Walk

KERNELS, CORE = "ramp_moe_moved", "ramp_moe"


def renamed(name: str) -> str:
    dunder = name.startswith("__") and name.endswith("__")
    return name if dunder or hasattr(builtins, name) else f"r_{name[::-1]}"


class Rewriting:
    """A rewriting of the code that some roots reach. `write` makes the files. `place` says where a root went."""

    def __init__(self, roots: Iterable[Place], apart: tuple[Path, ...] = ()) -> None:
        walk = Walk(apart)
        walk.form(roots)
        self.members = {name: method for c in walk.classes.values() for name, method in sources.members(c).items()}
        named = [t.key for t in walk.parts if isinstance(t, tuple) and isinstance(t.key, Path | Place)]
        files = [key.file if isinstance(key, Place) else key for key in named]
        files += [p.file for p in walk.classes]
        self.files = list(dict.fromkeys(f for f in files if f.is_file()))
        self.apart = walk.apart
        self.halves: dict[Place, str] = {}

    def module(self, file: Path) -> str:
        apart = any(file.is_relative_to(folder) for folder in self.apart)
        number = self.files.index(file) if file in self.files else "gone"
        return f"{CORE if apart else KERNELS}.part{number}"

    def place(self, root: Place, folder: Path) -> Place:
        return Place(folder.joinpath(*f"{self.module(root.file)}a".split(".")).with_suffix(".py"), renamed(root.name))

    def write(self, folder: Path) -> None:
        for file in self.files:
            body = list(sources._unconditional(ast.parse(file.read_bytes()).body))
            imports = [s for s in body if isinstance(s, ast.Import | ast.ImportFrom)]
            rest = [s for s in body if s not in imports][::-1]
            halves = {"a": rest[::2], "b": rest[1::2]}
            bound = {half: [*sources.binds(statements)] for half, statements in halves.items()}
            own = Words(self, file)
            moved = {half: [own.visit(s) for s in [*imports, *statements]] for half, statements in halves.items()}
            path = folder.joinpath(*self.module(file).split("."))
            path.parent.mkdir(exist_ok=True)
            for half, other in (("a", "b"), ("b", "a")):
                names = [renamed(n) for n in bound[other] if n not in bound[half]]
                across = [f"from {self.module(file)}{other} import {', '.join(names)}"] if names else []
                text = [*across, *(ast.unparse(s) for s in moved[half] if s is not None)]
                path.with_name(f"{path.name}{half}.py").write_text("\n".join(['"""Moved."""', *text]) + "\n")


class Words(ast.NodeTransformer):
    """Renames the statements of a file."""

    def __init__(self, to: Rewriting, file: Path) -> None:
        self.to, self.file = to, file

    def external(self, node: ast.AST) -> bool:
        """Whether a dotted name begins with a name of another library."""
        while isinstance(node, ast.Attribute | ast.Subscript):
            node = node.value
        if not isinstance(node, ast.Name):
            return False
        bound = sources.module(self.file).bound
        return isinstance(sources.locate(self.file, node.id), str) and (node.id in bound or hasattr(builtins, node.id))

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(renamed(node.id), node.ctx)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return ast.arg(renamed(node.arg), self.visit(node.annotation) if node.annotation else None)

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> ast.AST:
        self.generic_visit(node)
        node.name = node.name and renamed(node.name)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        origin = sources.locate(self.file, node.value.id) if isinstance(node.value, ast.Name) else None
        of_module = isinstance(origin, Path)
        ours = of_module or (node.attr in self.to.members and not self.external(node))
        return ast.Attribute(self.visit(node.value), renamed(node.attr) if ours else node.attr, node.ctx)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return ast.Constant(renamed(node.value)) if node.value in self.to.members else node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        called = node.func.value if isinstance(node.func, ast.Subscript) else node.func
        origin = sources.locate(self.file, called.id) if isinstance(called, ast.Name) else None
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
            module = sources.locate(self.file, called.value.id)
            origin = sources.locate(module, called.attr) if isinstance(module, Path) else None
        if isinstance(origin, Place):
            bound = sources.module(origin.file).bound.get(origin.name, [None])
            ours = {*sources.parameters(bound[0]), *self.to.members}
        elif origin == "dataclasses.replace" or not self.external(called):
            method = self.to.members.get(called.attr) if isinstance(called, ast.Attribute) else None
            ours = set(sources.parameters(method)) if isinstance(called, ast.Attribute) else set(self.to.members)
        else:
            ours = set()
        for k in node.keywords:
            k.arg = renamed(k.arg) if k.arg in ours else k.arg
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return ast.parse("raise RuntimeError('in other words')").body[0]

    def visit_Import(self, node: ast.Import) -> ast.AST:
        names = [ast.alias(a.name, renamed(a.asname or a.name)) for a in node.names if a.asname or "." not in a.name]
        kept = [ast.alias(a.name, renamed(a.name.partition(".")[0])) for a in node.names if not a.asname]
        return ast.Import(names or [ast.alias(k.name.partition(".")[0], k.asname) for k in kept])

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:
        if node.module == "__future__":
            return None
        lines = []
        for a in node.names:
            name, found = renamed(a.asname or a.name), sources.origin_of(node, a.asname or a.name, self.file)
            match found:
                case Place(file, original):
                    lines.append(f"from {self.to.module(file)}a import {renamed(original)} as {name}")
                case Path():
                    package, _, module = self.to.module(found).rpartition(".")
                    lines.append(f"from {package} import {module}a as {name}")
                case str():
                    package, _, original = found.rpartition(".")
                    lines.append(f"from {package} import {original} as {name}")
        return ast.parse("if True:\n  " + "\n  ".join(lines)).body[0] if len(lines) > 1 else ast.parse(lines[0]).body[0]

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.name = renamed(node.name)
        if isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant):
            del node.body[0]
        node.body.insert(0, ast.Expr(ast.Constant("In other words.")))
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.generic_visit(node)
        node.name = renamed(node.name)
        node.body.insert(0, ast.Expr(ast.Constant("In other words.")))
        return node
