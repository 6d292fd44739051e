"""The cost model to dispatch with: stored fits, fits of recorded sweeps, or guesses from other shapes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import numpy as np

from ..cost_model.fit_file import FitRecord, digest, model_from_fit
from ..cost_model.fitting import fit_sweep
from ..cost_model.model import (
    DEFAULT_FORM,
    CostModel,
    candidates_of,
    incomparable,
    join,
)
from ..cost_model.scaling import nearness, scaled
from ..cost_model.transfer import transfer
from ..errors import KernelError, ProfileError, RampMoEError
from ..measurements.sweep import PATH, Sweep
from ..registry.registry import Registry
from ..spec.hardware import Hardware
from ..spec.kernel import Kernel, KernelConfig, usable_configs, why_unsupported
from ..spec.shapes import MoEShape
from .profile_store import ProfileStore
from .weight_layouts import UNIFORM_TOKENS

NVIDIA_ALONE = "`ramp-moe profile` measures only on NVIDIA's GPUs so far"


def nothing_recorded(
    registry: Registry, store: ProfileStore, kernels: Sequence[str], shape: MoEShape, hardware: Hardware
) -> RampMoEError:
    """Make the error for kernels without a sweep, two lines long.

    It is KernelError if none of them computes the shape, else NoProfileError for those that do.
    """
    by_reason: dict[str, list[str]] = {}
    able = []
    for name in kernels:
        try:
            reason = why_unsupported(registry.kernel(name), shape, hardware)
        except RampMoEError as e:
            reason = str(e)
        if reason is None:
            able.append(name)
        else:
            by_reason.setdefault(reason, []).append(name)
    reasons = "; ".join(f"{reason} ({', '.join(names)})" for reason, names in by_reason.items())
    if able or not kernels:
        aside = f"; other kernels do not compute it: {reasons}" if reasons else ""
        return store.missing(able, shape, hardware, aside)
    subject = f"kernel {kernels[0]} does not compute" if len(kernels) == 1 else "no kernel computes"
    return KernelError(
        f"{subject} {shape.label} ({shape.slug}) on {hardware.name}: {reasons}",
        remedy="name another --model, --dtype or --device; `ramp-moe kernels` lists them, and plugins add others",
    )


def _own_first(registry: Registry, names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: name in registry.third_party)


def without_profile(registry: Registry, store: ProfileStore, shape: MoEShape, hardware: Hardware) -> dict[str, str]:
    """Name each registered kernel that no command can judge, and why: it has no sweep for this shape and device."""
    notes = {}
    for name, kernel in registry.kernels.items():
        if store.find(name, shape, hardware) is None:
            try:
                reason = why_unsupported(kernel, shape, hardware)
            except RampMoEError as e:
                reason = str(e)
            notes[name] = f"{name} left out: {reason or _no_profile(kernel, shape, hardware)}"
    return notes


def _no_profile(kernel: Kernel, shape: MoEShape, hardware: Hardware) -> str:
    from ..spec.launchable import LaunchableKernel  # which needs this module

    if hardware.vendor != "NVIDIA":
        remedy = NVIDIA_ALONE
    elif isinstance(kernel, LaunchableKernel):
        flags = f"--model {shape.label} --dtype {shape.dtype} --kernel {kernel.name}"
        remedy = f"measure one with `ramp-moe profile {flags}`"
    else:
        remedy = "name a sweep with --profile, since there is nothing to launch"
    return f"no profile for {shape.title} on {hardware.name}; {remedy}"


def view(sweep: Sweep, stages: Sequence[str] = ()) -> Sweep:
    """Keep the columns of these kinds, and the batches on which they were timed.

    Without kinds it keeps the whole paths, or all stages if the sweep has no paths. Raises ProfileError if a named kind
    was not measured.
    """
    found = sweep.only(stages or [PATH]) if stages or PATH in sweep.stages else sweep
    timed = np.isfinite(found.runs_us).any(axis=(0, 2))
    if not timed.any():
        what = ", ".join(found.stages)
        raise ProfileError(f"the sweep of {sweep.kernel} for {sweep.shape.title} has no time of {what}; measure again")
    return found if timed.all() else found.select(np.flatnonzero(timed).tolist())


@contextmanager
def _left_out(name: str, asked_for: bool, notes: list[str]) -> Iterator[None]:
    """Leave a kernel out with a note if it fails and was not asked for."""
    try:
        yield
    except RampMoEError as e:
        if asked_for:
            raise
        notes.append(f"{name} left out: {e}")


def load_model(
    registry: Registry,
    store: ProfileStore,
    shape: MoEShape,
    hardware: Hardware,
    kernels: Sequence[str] = (),
    form: str = DEFAULT_FORM,
) -> tuple[CostModel, list[str]]:
    """Load the cost model to dispatch with, and notes on what was left out.

    Each kernel contributes its stored fit if that has this form and is not older than its sweep, else a fit of its
    sweep. Kernels are chosen as in `load_replay`, except that plugins' kernels take part if they can be compared with
    the others.

    If no such kernel, of the library's own if none is named, has a profile of this shape, profiles of other shapes are
    used (see `transfer`), or those of the nearest device that has some (see `scaling`). The model is then `guessed`.
    """
    names = list(dict.fromkeys(kernels) or _own_first(registry, registry.kernels))
    store.check(names, shape, hardware)
    notes: list[str] = []
    models, unknown = _known(registry, store, shape, hardware, names, bool(kernels), form, notes)
    needed = names if kernels else [n for n in names if n not in registry.third_party] or names
    if set(needed) <= set(unknown):
        models = _guessed(registry, store, shape, hardware, unknown, form, notes) + models
    known = {c.kernel for m in models for c in m.candidates}
    if kernels and (left := [n for n in unknown if n not in known]):
        raise nothing_recorded(registry, store, left, shape, hardware)
    if not models:
        raise ProfileError("; ".join(notes)) if notes else nothing_recorded(registry, store, names, shape, hardware)
    if not kernels:
        models = _comparable(registry, models, notes)
        known = {c.kernel for m in models for c in m.candidates}
        missing = without_profile(registry, store, shape, hardware)
        notes += [missing[name] for name in unknown if name not in known]
    return join(models), notes


def _known(
    registry: Registry,
    store: ProfileStore,
    shape: MoEShape,
    hardware: Hardware,
    names: Sequence[str],
    asked_for: bool,
    form: str,
    notes: list[str],
) -> tuple[list[CostModel], list[str]]:
    """Make the models of the kernels that have a profile of the shape. Returns them, and the other kernels' names."""
    models: list[CostModel] = []
    unknown: list[str] = []
    for name in names:
        kernel = registry.kernel(name)
        with _left_out(name, asked_for, notes):
            recorded, fitted = store.find(name, shape, hardware), store.find_fit(name, shape, hardware)
            if recorded is None and fitted is None:
                unknown.append(name)
                continue
            configs = usable_configs(kernel, shape, hardware)
            sweep = None if recorded is None else recorded[1]
            models.append(_dispatchable(sweep, fitted, configs, shape, hardware, form, notes))
    return models, unknown


