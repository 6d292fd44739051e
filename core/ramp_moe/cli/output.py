"""What the commands print. Nothing that a file, a plugin or the environment says may steer the terminal."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.text import Text

from ..terminal import STEERING, printable


class _Console(Console):
    """Every string that is printed, in a table or by itself, passes `render_str`."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


def console() -> Console:
    """Rich output; wide where it goes to a file or a pipe, since nothing there wraps to 80 columns."""
    return _Console(width=None if sys.stdout.isatty() else 180, highlight=False)


def error_console(soft_wrap: bool = False) -> Console:
    """The same on stderr, for progress and notes."""
    return _Console(stderr=True, highlight=False, soft_wrap=soft_wrap)


def print_json(value: Any) -> None:
    """`value` as JSON. Characters that would steer the terminal are JSON's own escapes, so that nothing is lost."""
    # Names of files may hold halves of characters, which no encoder takes.
    plain = msgspec.to_builtins(value)
    try:
        encoded = msgspec.json.encode(plain)
    except UnicodeEncodeError:
        encoded = msgspec.json.encode(_without_halves(plain))
    text = msgspec.json.format(encoded, indent=2).decode()
    click.echo(STEERING.sub(lambda m: f"\\u{ord(m[0]):04x}", text))


def _without_halves(value: Any) -> Any:
    match value:
        case str():
            return printable(value)
        case dict():
            return {_without_halves(k): _without_halves(v) for k, v in value.items()}
        case list() | tuple():
            return [_without_halves(v) for v in value]
    return value


def say(text: str, err: bool = False) -> None:
    """A line that is never wrapped, so that it can be copied."""
    click.echo(printable(text), err=err)


class _Notes(logging.Handler):
    """The library's warnings as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"note: {record.getMessage()}", err=True)


@contextmanager
def notes_on_stderr() -> Iterator[None]:
    """While the context lasts, what the library's logger warns of is printed, and reaches no other handler."""
    logger, handler = logging.getLogger("ramp_moe"), _Notes(logging.WARNING)
    before, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


@contextmanager
def written_out() -> Iterator[None]:
    """Make sure that what was printed arrived: exit code 2 and a line on stderr where stdout is closed or full."""
    if sys.stdout is None:
        say("Error: cannot write the output: standard output is closed", err=True)
        sys.exit(2)
    if hasattr(sys.stdout, "reconfigure"):  # an encoding that lacks a character must not end a command
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as e:
        # Python would try again when it ends.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(e, BrokenPipeError):  # whoever read it has seen enough
            sys.exit(1)
        with contextlib.suppress(OSError):
            say(f"Error: cannot write the output: {e.strerror}", err=True)
        sys.exit(2)
