"""Which fields of an engine's configuration of a layer an adapter knows. What it does not know is left to the engine:
a field that a newer version adds may change what the layer computes."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

ANY = None
"""In place of neutral values: the adapter reads the field, or it changes nothing that experts compute."""
Known = Mapping[str, tuple[Any, ...] | None]
"""By field, the values that the adapter computes, or ANY."""


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
    """The same for what a function, whose parameters have the defaults, was called with."""
    parameters = inspect.signature(function).parameters
    for name, value in arguments.items():
        if reason := _refused(f"the argument {name}", value, parameters[name].default, name, known):
            return reason
    return None


def new_parameters(function: Callable[..., Any], known: Collection[str]) -> list[str]:
    """Parameters that the function has more, or less, than the adapter knows."""
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
    """repr() of what a person wrote; of a tensor, or another object of many values, its type."""
    return repr(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
