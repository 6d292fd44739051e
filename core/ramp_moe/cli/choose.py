"""`ramp-moe regions`, `fit` and `explain`: where a batch stands, and what to run for it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from ..cost_model.fit_file import make_record, save_fit
from ..cost_model.model import CostModel, get_form, provenance
from ..cost_model.regions import analyse
from ..dispatch.load_model import fit_recorded, load_model
from ..dispatch.profile_store import FIT_SUFFIX, ProfileStore, relative_path, user_data_dir
from ..dispatch.weight_layouts import choose_layouts, kernel_times, weighed_batches
from ..errors import NoProfileError
from ..evaluation.comparison import compare_recorded
from ..evaluation.replay import load_replay, of_plugins
from ..registry.registry import Registry, get_registry
from ..spec.kernel import most_tokens, usable_configs
from ..spec.routing import FloatArray, IntArray
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
from .unmeasured import explain_unmeasured, grid_figures, render


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
    """Fit the cost model to recorded sweeps, judge it on batches that it did not see, and store the coefficients."""
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
    """Show what each candidate is predicted to cost for one batch, which wins, and what a second copy would gain.

    Without a profile: what each kernel runs by its own choice, and the grids of that.
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
            about |= {"figures": "grids"}
            print_json(about | found | {"histogram": counts.tolist()})
        else:
            console().print(*render(shape, hardware, batch, counts, found), sep="\n")
        return
    candidates, layouts = _explained(registry, cost_model, counts), _layouts(registry, cost_model, counts)
    notes = [*notes, *_in_parts(candidates)]
    if as_json:
        about = {"model": shape.label, "dtype": shape.dtype, "device": hardware.name, "batch": batch, "form": form}
        stages = {"stages": cost_model.covered, "measured": list(cost_model.measured)}
        found = {"layouts": layouts, "candidates": candidates}
        print_json(about | {"figures": "predicted"} | stages | {"notes": notes, "histogram": counts.tolist()} | found)
    else:
        console().print(*tables.explanation(cost_model, batch, counts, candidates[:top], layouts, notes), sep="\n")


def _explained(registry: Registry, model: CostModel, histogram: IntArray) -> list[dict[str, Any]]:
    """Every candidate with its prediction and what the model sees of it, the fastest first. `launches`: in how many a
    layer computes the batch, since one takes no more tokens than `max_tokens`; None if any number."""
    prediction, tokens = model.predict(histogram), -(-int(histogram.sum()) // model.shape.top_k)
    rows = []
    for i in np.argsort(prediction.us, kind="stable").tolist():
        candidate = model.candidates[i]
        most = most_tokens(registry.kernel(candidate.kernel), candidate.config, model.shape)
        rows.append(
            {
                "kernel": candidate.kernel,
                "config": candidate.config.name,
                "predicted_us": float(prediction.us[i]),
                "extrapolated": bool(prediction.extrapolated[i]),
                "gemms": grid_figures(candidate.config, histogram, model.hardware.num_sms),
                "max_tokens": most,
                "launches": 1 if most is None else max(1, -(-tokens // most)),
            }
        )
    return rows


def _in_parts(candidates: list[dict[str, Any]]) -> list[str]:
    """What is to be said of kernels that take the batch in several launches."""
    most: dict[str, int] = {}
    for c in candidates:
        if c["launches"] > 1:
            most[c["kernel"]] = max(c["max_tokens"], most.get(c["kernel"], 0))
    return [f"{kernel} takes up to {n:,} tokens in one launch; the batch runs in parts" for kernel, n in most.items()]


def _layouts(registry: Registry, model: CostModel, histogram: IntArray) -> dict[str, Any]:
    """What one copy of the weights serves, what two do, and the predicted time that the second copy gains: fractions of
    that with two, for this batch and on average over the batches that the layouts are weighed on."""
    names = sorted({c.kernel for c in model.candidates})
    kernels, batches = [registry.kernel(name) for name in names], weighed_batches(model)
    weighed, here = (kernel_times(model, names, h) for h in (batches, histogram[None]))
    one, two = (choose_layouts(model.shape, kernels, copies, weighed) for copies in (1, 2))

    def gain(us: FloatArray) -> float:
        with_one, with_two = (us[:, [names.index(k) for k in c.kernels]].min(1) for c in (one, two))
        return float((with_one / with_two).mean() - 1)

    return {
        "one_copy": asdict(one),
        "two_copies": asdict(two),
        "gain_of_second": {"this_batch": gain(here), "weighed": gain(weighed)},
        "weighed": {"batches": len(batches), "profiled": model.histograms is not None},
    }
