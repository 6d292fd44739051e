"""`ramp-moe regions`, `fit` and `explain`: what limits a batch, and what to run for it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from ..cost_model.fit_file import make_record, save_fit
from ..cost_model.model import get_form, provenance
from ..cost_model.regions import analyse
from ..dispatch.explanation import in_parts, rank, weigh_layouts
from ..dispatch.load_model import fit_recorded, load_model
from ..dispatch.profile_store import FIT_SUFFIX, ProfileStore, relative_path, user_data_dir
from ..errors import NoProfileError
from ..evaluation.comparison import compare_recorded
from ..evaluation.replay import load_replay, of_plugins
from ..registry.registry import get_registry
from ..spec.kernel import usable_configs
from . import tables
from .options import (
    batch_options,
    device_option,
    dtype_option,
    form_option,
    json_option,
    kernel_option,
    model_option,
    profile_option,
    read_batch,
    resolve_device,
    resolve_model,
)
from .output import console, print_json
from .unmeasured import explain_unmeasured, render


@click.command()
@model_option
@device_option
@dtype_option
@batch_options
@json_option
def regions(
    model: str,
    device: str,
    dtype: str | None,
    tokens: int | None,
    routing: str,
    seed: int,
    histogram: str | None,
    as_json: bool,
) -> None:
    """Explain which optimisation of a MoE kernel should pay for a batch, from the hardware's constants."""
    registry = get_registry()
    shape, hardware = resolve_model(registry, model, dtype), resolve_device(registry, device)
    batch, counts = read_batch(shape, tokens, routing, seed, histogram)
    found = analyse(shape, hardware, counts)
    if as_json:
        about = {"model": shape.label, "dtype": shape.dtype, "device": hardware.name, "batch": batch}
        print_json(about | asdict(found))
    else:
        console().print(*tables.regions(shape, hardware, batch, found), sep="\n")


@click.command()
@model_option
@device_option
@dtype_option
@kernel_option
@profile_option
@form_option
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder to write to (default: the user's data folder).",
)
@json_option
def fit(
    model: str,
    device: str,
    dtype: str | None,
    kernels: tuple[str, ...],
    profiles: tuple[Path, ...],
    form: str,
    output: Path | None,
    as_json: bool,
) -> None:
    """Fit the cost model to recorded sweeps, judge it on batches that it has not seen, and store its coefficients."""
    get_form(form)
    registry = get_registry()
    shape, hardware = resolve_model(registry, model, dtype), resolve_device(registry, device)
    store = ProfileStore(profiles, registry.profile_dirs)
    names = kernels or tuple(
        dict.fromkeys(
            [*load_replay(registry, store, shape, hardware).kernels, *of_plugins(registry, store, shape, hardware)]
        )
    )
    written: list[dict[str, Any]] = []
    for name in names:
        replay = load_replay(registry, store, shape, hardware, [name])
        quality = compare_recorded(replay, form).baselines["histogram"].as_dict()
        _, sweep = store.require(name, shape, hardware)
        configs = usable_configs(registry.kernel(name), shape, hardware)
        cost_model = fit_recorded(sweep, configs, hardware, form)
        path = (output or user_data_dir()) / relative_path(name, shape, hardware, FIT_SUFFIX)
        save_fit(path, make_record(cost_model, sweep, quality))
        errors = [f.rms_error for f in cost_model.fits.values()]
        written.append(
            {
                "kernel": name,
                "model": shape.label,
                "dtype": shape.dtype,
                "form": form,
                "batches": len(replay.labels),
                "stages": len(errors),
                "rms_error": {"median": float(np.median(errors)), "max": max(errors)},
                "regret": quality,
                "measured": provenance(sweep),
                "file": str(path),
            }
        )
    if as_json:
        print_json(written)
    else:
        console().print(*tables.fits(shape, hardware, written), sep="\n")


@click.command()
@model_option
@device_option
@dtype_option
@batch_options
@kernel_option
@profile_option
@form_option
@click.option("--top", type=click.IntRange(min=1), default=10, show_default=True, help="Candidates to show.")
@json_option
def explain(
    model: str,
    device: str,
    dtype: str | None,
    tokens: int | None,
    routing: str,
    seed: int,
    histogram: str | None,
    kernels: tuple[str, ...],
    profiles: tuple[Path, ...],
    form: str,
    top: int,
    as_json: bool,
) -> None:
    """Show the predicted time of each candidate for one batch, which wins, and what a second weight copy would gain.

    Without a profile, show what the cost model guesses from other shapes or devices. If none has a profile in this
    dtype either, show each kernel's own choice and its grids.
    """
    get_form(form)
    registry = get_registry()
    shape, hardware = resolve_model(registry, model, dtype), resolve_device(registry, device)
    batch, counts = read_batch(shape, tokens, routing, seed, histogram)
    store = ProfileStore(profiles, registry.profile_dirs)
    try:
        cost_model, notes = load_model(registry, store, shape, hardware, kernels, form)
    except NoProfileError:
        if any(store.find(k, shape, hardware) or store.find_fit(k, shape, hardware) for k in kernels):
            raise
        found = explain_unmeasured(registry, kernels, shape, hardware, counts)
        if as_json:
            about = {"model": shape.label, "dtype": shape.dtype, "device": hardware.name, "batch": batch}
            print_json(about | {"figures": "grids", "guessed": False} | found | {"histogram": counts.tolist()})
        else:
            console().print(*render(shape, hardware, batch, counts, found), sep="\n")
        return
    candidates, layouts = (
        rank(registry.kernels, cost_model, counts),
        weigh_layouts(registry.kernels, cost_model, counts),
    )
    notes = [*notes, *in_parts(candidates)]
    if as_json:
        about = {
            "model": shape.label,
            "dtype": shape.dtype,
            "device": hardware.name,
            "batch": batch,
            "form": cost_model.form,
        }
        stages = {"stages": cost_model.covered, "measured": list(cost_model.measured)}
        found = {"layouts": layouts, "candidates": candidates}
        flags = {"figures": "predicted", "guessed": cost_model.guessed}
        print_json(about | flags | stages | {"notes": notes, "histogram": counts.tolist()} | found)
    else:
        console().print(*tables.explanation(cost_model, batch, counts, candidates[:top], layouts, notes), sep="\n")
