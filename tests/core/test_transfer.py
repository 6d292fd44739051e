"""A shape without a profile: what other shapes' profiles say of it, and that this is said."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import RECORDED
from ramp_moe import Dispatcher, Hardware, ProfileError, ProfileStore, Registry, expert_histogram, generate
from ramp_moe.cli import main
from ramp_moe.evaluation import regret
from ramp_moe.kernel import usable_configs
from ramp_moe.replay import load_model, load_replay
from ramp_moe.transfer import transfer


@pytest.mark.parametrize(("kernel", "most"), [("alpha_moe", 0.035), ("triton", 0.055)])
def test_shapes_left_out(registry: Registry, shipped: ProfileStore, h200: Hardware, kernel: str, most: float) -> None:
    """Mean regret over the four models, each predicted by the three others; a random choice would lose 50% and more."""
    lost = []
    for name in RECORDED:
        shape = registry.shape(name, "fp8")
        model = transfer(
            [s for s in shipped.of_other_shapes(kernel, shape, h200) if s.shape.label in RECORDED],
            lambda s: usable_configs(registry.kernel(kernel), s, h200), shape, h200,
        )  # fmt: skip
        replay = load_replay(registry, shipped, shape, h200, [kernel]).of("test")
        assert replay is not None
        us = dict(zip([c.name for c in model.candidates], model.cost(replay.histograms).T, strict=True))
        never = np.full(len(replay.labels), np.inf)
        choices = np.stack([us.get(c.name, never) for c in replay.candidates], 1).argmin(1)
        lost.append(float(regret(replay.times_us, choices).mean()))
    assert np.mean(lost) < most


def test_coefficients_of_the_same_grid_are_the_same(registry: Registry, shipped: ProfileStore, h200: Hardware) -> None:
    """A shape that differs in nothing that a CTA sees costs the same."""
    shape = registry.shape("olmoe-1b-7b", "fp8")
    _, sweep = shipped.require("alpha_moe", shape, h200)
    configs = usable_configs(registry.kernel("alpha_moe"), shape, h200)
    model = transfer([sweep], lambda _: configs, shape, h200)
    own = load_replay(registry, shipped, shape, h200, ["alpha_moe"]).of("tune")
    assert own is not None
    fitted = own.fit(form="active")
    for key, fit in fitted.fits.items():
        assert model.fits[key].coefficients == pytest.approx(fit.coefficients, rel=1e-6, abs=1e-9)


def test_it_is_used_where_nothing_else_is_and_says_so(
    registry: Registry, shipped: ProfileStore, h200: Hardware
) -> None:
    shape = registry.shape("qwen3-235b-a22b", "fp8")
    model, notes = load_model(registry, shipped, shape, h200)
    assert {c.kernel for c in model.candidates} >= {"alpha_moe", "triton"}
    assert any("has no profile on h200: what is chosen is guessed from other shapes" in n for n in notes)
    assert all("not on qwen3-235b-a22b" in line for line in model.measured)
    histogram = expert_histogram(generate("zipf1.2", 64, num_experts=128, top_k=8), 128)
    choice = Dispatcher.for_model("qwen3-235b-a22b", "h200").choose(histogram)
    assert choice.extrapolated
    assert 50 < choice.predicted_us < 2000
    command = ["explain", "--model", "qwen3-235b-a22b", "--device", "h200", "--tokens", "64", "--json"]
    found = CliRunner().invoke(main, command)
    assert found.exit_code == 0, found.output
    assert any("guessed from other shapes" in n for n in json.loads(found.stdout)["notes"])


def test_a_profile_of_its_own_comes_first(registry: Registry, shipped: ProfileStore, h200: Hardware) -> None:
    shape = registry.shape("olmoe-1b-7b", "fp8")
    model, notes = load_model(registry, shipped, shape, h200, ["triton"])
    assert not any("guessed" in n for n in notes)
    assert not model.measured[0].endswith("not on olmoe-1b-7b")
    with pytest.raises(ProfileError, match="no sweep of vllm_triton"):
        load_model(registry, shipped, shape, h200, ["triton", "vllm_triton"])
