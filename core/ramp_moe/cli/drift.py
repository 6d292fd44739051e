"""`ramp-moe check`: checks whether the recorded profiles still hold on this machine."""

from __future__ import annotations

import click

from ..dispatch.profile_store import ProfileStore
from ..profiler.drift import MAX_TOKENS, check_profiles
from ..registry.registry import get_registry
from . import INTERRUPTED, tables
from .gpu import Display, choose_kernels, find_gpu, recorded_kernels, set_up
from .options import dtype_option, json_option, kernel_option, model_option, resolve_model, this_device_option
from .output import console, print_json, say


@click.command()
@model_option
@this_device_option
@dtype_option
@kernel_option
@json_option
@click.pass_context
def check(
    ctx: click.Context, model: str, device: str, dtype: str | None, kernels: tuple[str, ...], as_json: bool
) -> None:
    """Check in seconds whether the recorded profiles hold on this GPU, by measuring about a dozen cells again.

    Exit code 0 if they hold, or if all times changed by one factor. Exit code 1, with the remedy, if they do not hold.
    """
    registry = get_registry()
    shape, store = resolve_model(registry, model, dtype), ProfileStore(shipped=registry.profile_dirs)
    state, hardware = find_gpu(registry, device)
    recorded, without_paths = ([], []) if kernels else recorded_kernels(registry, store, shape, hardware)
    chosen, left_out = choose_kernels(registry, kernels, recorded, shape, hardware)
    display = Display(None)
    for note in (*without_paths, *left_out):
        display.note(note)
    setup = set_up(shape, hardware, state, chosen, MAX_TOKENS, display.note)
    names = [k.name for k in chosen]
    try:
        with display:
            found = check_profiles(
                registry, store, shape, hardware, names, setup.environment, setup.make_bench, display
            )
    except KeyboardInterrupt:
        say("interrupted: nothing is kept of a check", err=True)
        ctx.exit(INTERRUPTED)
    if as_json:
        print_json(found.as_dict())
    else:
        console().print(*tables.drift(found), sep="\n")
        if found.remedy:  # not wrapped, so that it can be copied
            say("\n".join(["remedy, measure again:", *(f"  {command}" for command in found.remedy)]))
    if found.verdict == "does not hold":
        ctx.exit(1)
