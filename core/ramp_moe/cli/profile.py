"""`ramp-moe profile`: measure kernels on the GPU of this machine."""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import click
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from ..device import LaunchableKernel
from ..errors import HardwareError, KernelError
from ..hardware import Hardware, detect, identify
from ..kernel import WeightLayout
from ..plugins import Registry, get_registry
from ..profiler.gpu import GpuState, check_memory, gpu_state, memory_needed
from ..profiler.journal import journal_path
from ..profiler.plan import plan
from ..profiler.session import CHECK_TOKENS, profile, sliver_experts
from ..profiler.settings import Environment, Result, Settings, default_warmers
from ..profiler.worker import BenchLike, make_gpu_bench
from ..shapes import MoEShape
from ..store import user_data_dir
from .listing import describe_kernel, why_unavailable
from .options import console, dtype_option, json_option, kernel_option, model_option, print_json

UUID_START = 12
"""Characters of a GPU's UUID ("GPU-" and eight digits) that tell one from another."""
INTERRUPTED = 130


@click.command(name="profile")
@model_option
@dtype_option
@kernel_option
@click.option(
    "--minutes",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    help="Stop after these, at the end of a batch; eight batches are measured in any case.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of profiles to write to (default: the user's data folder).",
)
@click.option(
    "--prune",
    type=click.FloatRange(min=1),
    default=1.2,
    show_default=True,
    help="Drop configurations that are never within this factor of the best; inf keeps all.",
)
@json_option
@click.pass_context
def profile_command(
    ctx: click.Context,
    model: str,
    dtype: str,
    kernels: tuple[str, ...],
    minutes: float,
    output: Path | None,
    prune: float,
    as_json: bool,
) -> None:
    """Measure kernels on this machine's GPU and record their profiles. Interrupted, the same command goes on."""
    registry = get_registry()
    shape = registry.shape(model, dtype)
    state = gpu_state()
    # Without its SM count, which takes a CUDA context: the worker has one, and refuses a MIG slice.
    hardware = identify(registry.hardware.values(), state.name)
    display = _Display(minutes)
    chosen, left_out = _choose(registry, kernels, shape, hardware)
    for note in left_out:
        display.note(note)
    batches = plan(shape)
    check_memory(shape, _layouts(chosen, shape), max(b.num_tokens for b in batches), state)
    busy = state.busy()
    if busy:
        display.note(f"warning: {busy}")
    environment = Environment(state.name, state.driver, state.uuid[:UUID_START], _software(), [busy] if busy else [])
    folder = output or user_data_dir()
    settings = Settings(minutes, folder, prune, warmers=_warmers(chosen, shape, state))
    bench = functools.partial(_make_bench, shape, hardware.name, [k.name for k in chosen])
    try:
        with display:
            result = profile(
                shape,
                hardware,
                chosen,
                settings,
                environment,
                lambda experts: functools.partial(bench, experts),
                display,
                batches,
            )
    except KeyboardInterrupt:
        journal = journal_path(folder, shape, hardware)
        kept = f"what was measured is kept in {journal}, the same command goes on from it"
        click.echo(f"interrupted: {kept if journal.exists() else 'nothing was measured'}", err=True)
        ctx.exit(INTERRUPTED)
    if as_json:
        print_json(_as_dict(shape, hardware, state, result, left_out))
    else:
        compare = f"ramp-moe compare --model {model} --dtype {dtype} --device {hardware.name}"
        console().print(*_summary(shape, hardware, result), sep="\n")
        click.echo(f"next: {compare}" + (f" --profile {output}" if output else ""))


def _make_bench(shape: MoEShape, hardware: str, kernels: Sequence[str], experts: int | None) -> BenchLike:
    """In the worker: a bench, once this is surely the GPU that the profile will be filed under."""
    found = detect(get_registry().hardware.values())
    if found.name != hardware:
        raise HardwareError(f"CUDA's first GPU is {found.name}, nvidia-smi's {hardware}; set CUDA_VISIBLE_DEVICES")
    return make_gpu_bench(shape, hardware, kernels, experts)


def _choose(
    registry: Registry, names: Sequence[str], shape: MoEShape, hardware: Hardware
) -> tuple[list[LaunchableKernel], list[str]]:
    """The kernels to measure, and why others are not. Raises KernelError where one that was asked for, or all, cannot
    be."""
    chosen, left_out = [], []
    for name in dict.fromkeys(names) or registry.kernels:
        kernel = registry.kernel(name)
        if not isinstance(kernel, LaunchableKernel):
            reason: str | None = "it is only described, there is nothing to launch"
        else:
            reason = describe_kernel(kernel, shape, hardware)[2] or why_unavailable(kernel)
            if reason is None:
                chosen.append(kernel)
                continue
        if names:
            raise KernelError(f"kernel {name} cannot be profiled for {shape.label} on {hardware.name}: {reason}")
        left_out.append(f"{name} left out: {reason}")
    if not chosen:
        raise KernelError(f"no kernel can be profiled for {shape.label} on {hardware.name}: {'; '.join(left_out)}")
    return chosen, left_out


def _layouts(kernels: Iterable[LaunchableKernel], shape: MoEShape) -> list[WeightLayout]:
    layouts = [k.weight_layout(shape) for k in kernels]
    return list({layout.key: layout for layout in layouts}.values())


def _warmers(kernels: Sequence[LaunchableKernel], shape: MoEShape, state: GpuState) -> int:
    """Processes that compile: no more than have room on the GPU at the same time."""
    sliver = replace(shape, num_experts=sliver_experts(shape))
    needed = sum(memory_needed(sliver, _layouts(kernels, sliver), CHECK_TOKENS).values())
    return max(1, min(default_warmers(), state.free_bytes // needed))


def _software() -> dict[str, str]:
    """Versions of what has a part in the times."""
    import torch

    versions = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda or "none",
    }
    for name in ("triton", "ramp-moe"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


class _Display:
    """The run's progress on stderr: a bar on a terminal, else a line for each phase."""

    def __init__(self, minutes: float) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._seconds = minutes * 60
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]} [dim]{task.fields[doing]}"),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", visible=False, left="", doing="")

    def __enter__(self) -> None:
        self._bar.start()

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def phase(self, name: str, steps: int) -> None:
        if self._console.is_terminal:
            self._bar.reset(self._task, description=name, total=steps, visible=True, left="", doing="")
        else:
            self._console.print(f"{name}: {steps} {'batches at most' if name == 'measure' else 'configurations'}")

    def at(self, done: int, doing: str, spent: float) -> None:
        left = self._seconds - spent
        clock = "time is up" if left <= 0 else f"{left / 60:.1f} minutes left"
        self._bar.update(self._task, completed=done, doing=escape(doing), left=clock)

    def note(self, text: str) -> None:
        self._console.print(escape(text))


def _as_dict(
    shape: MoEShape, hardware: Hardware, state: GpuState, result: Result, left_out: Sequence[str]
) -> dict[str, Any]:
    profiles = [
        asdict(p) | {"path": p.path and str(p.path), "superseded": p.superseded and str(p.superseded)}
        for p in result.profiles
    ]
    return {
        "model": shape.label,
        "device": hardware.name,
        "gpu": state.uuid[:UUID_START],
        "seconds": result.spent,
        "batches": result.batches,
        "planned": result.planned,
        "profiles": profiles,
        "notes": [*left_out, *result.notes],
    }


def _summary(shape: MoEShape, hardware: Hardware, result: Result) -> list[RenderableType]:
    table = Table(title=f"{shape.label} on {hardware.name}: {result.batches} of {result.planned} batches")
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
