"""The version of a kernel's code: a digest of what runs, made from the syntax without importing the sources.

The digest starts at the roots, named functions and classes, and follows every name to its definition in any file.
Methods and properties are followed by the attribute's name. The version stays the same if

- names of ours change: of functions, classes, arguments, variables, constants, fields, methods and modules;
- definitions change their order, or move to other files and packages;
- comments, docstrings, the arguments of `raise`, or annotations that nothing evaluates change;
- code that is not reached changes.

Everything else makes another version: a constant, an operator, another library's name, the order of arguments, a
default value. The core is an interface to a kernel. Its constants are followed; its other names count only by where
they occur.

There are two limits, both for renames. If two classes share a name and only one renames it, the version changes. So it
does if a field's name also occurs in a string and only one of the two is renamed.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import KernelError
from .sources import (
    FUNCTIONS,
    OURS,
    Function,
    Origin,
    Place,
    binds,
    bound_by,
    folders_of,
    locate,
    members,
    module,
    origin_of,
    parameters,
)

__all__ = ["Place", "digest_of"]

UNEVALUATED = ("dataclasses.", "functools.", "contextlib.", "abc.", "typing.", "builtins.")
"""Origins of decorators that do not evaluate annotations, as compilers' decorators do."""
UNREAD = ("ctx", "kind", "type_comment", "type_params", "simple")
"""Fields of the syntax that change nothing, or that only some versions of Python have."""


@functools.cache
def digest_of(*roots: Place, apart: tuple[Path, ...] = ()) -> str:
    """Digest what the roots run to eight hexadecimal digits. Names from the files or folders `apart` are not followed.

    Computed once per process, in a tenth of a second for 1,000 lines. Raises KernelError if a source cannot be read, or
    does not define its root.
    """
    try:
        form = "\n".join(Walk(apart).form(roots))
    finally:
        module.cache_clear()
        members.cache_clear()
    return hashlib.sha256(form.encode()).hexdigest()[:8]


class Token(NamedTuple):
    """A name of ours, written as the number of its first occurrence. A "name" may prove to be another library's."""

    kind: str
    key: object


