"""A short run compiles and measures only what is promising by the profiles of other shapes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from ramp_moe import Hardware, Registry
from ramp_moe.cost_model.model import candidates_of, path_times
from ramp_moe.dispatch.profile_store import ProfileStore
from ramp_moe.measurements.sweep import PATH
from ramp_moe.profiler.prior import MOST, promising
from ramp_moe.spec.kernel import usable_configs
from simulated_bench import Simulated

SHORT = MOST[0][0]


@pytest.mark.parametrize(("name", "kernel"), [("mixtral-8x7b-tp4", "cute"), ("olmoe-1b-7b", "triton")])
def test_the_best_is_among_the_promising(name: str, kernel: str, registry: Registry, h200: Hardware) -> None:
    """The shape's own profile, which is left out of what is known, judges."""
    shape, store = registry.shape(name, "fp8"), ProfileStore(shipped=registry.profile_dirs)
    found = store.find(kernel, shape, h200)
    assert found is not None
    every = usable_configs(registry.kernel(kernel), shape, h200)
    candidates = candidates_of(found[1].only([PATH]), every)
    us = path_times(found[1].only([PATH]), candidates)
    lost = []
    for minutes, most in MOST:
        names, notes = promising(shape, h200, [registry.kernel(kernel)], store, minutes)
        assert len(names[kernel]) <= most < len(every)
        assert [c.name for c in every if c.name in names[kernel]] == names[kernel], "in the kernel's order"
        assert len(notes) == 1
        kept = [i for i, c in enumerate(candidates) if c.config.name in names[kernel]]
        lost.append(np.mean(np.nanmin(us[:, kept], 1) / np.nanmin(us, 1)) - 1)
    assert lost == sorted(lost, reverse=True)
    assert lost[0] < 0.03
    assert lost[-1] < 0.007


def test_a_long_run_measures_all(registry: Registry, h200: Hardware) -> None:
    store, kernel = ProfileStore(shipped=registry.profile_dirs), registry.kernel("cute")
    shape = registry.shape("glm-4.5-air", "fp8")
    every = [c.name for c in usable_configs(kernel, shape, h200)]
    for minutes in (10.0, math.inf):
        assert promising(shape, h200, [kernel], store, minutes) == ({"cute": every}, [])
    assert len(promising(shape, h200, [kernel], store, SHORT)[0]["cute"]) < len(every)


def test_of_a_kernel_that_nobody_profiled_all_are_measured(registry: Registry, h200: Hardware) -> None:
    class Many(Simulated):
        def configs(self, shape: object, hardware: object) -> list[object]:  # type: ignore[override]
            return [self._config(shape, block, "a") for block in range(8, 8 * 101, 8)]  # type: ignore[arg-type]

    shape, store = registry.shape("glm-4.5-air", "fp8"), ProfileStore(shipped=registry.profile_dirs)
    names, notes = promising(shape, h200, [Many("many")], store, SHORT)
    assert len(names["many"]) == 100
    assert notes == []
