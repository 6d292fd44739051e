"""`ramp-moe compare`: compares static dispatch, dispatch by histogram and the oracle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from ..cost_model.model import get_form
from ..dispatch.profile_store import ProfileStore
from ..errors import NoProfileError
from ..evaluation.comparison import Comparison, compare_plugins, compare_recorded, compare_trace
from ..evaluation.guessed import compare_guessed
from ..evaluation.replay import load_replay, of_plugins
from ..evaluation.report import check_report, write_report
from ..evaluation.vllm_table import open_table
from ..measurements.trace import Trace, load_trace
from ..profiler.live import MAX_TOKENS, RUNS, compare_live
from ..registry.registry import Registry, get_registry
from ..spec.hardware import confirm
from ..spec.kernel import STAGE_KINDS
from ..spec.shapes import MoEShape
from . import INTERRUPTED, tables
from .gpu import Display, choose_kernels, find_gpu, recorded_kernels, set_up
from .listing import GIVEN
from .options import (
    AtLeast,
    device_option,
    dtype_option,
    form_option,
    json_option,
    kernel_option,
    model_option,
    profile_option,
    resolve_device,
    resolve_model,
)
from .output import console, print_json, say

LIVE_MINUTES = 5.0


@click.command()
@model_option
@device_option
@dtype_option
@kernel_option
@profile_option
@form_option
@click.option(
    "--trace",
    type=click.Path(path_type=Path),
    help="Predict times on recorded routing (JSON or JSON lines); with --live, measure them.",
)
@click.option(
    "--stage",
    "stages",
    multiple=True,
    type=click.Choice(STAGE_KINDS),
    help="Judge only the times of this kind of stage, not whole paths (repeatable).",
)
@click.option("--live", is_flag=True, help="Measure on this machine's GPU now, on batches that no profile saw.")
@click.option(
    "--minutes",
    type=AtLeast(0),
    show_default=f"{LIVE_MINUTES:g}",
    help="With --live, stop at the end of a batch after these minutes; at least eight batches are measured.",
)
@click.option(
    "--static-table",
    type=click.Path(path_type=Path),
    help="Also judge a table tuned for vLLM or SGLang: its file, or a folder in which either would find it.",
)
@click.option(
    "--html", "html_path", type=click.Path(path_type=Path), help="Also write one self-contained page with plots."
)
@json_option
@click.pass_context
def compare(
    ctx: click.Context,
    model: str,
    device: str,
    dtype: str | None,
    kernels: tuple[str, ...],
    profiles: tuple[Path, ...],
    form: str,
    trace: Path | None,
    stages: tuple[str, ...],
    live: bool,
    minutes: float | None,
    static_table: Path | None,
    html_path: Path | None,
    as_json: bool,
) -> None:
    """Compare static dispatch, dispatch by histogram and the oracle, on recorded measurements or --live.

    Without a profile, show what the cost model guesses from other shapes or devices.
    """
    if minutes is not None and not live:
        raise click.UsageError("--minutes limits a live measurement: give --live, too")
    if live and stages:
        raise click.UsageError("--live measures whole paths: leave out --stage")
    if static_table is not None and (live or trace is not None):
        raise click.UsageError("--static-table is judged on recorded times: leave out --live and --trace")
    get_form(form)
    if html_path is not None:
        check_report(html_path)
    registry = get_registry()
    shape = resolve_model(registry, model, dtype)
    recorded_trace = None if trace is None else load_trace(trace)
    store = ProfileStore(profiles, registry.profile_dirs)
    if live:
        minutes = LIVE_MINUTES if minutes is None else minutes
        try:
            named = ctx.get_parameter_source("device") is GIVEN
            result = _measure(registry, store, shape, device, named, kernels, minutes, recorded_trace, form)
        except KeyboardInterrupt:
            say("interrupted: nothing is kept of a live comparison", err=True)
            ctx.exit(INTERRUPTED)
    else:
        hardware = resolve_device(registry, device)
        table = None if static_table is None else open_table(static_table, shape, hardware)
        try:
            replay = load_replay(registry, store, shape, hardware, kernels, stages)
        except NoProfileError as e:
            if stages or table is not None:
                option = "--stage" if stages else "--static-table"
                what = f"{option} judges measured times, of which there are none: {e.args[0].splitlines()[0]}"
                raise NoProfileError(what, remedy=e.remedy) from None
            replay = None
        if replay is None:
            result = compare_guessed(registry, store, shape, hardware, kernels, recorded_trace, form)
        elif recorded_trace:
            result = compare_trace(replay, recorded_trace, form)
            apart = [n for n in of_plugins(registry, store, shape, hardware) if n not in replay.kernels]
            if not kernels and apart:
                unasked = f"left out, as plugins' kernels that --kernel does not name: {', '.join(apart)}"
                result = replace(result, notes=[*result.notes, unasked])
        else:
            result = compare_recorded(replay, form, table=table)
            if not kernels:
                rows, notes = compare_plugins(registry, store, shape, hardware, result.kernels, stages, form)
                result = replace(result, plugins=rows, notes=[*result.notes, *notes])
    if html_path is not None:
        write_report(result, html_path)
    if as_json:
        print_json(result.as_dict())
    else:
        console().print(*tables.comparison(result), sep="\n")
        if html_path is not None:
            say(f"report: {html_path}")


def _measure(
    registry: Registry,
    store: ProfileStore,
    shape: MoEShape,
    device: str,
    named: bool,
    kernels: tuple[str, ...],
    minutes: float,
    trace: Trace | None,
    form: str,
) -> Comparison:
    """Measure the comparison now. named: True if the user named the device, False if it is the default.

    Raises HardwareError if this machine's GPU is not the device.
    """
    state, hardware = find_gpu(registry, device if named else "auto")
    if not named:
        confirm(registry.device(device), registry.hardware.values(), state.name)
    display = Display(minutes / RUNS)
    recorded, without_paths = ([], []) if kernels else recorded_kernels(registry, store, shape, hardware)
    chosen, left_out = choose_kernels(registry, kernels, recorded, shape, hardware)
    for note in (*without_paths, *left_out):
        display.note(note)
    setup = set_up(shape, hardware, state, chosen, MAX_TOKENS, display.note)
    with display:
        return compare_live(
            registry,
            store,
            shape,
            hardware,
            [k.name for k in chosen],
            minutes,
            setup.warmers,
            setup.environment,
            setup.make_bench,
            display,
            trace,
            form,
        )