class Walk:
    """Writes down what the roots reach, in an order that depends on the syntax alone."""

    def __init__(self, apart: tuple[Path, ...] = ()) -> None:
        self.apart = (*apart, *folders_of(OURS))
        self.parts: list[str | Token] = []
        self.reached: list[tuple[Place, str]] = []
        """Definitions, with an empty name, and methods of classes, with theirs."""
        self.written = 0
        self.classes: dict[Place, ast.ClassDef] = {}
        self.annotated: list[Place] = []
        """Definitions named in annotations, which tell the classes of arguments. They come after all that runs."""
        self.attributes: dict[str, None] = {}
        self.file = Path()
        self.scopes: list[dict[str, Token | Origin]] = []

    def form(self, roots: Iterable[Place]) -> list[str]:
        """The canonical form, equal for two states of the sources that run the same."""
        for root in roots:
            if root.name not in module(root.file).bound:
                raise KernelError(f"{root.file} does not define {root.name}, which a kernel's version is made from")
            self.refer(locate(*root))
        while self.written < len(self.reached) or self.grows():
            self.written += 1
            self.define(*self.reached[self.written - 1])
        return self.numbered(self.parts)

    def grows(self) -> bool:
        """Reach the methods of known classes whose names occur; if there are none left, reach what annotations name."""
        for place, definition in list(self.classes.items()):
            known = {} if self.is_apart(place) else members(definition)
            for name in self.attributes:
                if known.get(name):
                    self.reach(place, name)
        while self.annotated and self.written == len(self.reached):
            self.learn(self.annotated.pop(0))
        return self.written < len(self.reached)

    def numbered(self, parts: list[str | Token]) -> list[str]:
        """Replace names of ours by the order of their first occurrence; keep other libraries'."""
        ours = {name: method for c in self.classes.values() for name, method in members(c).items()}
        numbers: dict[Token, int] = {}

        def spelled(part: str | Token) -> str:
            match part:
                case Token("name", str(name)) if name not in ours:
                    return f"={name}"
                case Token("keyword", (str(method), str(name))) if name not in parameters(ours.get(method)):
                    return f"={name}"
                case Token(kind):
                    return f"{kind} {numbers.setdefault(part, len(numbers))}"
            return part

        return [spelled(part) for part in parts]

    def is_apart(self, place: Place) -> bool:
        return any(place.file.is_relative_to(folder) for folder in self.apart)

    def reach(self, place: Place, method: str = "") -> None:
        if (place, method) not in self.reached:
            self.reached.append((place, method))

    def learn(self, place: Place) -> None:
        """Reach a definition. One that is apart is reached only if it is a constant; a class becomes known."""
        bound = module(place.file).bound.get(place.name, [])
        if bound and isinstance(bound[0], ast.ClassDef):
            self.classes.setdefault(place, bound[0])
        constant = bool(bound) and all(isinstance(s, ast.Assign | ast.AnnAssign) for s in bound)
        if constant or not self.is_apart(place):
            self.reach(place)

    def define(self, place: Place, method: str) -> None:
        self.file, self.scopes = place.file, []
        self.parts += ["define", Token("ours", place), Token("name", method)]
        if not method:
            self.visit(module(place.file).bound.get(place.name, []))
            return
        for s in self.classes[place].body:
            if isinstance(s, FUNCTIONS) and s.name == method:
                self.function(s)

    def visit(self, node: object) -> None:
        match node:
            case list():
                self.parts.append("[")
                for element in node:
                    self.visit(element)
                self.parts.append("]")
            case ast.Raise():
                self.parts.append("raise")
            case ast.Pass() | ast.Expr(value=ast.Constant()):
                pass
            case ast.Import() | ast.ImportFrom() | ast.Global() | ast.Nonlocal():
                pass  # names are looked up where they are used
            case ast.Constant(value=str(text)) if text.isidentifier():
                self.parts.append(Token("name", text))
            case ast.Constant(value=value):
                self.parts.append(f"{type(value).__name__} {value!r}")
            case ast.Name(id=name):
                self.refer(self.look_up(name))
            case ast.Attribute(attr=attr):
                if (origin := self.origin(node)) is not None:
                    self.refer(origin)
                else:
                    self.parts += ["attribute", Token("name", attr)]
                    self.attributes[attr] = None
                    self.visit(node.value)
            case ast.Call():
                self.call(node)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                if self.scopes:
                    self.refer(self.look_up(node.name))
                self.function(node)
            case ast.Lambda():
                self.parts.append("lambda")
                self.scoped(node.args, [node.body])
            case ast.ClassDef():
                self.class_(node)
            case ast.AnnAssign(target=target, value=value):
                self.annotate(node.annotation)
                if value:
                    self.visit(ast.Assign([target], value))
            case ast.ListComp(generators=loops) | ast.SetComp(generators=loops) | ast.DictComp(generators=loops):
                self.comprehension(node, loops)
            case ast.GeneratorExp(generators=loops):
                self.comprehension(node, loops)
            case ast.AST():
                self.generic(node)
            case _:
                self.parts.append(repr(node))

    def generic(self, node: ast.AST) -> None:
        self.parts.append(type(node).__name__)
        for field, value in ast.iter_fields(node):
            if field in ("name", "rest") and isinstance(value, str):  # of an exception, of a pattern
                self.refer(self.look_up(value))
            elif field not in UNREAD:
                self.visit(value)

    def comprehension(self, node: ast.AST, loops: list[ast.comprehension]) -> None:
        self.push(binds(loop.target for loop in loops))
        self.generic(node)
        self.scopes.pop()

    def call(self, node: ast.Call) -> None:
        """Write down a call. Keywords become the positions of parameters if the function is ours."""
        called = node.func.value if isinstance(node.func, ast.Subscript) else node.func  # kernel[grid](...)
        origin, places = self.origin(called), list[str]()
        if isinstance(origin, Place):
            places = parameters(next(iter(module(origin.file).bound.get(origin.name, [])), None))
        self.parts.append("call")
        self.visit([node.func, *node.args])
        for k in node.keywords:
            if k.arg is None or k.arg in places:
                self.parts.append("**" if k.arg is None else f"parameter {places.index(k.arg)}")
            elif isinstance(origin, str) and origin != "dataclasses.replace":
                self.parts.append(k.arg)
            elif isinstance(called, ast.Attribute) and origin is None:
                self.parts.append(Token("keyword", (called.attr, k.arg)))
            else:
                self.parts.append(Token("name", k.arg))
            self.visit(k.value)
        self.parts.append("end")

    def function(self, node: Function) -> None:
        self.parts.append(type(node).__name__)
        self.visit(node.decorator_list)
        self.annotate(node.returns)
        self.scoped(node.args, node.body, self.is_compiled(node))

    def scoped(self, args: ast.arguments, body: Sequence[ast.AST], evaluated: bool = False) -> None:
        """Write down arguments and body of a function, in a scope of their own."""
        each = [a for a in (*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg) if a]
        kinds = len(args.posonlyargs), len(args.args), args.vararg is None, len(args.kwonlyargs), args.kwarg is None
        self.parts.append(f"arguments {kinds}")
        self.visit([*args.defaults, *args.kw_defaults])
        inside = [x for s in body for x in ast.walk(s)]
        outer = {n for x in inside if isinstance(x, ast.Global | ast.Nonlocal) for n in x.names}
        self.push(n for n in (*(a.arg for a in each), *binds(body)) if n not in outer)
        for x in inside:
            if isinstance(x, ast.Import | ast.ImportFrom):
                self.scopes[-1] |= {n: origin_of(x, n, self.file) for n in map(bound_by, x.names)}
        for a in each:
            self.refer(self.look_up(a.arg))
            self.annotate(a.annotation, evaluated)
        self.visit(list(body))
        self.scopes.pop()

    def class_(self, node: ast.ClassDef) -> None:
        """Write down a class, its fields, and the methods that the language may call; with bases, all methods."""
        compiled, inner = self.is_compiled(node), bool(self.scopes)
        if inner:
            self.refer(self.look_up(node.name))
        self.parts.append("class")
        self.visit([*node.decorator_list, *node.bases, *node.keywords])
        for s in node.body:
            if not isinstance(s, FUNCTIONS):
                self.scopes.append({n: Token("name", n) for n in binds([s])})
                if isinstance(s, ast.AnnAssign):
                    self.visit(s.target)
                    self.annotate(s.annotation, compiled)
                    self.parts.append(f"field {'ClassVar' not in ast.dump(s.annotation)}")
                self.visit(s)
                self.scopes.pop()
            elif node.bases or inner or s.name.startswith("__"):
                self.parts.append(Token("name", s.name))
                self.function(s)

    def push(self, names: Iterable[str]) -> None:
        self.scopes.append({n: Token("local", (len(self.parts), n)) for n in names})

    def look_up(self, name: str) -> Token | Origin:
        found = next((scope[name] for scope in reversed(self.scopes) if name in scope), None)
        return locate(self.file, name) if found is None else found

    def origin(self, node: ast.AST) -> Origin | None:
        """Find what a dotted name stands for; None if it begins with a variable, or is an attribute of a definition."""
        match node:
            case ast.Name(id=name):
                found = self.look_up(name)
                return None if isinstance(found, Token) else found
            case ast.Attribute(value=value, attr=attr):
                match self.origin(value):
                    case str(dotted):
                        return f"{dotted}.{attr}"
                    case Path() as file:
                        return locate(file, attr)
        return None

    def refer(self, found: Token | Origin) -> None:
        if isinstance(found, Place):
            self.learn(found)
        self.parts.append(Token("ours", found) if isinstance(found, Path | Place) else found)

    def is_compiled(self, node: Function | ast.ClassDef) -> bool:
        """Whether a decorator may read the annotations."""
        origins = [self.origin(d.func if isinstance(d, ast.Call) else d) for d in node.decorator_list]
        return any(isinstance(o, str) and not o.startswith(UNEVALUATED) for o in origins)

    def annotate(self, annotation: ast.expr | None, evaluated: bool = False) -> None:
        if evaluated:
            self.visit(annotation)
        elif annotation is not None:
            origins = (self.origin(x) for x in ast.walk(annotation) if isinstance(x, ast.Name | ast.Attribute))
            self.annotated += [o for o in origins if isinstance(o, Place)]
