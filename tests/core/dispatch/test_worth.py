"""The few candidates that are worth compiling, by recorded profiles of the kernel that is compiled ahead."""

from __future__ import annotations

import numpy as np
import pytest
from ramp_moe import CostModel, Hardware, Registry
from ramp_moe.dispatch.load_model import load_model
from ramp_moe.dispatch.profile_store import ProfileStore
from ramp_moe.dispatch.worth import ENOUGH, SIZES, Worth, worth_compiling
from tiers import slow_except


def recorded(registry: Registry, hardware: Hardware, name: str) -> CostModel:
    store = ProfileStore(shipped=registry.profile_dirs)
    return load_model(registry, store, registry.shape(name, "fp8"), hardware, ["triton", "cute"])[0]


@pytest.mark.parametrize(
    "name", slow_except(["deepseek-v3-tp8"], ["deepseek-v3-tp8", "olmoe-1b-7b", "mixtral-8x7b-tp4", "glm-4.5-air"])
)
def test_a_few_configurations_lose_next_to_nothing(name: str, registry: Registry, h200: Hardware) -> None:
    """Also on the batches that the profile was measured with, which are not those that they are chosen by."""
    model = recorded(registry, h200, name)
    ready = {c.name for c in model.candidates if c.kernel != "cute"}
    found = list(worth_compiling(model, ready))
    assert 2 <= len(found) <= 24
    assert {c.kernel for c in found} == {"cute"}
    losses = [Worth(model, ready | {c.name for c in found[:n]}).loss(SIZES) for n in range(len(found) + 1)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 10 * ENOUGH
    assert losses[-1] <= ENOUGH < losses[-2]
    if model.histograms is not None:
        us = model.cost(model.histograms)
        kept = [i for i, c in enumerate(model.candidates) if c.name in ready | {c.name for c in found}]
        assert np.mean(us[:, kept].min(1) / us.min(1)) - 1 < 5 * ENOUGH


def test_what_cannot_be_had_leaves_its_place_to_the_next_best(registry: Registry, h200: Hardware) -> None:
    model = recorded(registry, h200, "deepseek-v3-tp8")
    worth = Worth(model, {c.name for c in model.candidates if c.kernel != "cute"})
    first, before = worth.next([512]), worth.loss([512])
    assert first is not None
    worth.remove(first.name)
    second = worth.next([512])
    assert second is not None
    assert second != first
    worth.add(second.name)
    assert worth.loss([512]) < before / 2
    assert worth.next([512], kernel="triton") is None
    assert Worth(model, ()).loss([1]) == float("inf")
