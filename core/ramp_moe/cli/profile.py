"""`ramp-moe profile`: measures kernels on this machine's GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from ..dispatch.profile_store import ProfileStore, user_data_dir
from ..profiler.gpu import GpuState
from ..profiler.journal import journal_path
from ..profiler.plan import plan
from ..profiler.prior import WITHOUT_STAGES, promising
from ..profiler.session import profile
from ..profiler.settings import Result, Settings
from ..registry.registry import get_registry
from ..spec.hardware import Hardware
from ..spec.shapes import MoEShape
from . import INTERRUPTED
from .gpu import UUID_START, Display, choose_kernels, find_gpu, set_up
from .options import AtLeast, dtype_option, json_option, kernel_option, model_option, resolve_model, this_device_option
from .output import console, print_json, say


@click.command(name="profile")
@model_option
@this_device_option
@dtype_option
@kernel_option
@click.option(
    "--minutes",
    type=AtLeast(0),
    default=10.0,
    show_default=True,
    help="Stop at the end of a batch after these minutes; at least eight batches are measured. A run of up to four "
    "minutes measures only the configurations that are most promising by other shapes' profiles; one of up to two, "
    "only whole paths.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of profiles to write to (default: the user's data folder).",
)
@click.option(
    "--prune",
    type=AtLeast(1),
    default=1.15,
    show_default=True,
    help="Drop configurations that are never within this factor of their kernel's best; inf keeps all.",
)
@json_option
@click.pass_context
def profile_command(
    ctx: click.Context,
    model: str,
    device: str,
    dtype: str | None,
    kernels: tuple[str, ...],
    minutes: float,
    output: Path | None,
    prune: float,
    as_json: bool,
) -> None:
    """Measure kernels on this machine's GPU and record their profiles. After Ctrl-C, the same command continues."""
    registry = get_registry()
    shape = resolve_model(registry, model, dtype)
    state, hardware = find_gpu(registry, device)
    display = Display(minutes)
    chosen, left_out = choose_kernels(registry, kernels, registry.kernels, shape, hardware)
    folder = output or user_data_dir()
    store = ProfileStore(shipped=[folder, *registry.profile_dirs])  # other shapes' files may be unusable
    only, fewer = promising(shape, hardware, chosen, store, minutes if math.isfinite(prune) else math.inf)
    for note in (*left_out, *fewer):
        display.note(note)
    batches = plan(shape)
    setup = set_up(shape, hardware, state, chosen, max(b.num_tokens for b in batches), display.note)
    settings = Settings(minutes, folder, prune, stages=minutes > WITHOUT_STAGES, warmers=setup.warmers)
    try:
        with display:
            result = profile(
                shape, hardware, chosen, settings, setup.environment, setup.make_bench, display, batches, only
            )
    except KeyboardInterrupt:
        journal = journal_path(folder, shape, hardware)
        kept = f"what was measured is kept in {journal}; the same command goes on from it"
        say(f"interrupted: {kept if journal.exists() else 'nothing was measured'}", err=True)
        ctx.exit(INTERRUPTED)
    if as_json:
        print_json(_as_dict(shape, hardware, state, result, [*left_out, *fewer]))
    else:
        compare = f"ramp-moe compare --model {model} --dtype {shape.dtype} --device {hardware.name}"
        console().print(*_summary(shape, hardware, result), sep="\n")
        say(f"next: {compare}" + (f" --profile {output}" if output else ""))


def _as_dict(
    shape: MoEShape, hardware: Hardware, state: GpuState, result: Result, left_out: Sequence[str]
) -> dict[str, Any]:
    profiles = [
        asdict(p) | {"path": p.path and str(p.path), "superseded": p.superseded and str(p.superseded)}
        for p in result.profiles
    ]
    return {
        "model": shape.label,
        "dtype": shape.dtype,
        "device": hardware.name,
        "gpu": state.uuid[:UUID_START],
        "seconds": result.spent,
        "batches": result.batches,
        "planned": result.planned,
        "profiles": profiles,
        "notes": [*left_out, *result.notes],
    }


def _summary(shape: MoEShape, hardware: Hardware, result: Result) -> list[RenderableType]:
    table = Table(title=f"{shape.title} on {hardware.name}: {result.batches} of {result.planned} batches")
    for what in ("kernel", "run", "configurations", "pruned", "failed", "file"):
        table.add_column(what, justify="left" if what in ("kernel", "file") else "right", overflow="fold")
    lines = []
    for p in result.profiles:
        counts = (p.run, p.configs, len(p.pruned), sum(map(len, p.failed.values())))
        table.add_row(
            p.kernel, *map(str, counts), escape(str(p.path)) if p.path else "none: every configuration failed"
        )
        lines += [f"{p.kernel}/{', '.join(names)}: {reason}" for reason, names in p.failed.items()]
        if p.superseded:
            lines.append(f"{p.kernel}: the profile of another version is kept as {p.superseded}")
    notes = [f"note: {n}" for n in result.notes]
    return [table, f"measured in {result.spent / 60:.1f} minutes", *(f"[dim]{escape(n)}" for n in (*lines, *notes))]