def _dispatchable(
    sweep: Sweep | None,
    fitted: FitRecord | None,
    configs: Sequence[KernelConfig],
    shape: MoEShape,
    hardware: Hardware,
    form: str,
    notes: list[str],
) -> CostModel:
    """Make one kernel's model from its stored fit if that is usable, else from its sweep."""
    if fitted is not None and fitted.form == form and (sweep is None or fitted.sweep == digest(sweep)):
        histograms = None if sweep is None else fitted_on(sweep).histograms
        try:
            return model_from_fit(fitted, shape, hardware, configs, histograms)
        except ProfileError as e:
            if sweep is None:
                raise
            notes.append(f"{e}; its sweep is fitted anew")
    if sweep is None:
        raise ProfileError(f"its fit is of another form than {form}, and its sweep is not here")
    return fit_recorded(sweep, configs, hardware, form, notes)


def _guessed(
    registry: Registry,
    store: ProfileStore,
    shape: MoEShape,
    hardware: Hardware,
    kernels: Sequence[str],
    form: str,
    notes: list[str],
) -> list[CostModel]:
    """Predict those of the kernels that run here by other shapes on this device, else by the nearest device that has a
    profile of some of them. A note says what the guesses rest on."""
    able = [name for name in kernels if _runs(registry.kernel(name), shape, hardware)]
    models = _transferred(registry, store, shape, hardware, able)
    missing = f"{shape.title} has no profile on {hardware.name}: what is chosen is guessed from"
    remedy = f"measure it with `ramp-moe profile --model {shape.label} --dtype {shape.dtype}`"
    if hardware.vendor != "NVIDIA":
        remedy = NVIDIA_ALONE
    if models:
        notes.append(f"{missing} other shapes; {remedy}")
        return models
    recorded = {device for device, _, _ in store.recorded()}
    others = [h for h in registry.hardware.values() if h.name in recorded and h.name != hardware.name]
    for other in sorted(others, key=lambda other: nearness(hardware, other)):
        there, untold = _known(registry, store, shape, other, able, False, form, [])
        if all(c.kernel in registry.third_party for model in there for c in model.candidates):
            there = _transferred(registry, store, shape, other, untold) or there
        for model in there:
            with suppress(ProfileError, KernelError):
                models.append(scaled(model, _configs(registry, model, hardware), hardware))
        if models:
            shapes = "other shapes on " if there[0].guessed else ""
            notes.append(f"{missing} {shapes}{other.name}, {_scale(other, hardware)}; {remedy}")
            break
    return models


