"""A shape without a profile: what other shapes' profiles say of it, and that this is said. What such guesses lose is in
the study's test."""

from __future__ import annotations

import json
from functools import partial

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import RECORDED
from ramp_moe import Dispatcher, Hardware, ProfileError, ProfileStore, Registry, expert_histogram, generate
from ramp_moe.cli import main
from ramp_moe.cost_model.model import candidates_of, parts_of
from ramp_moe.cost_model.transfer import transfer
from ramp_moe.dispatch.load_model import load_model
from ramp_moe.evaluation.replay import load_replay
from ramp_moe.measurements.sweep import make_sweep
from ramp_moe.spec.kernel import usable_configs


def test_a_shape_that_was_measured_is_predicted_as_it_is(
    registry: Registry, shipped: ProfileStore, h200: Hardware
) -> None:
    """One that differs in nothing; coefficients that are drawn to common ones are within a tenth."""
    shape = registry.shape("olmoe-1b-7b", "fp8")
    _, sweep = shipped.require("alpha_moe", shape, h200)
    model = transfer([sweep], partial(usable_configs, registry.kernel("alpha_moe"), hardware=h200), shape, h200)
    own = load_replay(registry, shipped, shape, h200, ["alpha_moe"]).of("tune")
    assert own is not None
    us = dict(zip([c.name for c in own.candidates], own.times_us.T, strict=True))
    # What the sweep has too few batches of is no candidate.
    off = [model.cost(own.histograms)[:, i] / us[c.name] - 1 for i, c in enumerate(model.candidates)]
    seen = np.isfinite(np.stack(off))
    assert len(off) > len(us) / 2
    assert np.abs(np.stack(off)[seen]).mean() < 0.1


def test_configurations_that_no_other_shape_has(registry: Registry, shipped: ProfileStore, h200: Hardware) -> None:
    """Are as their kernel is on average; those that other shapes have and did not time are left out."""
    shape = registry.shape("olmoe-1b-7b", "fp8")
    others = [s for s in shipped.of_other_shapes("deep_gemm", shape, h200) if s.shape.label in RECORDED]
    configs_of = partial(usable_configs, registry.kernel("deep_gemm"), hardware=h200)
    model = transfer(others, configs_of, shape, h200)
    elsewhere = {c.name for s in others for c in configs_of(s.shape)}
    timed = {name for s in others for name in (c.config.name for c in candidates_of(s, configs_of(s.shape)))}
    assert {c.config.name for c in model.candidates} == {
        c.name for c in configs_of(shape) if c.name in timed or c.name not in elsewhere
    }
    new = [c for c in model.candidates if c.config.name not in elsewhere]
    assert new
    assert {model.fits[p.key].rows for c in new for p in parts_of(c, model.stages)} == {0}


@pytest.mark.slow
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


@pytest.mark.slow
def test_sweeps_that_say_nothing(registry: Registry, shipped: ProfileStore, h200: Hardware) -> None:
    """Of configurations that no shape has, of none to fit on, or without a time of a whole path."""
    shape = registry.shape("olmoe-1b-7b", "fp8")
    first, *others = shipped.of_other_shapes("triton", shape, h200)
    configs_of = partial(usable_configs, registry.kernel("triton"), hardware=h200)
    expected = transfer(others, configs_of, shape, h200)
    others_alone = [None if c.stage == "path" else 1.0 for c in first.record.columns]
    untimed = msgspec.structs.replace(
        first.record,
        batches=[msgspec.structs.replace(r, runs_us=[others_alone]) for r in first.record.batches],
        runs=first.record.runs[:1],
    )
    alien = msgspec.structs.replace(
        first.record, columns=[msgspec.structs.replace(c, key=f"{c.key}-old") for c in first.record.columns]
    )
    for useless in (make_sweep(untimed), make_sweep(alien), first.select(first.batches_of("test"))):
        found = transfer([useless, *others], configs_of, shape, h200)
        assert {k: f.coefficients for k, f in found.fits.items()} == {
            k: f.coefficients for k, f in expected.fits.items()
        }
        with pytest.raises(ProfileError, match="no whole path of a configuration"):
            transfer([useless], configs_of, shape, h200)
