"""Times of one GPU as a guess for another."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import DATA
from ramp_moe import CostModel, Dispatcher, Hardware, KernelConfig, ProfileError, ProfileStore, Registry
from ramp_moe.cost_model.roofline import expert_read_us, roofline_ratio
from ramp_moe.cost_model.scaling import nearness, scaled
from ramp_moe.dispatch.load_model import load_model
from ramp_moe.evaluation.replay import load_replay
from ramp_moe.registry.gpus import GPUS
from ramp_moe.spec.kernel import usable_configs
from ramp_moe.spec.routing import IntArray, expert_histogram, generate

BY_NAME = {gpu.name: gpu for gpu in GPUS}


@pytest.fixture(scope="module")
def model(registry: Registry, h200: Hardware) -> CostModel:
    """Alpha-MoE in fp8, with a residual."""
    store = ProfileStore(shipped=[DATA / "profiles"])
    return load_replay(registry, store, registry.shape("olmoe-1b-7b", "fp8"), h200, ["alpha_moe"]).fit()


@pytest.fixture(scope="module")
def configs(registry: Registry, model: CostModel, h200: Hardware) -> dict[str, tuple[KernelConfig, ...]]:
    return {"alpha_moe": usable_configs(registry.kernel("alpha_moe"), model.shape, h200)}


def batches() -> IntArray:
    sizes = ((1, "uniform"), (16, "zipf1.2"), (64, "uniform"), (700, "active0.3"), (4096, "uniform"))
    return np.stack([expert_histogram(generate(kind, n, 64, 8, seed=n), 64) for n, kind in sizes])


def test_on_a_gpu_of_the_same_constants_nothing_changes(
    model: CostModel, configs: dict[str, tuple[KernelConfig, ...]], h200: Hardware
) -> None:
    twin = scaled(model, configs, dataclasses.replace(h200, name="twin"))
    assert [c.name for c in twin.candidates] == [c.name for c in model.candidates]
    assert twin.cost(batches()) == pytest.approx(model.cost(batches()), rel=1e-9)
    assert (twin.guessed, model.guessed) == (True, False)
    assert twin.predict(batches()).extrapolated.all(), "nothing was fitted on the twin"
    assert twin.restrict(["alpha_moe"]).measured_on is twin.without([model.candidates[0].name]).measured_on is h200
    assert all(line.endswith(", scaled to twin") for line in twin.measured)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_every_gpu(model: CostModel, configs: dict[str, tuple[KernelConfig, ...]], gpu: Hardware) -> None:
    """Not below its own roofline; and without other waves, what was fastest stays so."""
    there = scaled(model, configs, gpu)
    us = there.cost(batches())
    assert (us >= (batches() > 0).sum(1)[:, None] * expert_read_us(model.shape, gpu) * (1 - 1e-12)).all()
    if gpu.num_sms == model.hardware.num_sms:
        assert us.argmin(1).tolist() == model.cost(batches()).argmin(1).tolist()


def test_small_batches_follow_the_memory_and_large_ones_the_peak(model: CostModel) -> None:
    h200, h20, a100 = (BY_NAME[name] for name in ("h200", "h20", "a100-sxm"))
    shape = dataclasses.replace(model.shape, dtype="bf16")
    active, ids = np.array([8.0, 64.0, 64.0]), np.array([8.0, 512.0, 1e6])
    for gpu in (h20, a100):
        ratio = roofline_ratio(shape, h200, gpu, ids, active)
        memory, peak = h200.read_bytes_per_s / gpu.read_bytes_per_s, h200.bf16_flops / gpu.bf16_flops
        assert ratio[0] == pytest.approx(memory, rel=0.2)
        assert ratio[2] == pytest.approx(peak, rel=0.05)
        assert (np.diff(ratio) > 0).all() == (peak > memory)
    assert roofline_ratio(shape, h200, h20, np.zeros(1), np.zeros(1)) > 0


def test_a_configuration_that_was_not_measured_is_as_the_nearest(
    model: CostModel, configs: dict[str, tuple[KernelConfig, ...]], h200: Hardware
) -> None:
    (known,) = (c.config for c in model.candidates if c.name == "alpha_moe/bm16-bn64-wn4-st3")
    new = dataclasses.replace(known, name="bm16-of-its-own")
    found = scaled(model, {"alpha_moe": [known, new]}, h200)
    assert found.cost(batches())[:, 1] == pytest.approx(found.cost(batches())[:, 0])
    with pytest.raises(ProfileError, match="no configuration that was measured on h200 exists on h200"):
        scaled(model, {"alpha_moe": []}, h200)


def test_the_nearest_gpu_is_the_one_to_scale() -> None:
    def nearest(name: str) -> str:
        return min((g for g in GPUS if g.name != name), key=lambda g: nearness(BY_NAME[name], g)).name

    assert nearest("h100-sxm") == "h800"
    assert nearest("h20") == "h20-3e"
    assert nearest("mi300x") == "mi325x"
    assert nearest("b200") == "gb200"


def test_the_dispatcher_chooses_on_another_gpu(registry: Registry, shipped: ProfileStore) -> None:
    choice = Dispatcher.for_model("olmoe-1b-7b", "h100-sxm", ["deep_gemm"], "bf16").choose([16] * 64)
    assert choice.extrapolated
    assert choice.predicted_us > 64 * expert_read_us(registry.shape("olmoe-1b-7b", "bf16"), BY_NAME["h100-sxm"])
    model, notes = load_model(registry, shipped, registry.shape("olmoe-1b-7b", "bf16"), BY_NAME["h20"], ["deep_gemm"])
    assert {c.config.name.split("-")[1] for c in model.candidates} == {"sm78"}, "its own choices"
    assert any("guessed from h200, scaled by data sheets" in n for n in notes)


def test_a_kernel_that_fails_to_choose_keeps_what_was_measured(
    registry: Registry, shipped: ProfileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> KernelConfig:
        raise RuntimeError("not today")

    monkeypatch.setattr(type(registry.kernel("deep_gemm")), "default_config", fail)
    shape = registry.shape("olmoe-1b-7b", "bf16")
    model, _ = load_model(registry, shipped, shape, BY_NAME["h100-sxm"], ["deep_gemm"])
    measured, _ = load_model(registry, shipped, shape, BY_NAME["h200"], ["deep_gemm"])
    assert {c.name for c in model.candidates} <= {c.name for c in measured.candidates}
