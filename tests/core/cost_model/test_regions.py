from __future__ import annotations

import numpy as np
import pytest
from conftest import RECORDED, exhaustive
from ramp_moe import Hardware, Registry, RoutingError, expert_histogram, generate
from ramp_moe.cost_model.regions import Advice, Regions, analyse
from ramp_moe.evaluation.comparison import compare_recorded
from ramp_moe.evaluation.replay import load_replay
from tiers import slow_except


def regions(registry: Registry, model: str, device: str, tokens: int, routing: str = "uniform") -> Regions:
    shape = registry.shape(model, "fp8")
    ids = generate(routing, tokens, shape.num_experts, shape.top_k)
    return analyse(shape, registry.device(device), expert_histogram(ids, shape.num_experts))


def named(found: Regions) -> dict[str, Advice]:
    return {a.optimisation: a for a in found.advice}


def pays(found: Regions) -> dict[str, bool]:
    return {a.optimisation: a.pays for a in found.advice}


@pytest.mark.parametrize(
    ("model", "product"), [("olmoe-1b-7b", 128), ("qwen3-30b-a3b", 96), ("deepseek-v3", 896), ("mixtral-8x7b", 3584)]
)
def test_lambda_times_kappa_of_the_papers_models(registry: Registry, model: str, product: int) -> None:
    m = regions(registry, model, "h100-sxm", 64).metrics
    assert m["lambda"] * m["kappa"] == product
    assert m["rho"] == product


