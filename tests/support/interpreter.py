"""Makes Triton's interpreter replace the functions of its language once a launch, not at each call of a helper."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from triton.language import core
from triton.runtime import interpreter


@cache
def _builtins(package: Any) -> list[tuple[str, Any]]:
    return [(name, member) for name in dir(package) if core.is_builtin(member := getattr(package, name, None))]


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    for name, member in _builtins(package):
        interpreter._patch_attr(package, name, member, builder, scope)


def _once_a_launch(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Of `patch`, which a launch calls first, and restores at its end. What a helper called by the launch would replace
    is replaced already, unless the helper sees another module of the language."""
    patched: set[int] = set()

    def patch_lang(fn: Any) -> Any:
        seen = {id(value) for value in fn.__globals__.values() if value is interpreter.tl or value is core}
        if seen and seen <= patched:
            return interpreter._LangPatchScope()
        scope = patch(fn)
        if not patched:  # the launch itself
            restore = scope.restore

            def restored() -> None:
                patched.clear()
                restore()

            scope.restore = restored
        patched.update(seen)
        return scope

    return patch_lang


def quicken() -> None:
    """Changes nothing that a kernel computes, and halves the time of one that calls helpers. Versions of Triton whose
    interpreter replaces in another way stay as they are."""
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_builtin = _patch_builtin
        interpreter._patch_lang = _once_a_launch(interpreter._patch_lang)
