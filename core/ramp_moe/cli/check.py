"""`ramp-moe check-kernel`: checks whether a kernel keeps the library's contract."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

import click
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from ..registry.registry import get_registry
from ..spec.formats import FORMATS
from ..spec.shapes import MoEShape
from ..testing.description import CHECKS, Making, run_apart, supported_shape
from ..testing.outcome import Outcome
from .options import device_option, json_option, resolve_device
from .output import console, print_json

SECONDS = 1200.0
"""Timeout of one check. Most of its time goes into compiling."""
COLOURS = {"passed": "green", "failed": "red", "skipped": "yellow"}


@click.command(name="check-kernel")
@click.argument("name")
@click.option("--model", default="olmoe-1b-7b", show_default=True, help="The shape to ask the kernel about.")
@click.option(
    "--dtype",
    type=click.Choice(list(FORMATS)),
    help="Format of the weights (default: the first that the kernel supports).",
)
@device_option
@click.option(
    "--configs",
    type=click.IntRange(min=0),
    help="Approximate number of configurations to launch, 0 for all (default: 8 on a GPU, 2 without).",
)
@json_option
@click.pass_context
def check_kernel(
    ctx: click.Context, name: str, model: str, dtype: str | None, device: str, configs: int | None, as_json: bool
) -> None:
    """Check a kernel's description for a model, and its launch on a small shape of the same dtype.

    Checks run in a process apart: if a kernel crashes, only that check fails. Without a GPU, Triton's interpreter
    runs what it can. Exit code 1 if a check fails.
    """
    registry = get_registry()
    kernel, hardware = registry.kernel(name), resolve_device(registry, device)
    shape = supported_shape(kernel, model, hardware.name, None if dtype is None else [dtype])
    outcomes = list(run_apart(Making(kernel.name, shape, hardware.name, configs), SECONDS))
    if as_json:
        print_json(
            {
                "kernel": kernel.name,
                "model": shape.label,
                "dtype": shape.dtype,
                "device": hardware.name,
                "checks": [asdict(o) for o in outcomes],
            }
        )
    else:
        console().print(*_table(kernel.name, shape, hardware.name, outcomes), sep="\n")
    if any(o.result == "failed" for o in outcomes):
        ctx.exit(1)


def _table(name: str, shape: MoEShape, device: str, outcomes: Sequence[Outcome]) -> list[RenderableType]:
    table = Table(title=f"{name}: {shape.title} on {device}")
    table.add_column("check", no_wrap=True)
    table.add_column("result")
    table.add_column("detail", overflow="fold")
    for o in outcomes:
        detail = o.detail or CHECKS[o.check]
        table.add_row(o.check, f"[{COLOURS[o.result]}]{o.result}", escape(detail))
    counts = Counter[str](o.result for o in outcomes)
    return [table, ", ".join(f"{counts[result]} {result}" for result in COLOURS)]
