"""`ramp-moe plugins`, `kernels`, `models` and `profiles`: list what is registered, and what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
from rich.markup import escape
from rich.table import Table

from ..dispatch.load_model import nothing_recorded
from ..dispatch.profile_store import ProfileStore
from ..errors import describe
from ..evaluation.repeatability import spread, stage_bias
from ..measurements.sweep import Split, Sweep
from ..registry.registry import get_registry
from ..spec.formats import FORMATS
from ..spec.hardware import Hardware
from ..spec.kernel import Kernel, KernelConfig, WeightLayout, reason_of, usable_configs, why_unsupported
from ..spec.launchable import LaunchableKernel
from ..spec.shapes import Model, MoEShape
from . import tables
from .options import (
    device_option,
    dtype_option,
    json_option,
    kernel_option,
    profile_option,
    resolve_device,
    resolve_model,
)
from .output import console, print_json

GIVEN = click.core.ParameterSource.COMMANDLINE
SHARDS = (1, 2, 4, 8)
"""Tensor-parallel ranks whose shards are called by their model's name in lists."""


@click.command()
@json_option
def plugins(as_json: bool) -> None:
    """List plugins: version, origin, hooks, and what is wrong with them."""
    found = get_registry().plugins
    if as_json:
        print_json([asdict(p) for p in found])
        return
    table = Table("plugin", "version", "origin", "hooks", "state")
    for p in found:
        state = "[green]ok" if not p.problems else "[red]" + escape("\n".join(p.problems))
        table.add_row(p.name, p.version, escape(p.origin), "\n".join(p.hooks) or "none", state)
    console().print(table)


@click.group(invoke_without_command=True)
@click.option("--model", default="olmoe-1b-7b", show_default=True, help="The shape to ask the kernels about.")
@device_option
@dtype_option
@json_option
@click.pass_context
def kernels(ctx: click.Context, model: str, device: str, dtype: str | None, as_json: bool) -> None:
    """List kernels: their configurations for a model and device, or why there are none, and whether they run here.

    With a command, run the command instead.
    """
    if ctx.invoked_subcommand is not None:
        given = [f"--{name.replace('as_', '')}" for name in ctx.params if ctx.get_parameter_source(name) is GIVEN]
        if given:
            command = f"{ctx.command_path} {ctx.invoked_subcommand}"
            raise click.UsageError(f"{', '.join(given)} must come after `{command}`.")
        return
    registry = get_registry()
    shape, hardware = resolve_model(registry, model, dtype), resolve_device(registry, device)
    store = ProfileStore(shipped=registry.profile_dirs)
    rows: list[dict[str, Any]] = []
    for name, kernel in registry.kernels.items():
        count, layout, reason = describe_kernel(kernel, shape, hardware)
        rows.append(
            {
                "name": name,
                "dtype": shape.dtype,
                "num_configs": count,
                "unsupported": reason,
                "unavailable": why_unavailable(kernel),
                "weight_layout": layout and asdict(layout),
                "recorded": store.find(name, shape, hardware) is not None,
            }
        )
    if as_json:
        print_json(rows)
        return
    table = Table(
        "kernel", "configurations", "weight layout", "recorded", "runs here", title=f"{shape.title} on {hardware.name}"
    )
    for row in rows:
        shown = str(row["num_configs"]) if row["unsupported"] is None else f"[yellow]{escape(row['unsupported'])}"
        wanted = row["weight_layout"]
        memory = f"{escape(wanted['key'])}, {wanted['bytes'] / 2**30:.2f} GiB" if wanted else ""
        launchable = isinstance(registry.kernels[row["name"]], LaunchableKernel)
        runs = "only described" if not launchable else "[yellow]no" if row["unavailable"] else "yes"
        table.add_row(row["name"], shown, memory, "yes" if row["recorded"] else "no", runs)
    console().print(table)
    for row in rows:
        if row["unavailable"]:
            console().print(f"{row['name']} cannot run here: {escape(row['unavailable'])}")


def describe_kernel(kernel: Kernel, shape: MoEShape, hardware: Hardware) -> tuple[int, WeightLayout | None, str | None]:
    """(number of configurations, weight layout, why there are none). A broken plugin's error counts as a reason."""
    try:
        reason = why_unsupported(kernel, shape, hardware)
        count = len(usable_configs(kernel, shape, hardware)) if reason is None else 0
        layout = kernel.weight_layout(shape)
        if not isinstance(layout, WeightLayout):
            return 0, None, f"broken: weight_layout() returned {describe(layout)}, not a WeightLayout"
        return count, layout, reason
    except Exception as e:
        return 0, None, f"broken: {type(e).__name__}: {describe(e)}"


def why_unavailable(kernel: Kernel) -> str | None:
    """What a launchable kernel lacks on this machine; None if nothing, or if the kernel is only described."""
    try:
        return reason_of(kernel.unavailable(), "unavailable") if isinstance(kernel, LaunchableKernel) else None
    except Exception as e:
        return f"broken: {type(e).__name__}: {describe(e)}"


