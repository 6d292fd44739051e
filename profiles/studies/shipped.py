"""The shipped profiles as the studies read them. Sweeps are loaded, and cost models fitted, once per process."""

from __future__ import annotations

from functools import cache

from ramp_moe import CostModel, ProfileStore, get_registry
from ramp_moe.cost_model.model import DEFAULT_FORM
from ramp_moe.evaluation.replay import Replay, load_replay

MODELS = ("olmoe-1b-7b", "qwen3-30b-a3b", "deepseek-v3-tp8", "mixtral-8x7b-tp4")

registry = get_registry()
h200 = registry.device("h200")
store = ProfileStore(shipped=registry.profile_dirs)


@cache
def replay(model: str, dtype: str, kernels: tuple[str, ...], stages: tuple[str, ...] = ()) -> Replay:
    """Sweeps of several kernels on the batches that they share. Raises ProfileError if a kernel has no sweep."""
    return load_replay(registry, store, registry.shape(model, dtype), h200, kernels, stages)


@cache
def split(model: str, dtype: str, kernels: tuple[str, ...], stages: tuple[str, ...] = ()) -> tuple[Replay, Replay]:
    """The batches to fit on, and the batches to judge on."""
    both = replay(model, dtype, kernels, stages)
    tune, test = both.of("tune"), both.of("test")
    assert tune is not None
    assert test is not None
    return tune, test


@cache
def fitted(
    model: str, dtype: str, kernels: tuple[str, ...], form: str = DEFAULT_FORM, stages: tuple[str, ...] = ()
) -> CostModel:
    """The cost model fitted on the first part of `split`."""
    return split(model, dtype, kernels, stages)[0].fit(form=form)
