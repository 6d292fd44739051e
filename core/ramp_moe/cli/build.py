"""`ramp-moe kernels build`: compile kernels ahead of time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..errors import KernelError, RampMoEError, describe
from ..registry.registry import Registry, get_registry
from ..spec.hardware import Hardware
from ..spec.kernel import BuildableKernel, Built
from ..spec.shapes import MoEShape
from . import INTERRUPTED
from .listing import describe_kernel
from .options import (
    device_option,
    dtype_option,
    json_option,
    kernel_option,
    model_option,
    resolve_device,
    resolve_model,
)
from .output import console, error_console, print_json, say


@click.command(name="build")
@model_option
@device_option
@dtype_option
@kernel_option
@click.option("--jobs", type=click.IntRange(min=1), help="Processes that compile (default: about one per core).")
@click.option("--prune", is_flag=True, help="Afterwards delete what other versions of the kernel left in the cache.")
@json_option
@click.pass_context
def build_command(
    ctx: click.Context,
    model: str,
    device: str,
    dtype: str | None,
    kernels: tuple[str, ...],
    jobs: int | None,
    prune: bool,
    as_json: bool,
) -> None:
    """Compile kernels for a model ahead of time; needs no GPU. What is compiled already is kept.

    Without --kernel, a kernel that cannot be compiled here is left out with its reason, if another can be compiled.
    Exit code 1 if a kernel is left without any configuration.
    """
    registry = get_registry()
    shape, hardware = resolve_model(registry, model, dtype), resolve_device(registry, device)
    rows, failed = [], list[str]()
    try:
        buildable = _buildable(registry, kernels, shape, hardware)
        for kernel in buildable:
            try:
                built = _build(kernel, shape, hardware, jobs)
            except RampMoEError as e:
                if kernels or len(buildable) == 1:
                    raise
                failed.append(f"{kernel.name} left out: {e}")
                continue
            rows.append((kernel.name, built, kernel.prune() if prune else 0))
    except KeyboardInterrupt:
        say("interrupted: what was compiled is kept; the same command goes on from it", err=True)
        ctx.exit(INTERRUPTED)
    if failed and not rows:
        raise KernelError(f"nothing was built for {shape.title} on {hardware.name}: {'; '.join(failed)}")
    for line in failed:
        say(f"note: {line}", err=True)
    if as_json:
        print_json([{"model": shape.label, "dtype": shape.dtype} | _as_dict(*row) for row in rows])
    else:
        _print(rows, shape, hardware)
    if not all(built.compiled or built.reused for _, built, _ in rows):
        ctx.exit(1)


def _buildable(registry: Registry, asked: Sequence[str], shape: MoEShape, hardware: Hardware) -> list[BuildableKernel]:
    """The kernels to build: those that were asked for, or all that can be built.

    Raises KernelError if a kernel that was asked for cannot be built, or if no kernel can.
    """
    found, left_out = [], []
    for name in dict.fromkeys(asked) or registry.kernels:
        kernel = registry.kernel(name)
        if not isinstance(kernel, BuildableKernel):
            reason: str | None = "it is not compiled ahead of time; there is nothing to build"
        else:
            reason = describe_kernel(kernel, shape, hardware)[2]
            if reason is None:
                found.append(kernel)
                continue
            left_out.append(f"{name}: {reason}")
        if asked:
            raise KernelError(f"kernel {name} cannot be built for {shape.title} on {hardware.name}: {reason}")
    if not found:
        reasons = "; ".join(left_out) or "no registered kernel is compiled ahead of time"
        raise KernelError(f"nothing to build for {shape.title} on {hardware.name}: {reasons}")
    return found


def _build(kernel: BuildableKernel, shape: MoEShape, hardware: Hardware, jobs: int | None) -> Built:
    """Build a kernel, with a progress bar if stderr is a terminal."""
    screen = error_console()
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, TextColumn("[dim]{task.fields[last]}"), console=screen, disable=not screen.is_terminal, transient=True
    ) as bar:
        task = bar.add_task(f"build {kernel.name}", total=None, last="")

        def report(done: int, total: int, last: str) -> None:
            bar.update(task, completed=done, total=total, last=escape(last))

        try:
            return kernel.build(shape, hardware, report, jobs)
        except RampMoEError:
            raise
        except Exception as e:  # a plugin's own mistake, which must not look like ours
            raise KernelError(f"kernel {kernel.name} fails to build: {type(e).__name__}: {describe(e)}") from e


def _as_dict(name: str, built: Built, freed: int) -> dict[str, Any]:
    return {"kernel": name} | asdict(built) | {"folder": str(built.folder), "pruned_bytes": freed}


def _print(rows: Sequence[tuple[str, Built, int]], shape: MoEShape, hardware: Hardware) -> None:
    table = Table(title=f"{shape.title} on {hardware.name}")
    for what in ("kernel", "compiled", "already there", "dropped", "MB", "CPU seconds", "seconds", "folder"):
        table.add_column(what, justify="left" if what in ("kernel", "folder") else "right", overflow="fold")
    lines = []
    for name, b, freed in rows:
        counts = (len(b.compiled), len(b.reused), len(b.dropped))
        figures = (f"{b.bytes / 1e6:.1f}", f"{b.cpu_seconds:.1f}", f"{b.seconds:.1f}")
        table.add_row(name, *map(str, counts), *figures, escape(str(b.folder)))
        lines += [f"{name}/{config} dropped: {reason}" for config, reason in b.dropped.items()]
        lines += [f"note: {note}" for note in b.notes]
        if freed:
            lines.append(f"{name}: {freed / 1e6:.1f} MB of other versions deleted")
    console().print(table, *(f"[dim]{escape(line)}" for line in lines), sep="\n")
