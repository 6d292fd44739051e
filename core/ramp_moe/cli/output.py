"""Output of the commands. Text from files, plugins or the environment cannot control the terminal."""

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
    """A console that escapes control characters: all strings, also those in tables, pass `render_str`."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


def console() -> Console:
    """A console for rich output on stdout. In a file or a pipe it is wide, since nothing there wraps lines."""
    return _Console(width=None if sys.stdout.isatty() else 180, highlight=False)


def error_console(soft_wrap: bool = False) -> Console:
    """A console for progress and notes on stderr."""
    return _Console(stderr=True, highlight=False, soft_wrap=soft_wrap)


def print_json(value: Any) -> None:
    """Print `value` as JSON. Characters that would control the terminal become JSON's escapes, so nothing is lost."""
    # File names may hold lone surrogates, which no encoder takes.
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
    """Print a line without wrapping it, so that it can be copied."""
    click.echo(printable(text), err=err)


class _Notes(logging.Handler):
    """Prints the library's warnings as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"note: {record.getMessage()}", err=True)


@contextmanager
def notes_on_stderr() -> Iterator[None]:
    """Print the warnings of the library's logger while the context lasts. They reach no other handler."""
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
    """Make sure that the output arrives: exit code 2 and a line on stderr if stdout is closed or full."""
    if sys.stdout is None:
        say("Error: cannot write the output: standard output is closed", err=True)
        sys.exit(2)
    if hasattr(sys.stdout, "reconfigure"):  # a character that the encoding lacks must not end a command
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as e:
        # Python would flush again at its end.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(e, BrokenPipeError):  # the reader has closed the pipe
            sys.exit(1)
        with contextlib.suppress(OSError):
            say(f"Error: cannot write the output: {e.strerror}", err=True)
        sys.exit(2)