def _configs(registry: Registry, model: CostModel, hardware: Hardware) -> dict[str, list[KernelConfig]]:
    """List what may be chosen on another device than the model's, by kernel.

    It is what the model has, too. Of what the model's device cannot have, nothing tells more than the kernel's own
    choices.
    """
    from ..spec.launchable import LaunchableKernel  # which needs this module

    found = {}
    for name in dict.fromkeys(c.kernel for c in model.candidates):
        kernel, shape = registry.kernel(name), model.shape
        known = {c.config.name for c in model.candidates if c.kernel == name}
        if isinstance(kernel, LaunchableKernel):
            with suppress(Exception):  # a plugin's own mistake: its other configurations may do
                own = {kernel.default_config(shape, hardware, tokens).name for tokens in UNIFORM_TOKENS}
                known |= own - {c.name for c in usable_configs(kernel, shape, model.hardware)}
        found[name] = [c for c in usable_configs(kernel, shape, hardware) if c.name in known]
    return found


def _runs(kernel: Kernel, shape: MoEShape, hardware: Hardware) -> bool:
    """Whether the kernel computes the shape on this device; False if it fails to answer."""
    try:
        return why_unsupported(kernel, shape, hardware) is None
    except RampMoEError:
        return False


def _transferred(
    registry: Registry, store: ProfileStore, shape: MoEShape, hardware: Hardware, kernels: Sequence[str]
) -> list[CostModel]:
    """Predict each kernel that runs on this device from its whole paths of other shapes."""
    models = []
    for name in kernels:
        sweeps = store.of_other_shapes(name, shape, hardware)
        if sweeps:
            configs_of = partial(usable_configs, registry.kernel(name), hardware=hardware)
            with suppress(ProfileError, KernelError):
                models.append(transfer(sweeps, configs_of, shape, hardware))
    return models


def _scale(measured_on: Hardware, hardware: Hardware) -> str:
    """Say by which constants times of one GPU are scaled to another."""
    return (
        f"scaled by data sheets (memory {measured_on.hbm_bytes_per_s / 1e12:.3g} to "
        f"{hardware.hbm_bytes_per_s / 1e12:.3g} TB/s, bf16 {measured_on.bf16_flops / 1e12:,.0f} to "
        f"{hardware.bf16_flops / 1e12:,.0f} TFLOP/s, {measured_on.num_sms} to {hardware.num_sms} SMs), unchecked"
    )


def fit_recorded(
    sweep: Sweep,
    configs: Sequence[KernelConfig],
    hardware: Hardware,
    form: str = DEFAULT_FORM,
    notes: list[str] | None = None,
) -> CostModel:
    """Fit the stages or paths by which this sweep can be dispatched."""
    seen = fitted_on(sweep)
    return fit_sweep(seen, candidates_of(seen, configs, notes), hardware, form)


def fitted_on(sweep: Sweep) -> Sweep:
    """Select what `fit_recorded` fits to: the sweep's `view`, restricted to the batches to fit on."""
    seen = view(sweep)
    tune = seen.batches_of("tune")
    if not tune:
        raise ProfileError(f"the sweep of {sweep.kernel} has no batches to fit on, only ones kept for judging")
    return seen.select(tune)


def _comparable(registry: Registry, models: Sequence[CostModel], notes: list[str]) -> list[CostModel]:
    """Keep the models to use if no kernel is named: those comparable with each other, and with the library's own model
    of the most candidates."""
    kept: list[CostModel] = []

    def order(model: CostModel) -> tuple[bool, int]:
        return model.candidates[0].kernel in registry.third_party, -len(model.candidates)

    for model in sorted(models, key=order):
        name = model.candidates[0].kernel
        if kept and (model.form, model.guessed) != (kept[0].form, kept[0].guessed):
            notes.append(f"{name} left out: the others are guessed; name it with --kernel")
        elif reason := next((r for k in kept if (r := incomparable(k, model))), None):
            notes.append(f"{name} left out: {reason}")
        else:
            kept.append(model)
    return kept