@click.command()
@json_option
def models(as_json: bool) -> None:
    """List named models: the sizes of their MoE layers, the formats that are profiled, and the sources of the sizes."""
    registry = get_registry()
    found = registry.models
    names = _names()
    recorded = {(device, slug) for device, _, slug in ProfileStore(shipped=registry.profile_dirs).recorded()}

    def profiled(model: Model) -> list[str]:
        """What any kernel was measured for, of the whole model or of a shard, as in `h200 fp8` and `h200 fp8 tp8`."""
        mine = {
            slug: (label.removeprefix(model.name).replace("-", " "), dtype)
            for slug, (label, dtype) in names.items()
            if label == model.name or label.startswith(f"{model.name}-tp")
        }
        return sorted(f"{device} {mine[slug][1]}{mine[slug][0]}" for device, slug in recorded if slug in mine)

    if as_json:
        rows = [(m, profiled(m)) for m in found.values()]
        print_json([asdict(m.shape) | {"formats": m.formats, "profiled": p, "source": m.source} for m, p in rows])
        return
    table = Table()
    for what in ("model", "experts", "top_k", "hidden", "intermediate", "released", "profiled", "source"):
        table.add_column(what, overflow="fold", no_wrap=what == "model")
    for m in found.values():
        s = m.shape
        sizes = [str(v) for v in (s.num_experts, s.top_k, s.hidden_size, s.intermediate_size)]
        table.add_row(m.name, *sizes, ", ".join((s.dtype, *m.formats)), ", ".join(profiled(m)), escape(m.source))
    console().print(table)
    console().print("NAME-tpN is a model's shard on one of N tensor-parallel ranks.")


@click.command()
@click.option("--model", help="As of `ramp-moe explain`. Without it, every profile is listed.")
@device_option
@dtype_option
@kernel_option
@profile_option
@json_option
def profiles(
    model: str | None,
    device: str,
    dtype: str | None,
    kernels: tuple[str, ...],
    profiles: tuple[Path, ...],
    as_json: bool,
) -> None:
    """List what was measured for a model and device: runs, batches, configurations, and how well the runs repeat.

    Without a model, list which kernels have a profile of which models, on all devices.
    """
    registry = get_registry()
    if model is None:
        given = click.get_current_context().get_parameter_source("device") is GIVEN
        only = resolve_device(registry, device).name if given else None
        _list_all(ProfileStore(profiles, registry.profile_dirs), only, dtype, kernels, as_json)
        return
    shape, hardware = resolve_model(registry, model, dtype), resolve_device(registry, device)
    store = ProfileStore(profiles, registry.profile_dirs)
    names = kernels or tuple(registry.kernels)
    store.check(names, shape, hardware)
    found = [(name, *recorded) for name in names if (recorded := store.find(name, shape, hardware))]
    if not found:
        raise nothing_recorded(registry, store, names, shape, hardware)
    rows = [
        describe_profile(path, sweep, usable_configs(registry.kernel(name), shape, hardware))
        for name, path, sweep in found
    ]
    if as_json:
        print_json(rows)
    else:
        console().print(*tables.profiles(shape, hardware, rows), sep="\n")


def _names() -> dict[str, tuple[str, str]]:
    """Label and format of every registered model and its shards, by the slug of the shape; the first of equal ones."""
    found: dict[str, tuple[str, str]] = {}
    for model in get_registry().models.values():
        for ranks in SHARDS:
            if model.shape.intermediate_size % ranks == 0:
                shape = model.shape if ranks == 1 else model.shape.shard(ranks)
                for dtype in FORMATS:
                    found.setdefault(replace(shape, dtype=dtype).slug, (shape.label, dtype))
    return found


def _list_all(
    store: ProfileStore, device: str | None, dtype: str | None, kernels: tuple[str, ...], as_json: bool
) -> None:
    """List every profile, of all devices, formats and kernels if none is given."""
    found: dict[tuple[str, str, str], list[str]] = {}
    names = _names()
    for where, kernel, slug in sorted(store.recorded()):
        label, format = names.get(slug, (slug, slug.split("-", 4)[-1]))
        if device in (None, where) and dtype in (None, format) and (not kernels or kernel in kernels):
            found.setdefault((where, label, format), []).append(kernel)
    if as_json:
        print_json(
            [dict(zip(("device", "model", "dtype"), of, strict=True)) | {"kernels": k} for of, k in found.items()]
        )
        return
    table = Table()
    for what in ("device", "model", "dtype", "kernels"):
        table.add_column(what, overflow="fold")
    for (where, label, format), have in found.items():
        table.add_row(where, escape(label), format, escape(", ".join(have)))
    console().print(table)
    console().print("`ramp-moe profiles --model MODEL` has the runs, the batches, and how well they repeat.")


def describe_profile(path: Path, sweep: Sweep, configs: Sequence[KernelConfig]) -> dict[str, Any]:
    """A profile's runs, sizes and repeatability, as `ramp-moe profiles --json` prints them."""
    bias = stage_bias(sweep, configs)
    splits: tuple[Split, ...] = ("tune", "test")
    return {
        "kernel": sweep.kernel,
        "dtype": sweep.shape.dtype,
        "kernel_version": sweep.record.kernel_version,
        "file": str(path),
        "runs": msgspec.to_builtins(sweep.record.runs),
        "batches": {split: len(sweep.batches_of(split)) for split in splits},
        "columns": {kind: sum(c.stage == kind for c in sweep.record.columns) for kind in sweep.stages},
        "left_out": msgspec.to_builtins(sweep.record.left_out),
        "spread": [asdict(s) | {"high": None if math.isinf(s.high) else s.high} for s in spread(sweep)],
        "stages_over_path": {"median": float(np.median(bias)), "p95": float(np.quantile(np.abs(bias), 0.95))}
        if len(bias)
        else None,
    }
