"""Compares an engine's configuration of a layer with the fields that an adapter knows.

A layer with an unknown field is left to the engine: a field that a newer version adds may change what is computed.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

ANY = None
"""Stands for all values: the adapter reads the field, or the field does not change what experts compute."""
Known = Mapping[str, tuple[Any, ...] | None]
"""The values that the adapter computes, by field; ANY for all."""


def misfit(config: Any, known: Known) -> str | None:
    """Name a field of a dataclass or named tuple whose value the adapter does not compute; None if there is none.

    A field that is not in `known` may have its default value, None or False.
    """
    for name, default in defaults(config):
        value = getattr(config, name)
        if reason := _refused(f"{type(config).__name__}.{name}", value, default, name, known):
            return reason
    return None


def misfit_arguments(function: Callable[..., Any], arguments: Mapping[str, Any], known: Known) -> str | None:
    """Do the same for the arguments of a call; the defaults are those of the function's parameters."""
    parameters = inspect.signature(function).parameters
    for name, value in arguments.items():
        if reason := _refused(f"the argument {name}", value, parameters[name].default, name, known):
            return reason
    return None


def new_parameters(function: Callable[..., Any], known: Collection[str]) -> list[str]:
    """Parameters that the function has and the adapter does not know, or the other way round."""
    return sorted(set(inspect.signature(function).parameters) ^ set(known))


def defaults(config: Any) -> Iterator[tuple[str, Any]]:
    """Fields of a dataclass or named tuple, instance or type, each with its default; None if it has none."""
    if dataclasses.is_dataclass(config):
        for field in dataclasses.fields(config):
            yield field.name, None if field.default is dataclasses.MISSING else field.default
    else:
        for name in config._fields:
            yield name, config._field_defaults.get(name)


def _refused(label: str, value: Any, default: Any, name: str, known: Known) -> str | None:
    neutral = known.get(name, (default, None, False))
    if neutral is ANY or any(value is n or (type(value) is type(n) and bool(value == n)) for n in neutral):
        return None
    unknown = "" if name in known else ", which ramp_moe does not know"
    return f"{label} is {_short(value)}{unknown}"


def _short(value: Any) -> str:
    """repr() of a plain value; the type's name of a tensor or any other object."""
    return repr(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