def test_swizzle_pays_from_the_second_m_tile_on(registry: Registry, h200: Hardware) -> None:
    shape = registry.shape("deepseek-v3-tp8", "fp8")
    histogram = np.zeros(shape.num_experts, np.int64)
    histogram[:8] = 1
    assert not pays(analyse(shape, h200, histogram))["GROUP_M swizzle"]
    histogram[:8] = 300
    found = analyse(shape, h200, histogram)
    assert found.token_block < 300
    advice = named(found)["GROUP_M swizzle"]
    assert advice.pays
    assert advice.value == -(-300 // found.token_block)
    # one expert that is read twice is enough, whatever the mean
    histogram[:] = 1
    histogram[0] = 300
    assert pays(analyse(shape, h200, histogram))["GROUP_M swizzle"]


def test_swizzle_says_whether_l2_keeps_an_expert(registry: Registry) -> None:
    beyond = named(regions(registry, "mixtral-8x7b", "h100-sxm", 2048))["GROUP_M swizzle"]
    within = named(regions(registry, "deepseek-v3", "h100-sxm", 2048, "zipf1.2"))["GROUP_M swizzle"]
    assert beyond.pays
    assert within.pays
    assert "falls out of L2" in beyond.reason
    assert "stays in L2" in within.reason
    # RaMP's threshold for 50 MiB of L2
    assert "lambda*kappa = 3584 weight tiles L2 keeps 1440" in beyond.derivation


def test_split_k_needs_idle_sms_and_a_deep_reduction(registry: Registry) -> None:
    assert pays(regions(registry, "deepseek-v3-tp8", "h200", 1))["split-K"]
    assert not pays(regions(registry, "deepseek-v3-tp8", "h200", 64))["split-K"]
    # SMs idle, but 16 steps are soon done
    shallow = named(regions(registry, "qwen3-next-80b", "h200", 1))["split-K"]
    assert not shallow.pays
    assert 0 < shallow.value < shallow.threshold
    # 16 CTAs of the 58.6 that keep memory busy leave 56 steps all but 15.3
    deep = named(regions(registry, "deepseek-v3-tp8", "h200", 1))["split-K"]
    assert deep.value == pytest.approx(56 * (1 - 16 / 58.6), rel=1e-3)
    # 3.6 us in steps of 0.8 us / 2
    assert deep.threshold == pytest.approx(9)
    assert named(regions(registry, "deepseek-v3-tp8", "h200", 64))["split-K"].value == 0


def test_wide_tiles_pay_where_memory_is_busy_and_split_k_where_it_is_not(registry: Registry) -> None:
    """Half the CTAs with twice the bytes each keep memory busy, also with SMs to spare."""
    for tokens, busy in ((1, False), (8, True), (512, True)):
        found = regions(registry, "deepseek-v3-tp8", "h200", tokens)
        assert pays(found)["wide weight tile"] == busy
        assert pays(found)["split-K"] == (not busy)
    assert regions(registry, "deepseek-v3-tp8", "h200", 8).metrics["omega"] < 1
    # 4.8 TB/s x 0.8 us over 132 SMs with two tiles of 32 KiB on their way
    threshold = named(regions(registry, "deepseek-v3-tp8", "h200", 1))["wide weight tile"].threshold
    assert threshold == pytest.approx(4.8e12 * 0.8e-6 / (132 * 2 * 32768))


def test_small_blocks_for_few_tokens_and_large_for_many(registry: Registry) -> None:
    blocks = []
    for tokens in (1, 64, 256, 1024, 8192):
        found = regions(registry, "olmoe-1b-7b", "h200", tokens)
        blocks.append(found.token_block)
        assert pays(found)["small token block"] == (found.token_block <= 16)
        assert pays(found)["large token block"] == (found.token_block >= 32)
    assert blocks[0] == 8
    assert min(blocks[2:]) >= 32


def test_a_block_between_small_and_large_takes_no_side(registry: Registry, h200: Hardware) -> None:
    """Of 17 to 24 tokens an expert: 24 pads least, yet of the others 32 reads weights once and 16 twice."""
    found = analyse(registry.shape("mixtral-8x7b", "fp8"), h200, np.full(8, 20, np.int64))
    assert found.token_block == 24
    assert pays(found)["large token block"]
    assert not pays(found)["small token block"]
    assert named(found)["large token block"].value == pytest.approx(2 / 1.3)


def test_a_few_re_reads_cost_nothing(registry: Registry, h200: Hardware) -> None:
    """L2 hands out what HBM delivers and 0.3 of it again, in the same time: a hot expert alone wants no large block."""
    shape = registry.shape("deepseek-v3-tp8", "fp8")
    histogram = np.full(shape.num_experts, 4, np.int64)
    histogram[:10] = 64
    assert pays(analyse(shape, h200, histogram))["small token block"]
    histogram[:64] = 64
    assert pays(analyse(shape, h200, histogram))["large token block"]


@pytest.mark.parametrize("model", slow_except(RECORDED[:1], RECORDED))
def test_the_advised_block_against_measurements(registry: Registry, h200: Hardware, model: str) -> None:
    """Without any measurement the advice does as well as the best single configuration does with all of them."""
    shape = registry.shape(model, "fp8")
    replay = load_replay(registry, exhaustive(shape), shape, h200, ["alpha_moe"])
    block = np.array([c.config.gemms[0].block_m for c in replay.candidates])
    lost = []
    for histogram, times in zip(replay.histograms, replay.times_us, strict=True):
        advised = analyse(replay.shape, h200, histogram).token_block
        lost.append(times[block == advised].min() / times.min() - 1)
    single = compare_recorded(replay).baselines["one configuration"].mean
    assert np.mean(lost) < min(0.1, single)


def test_reasons_are_for_people(registry: Registry) -> None:
    advice = named(regions(registry, "mixtral-8x7b", "mi300x", 128))
    assert "L2 keeps 922 = 0.9 x L2 (32 MiB) / tile of 32 KiB" in advice["GROUP_M swizzle"].derivation
    # 64 KiB of LDS hold two tiles: one is under way while the other is computed on, and a step takes a latency
    assert "32 KiB in flight" in advice["split-K"].derivation
    assert "step of 0.8 us" in advice["split-K"].derivation
    assert "keep memory busy" in advice["split-K"].reason


def test_a_batch_without_tokens(registry: Registry) -> None:
    shape = registry.shape("olmoe-1b-7b")
    with pytest.raises(RoutingError, match="has no tokens"):
        analyse(shape, registry.device("h200"), np.zeros(64, np.int64))
    with pytest.raises(RoutingError, match="one expert histogram, not a batch"):
        analyse(shape, registry.device("h200"), np.ones((2, 64), np.int64))
