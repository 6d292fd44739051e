from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from ramp_moe import MoEShape, get_registry
from ramp_moe.profiler.plan import (
    FIRST_TEST_SEED,
    HEAD_START,
    MAX_TUNE,
    TEST_KINDS,
    TEST_SIZES,
    TUNE_KINDS,
    TUNE_SIZES,
    PlannedBatch,
    _draw,
    _test_pool,
    _tune_pool,
    features,
    plan,
)
from ramp_moe.spec.routing import FloatArray, IntArray
from tiers import slow_except

MODELS = ("olmoe-1b-7b", "qwen3-30b-a3b", "deepseek-v3-tp8", "mixtral-8x7b-tp4")
FOUR_OF_FOUR = MoEShape(4, 4, 256, 128)
ONE_EXPERT = MoEShape(1, 1, 256, 128)
SHAPES = tuple(get_registry().shape(name, "fp8") for name in MODELS)
FEW = (SHAPES[0], FOUR_OF_FOUR, ONE_EXPERT)
ALL = pytest.mark.parametrize("shape", slow_except(FEW, [*SHAPES, FOUR_OF_FOUR, ONE_EXPERT]), ids=lambda s: s.label)
MODELS_ONLY = pytest.mark.parametrize("shape", slow_except(SHAPES[:1], SHAPES), ids=lambda s: s.label)


@functools.cache
def planned(shape: MoEShape) -> tuple[tuple[PlannedBatch, ...], IntArray]:
    """A plan and its histograms `[batches, experts]`, from the batches themselves."""
    batches = tuple(plan(shape))
    return batches, np.array([b.histogram(shape) for b in batches])


def tune_of(shape: MoEShape) -> list[PlannedBatch]:
    return [b for b in planned(shape)[0] if b.split == "tune"]


def coverage(f: FloatArray, chosen: IntArray) -> float:
    """Distance of the batch that lies farthest from the nearest chosen one."""
    return float(np.linalg.norm(f[:, None] - f[chosen], axis=-1).min(1).max())


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3]], ids=lambda s: s.label)
def test_the_plan_depends_on_experts_and_top_k_alone(shape: MoEShape) -> None:
    other = dataclasses.replace(shape, hidden_size=512, intermediate_size=256, dtype="bf16", name="another")
    assert tuple(plan(other)) == planned(shape)[0]


@pytest.mark.slow
@MODELS_ONLY
def test_what_is_planned(shape: MoEShape) -> None:
    batches, _ = planned(shape)
    assert len(tune_of(shape)) == MAX_TUNE
    assert {b.routing for b in batches if b.split == "test"} == set(TEST_KINDS)
    assert {b.num_tokens for b in batches if b.split == "test"} == set(TEST_SIZES)
    assert sum(b.split == "test" for b in batches) == len(TEST_SIZES) * len(TEST_KINDS)
    # With few experts both fractions of active experts come to top_k, and are drawn alike.
    assert set(TUNE_KINDS) - {b.routing for b in tune_of(shape)} <= {"active0.3"}


@ALL
def test_ids_are_of_the_shape(shape: MoEShape) -> None:
    batches, histograms = planned(shape)
    assert batches[0] == PlannedBatch(64, "uniform", batches[0].seed, "tune")
    assert histograms.shape == (len(batches), shape.num_experts)
    assert histograms.sum(1).tolist() == [b.num_tokens * shape.top_k for b in batches]
    assert batches[0].topk_ids(shape).shape == (64, shape.top_k)


@pytest.mark.slow
@ALL
def test_one_draw_for_many_sizes_is_what_each_batch_draws(shape: MoEShape) -> None:
    for batch, histogram in _draw([*_tune_pool(), *_test_pool(FIRST_TEST_SEED)], shape):
        if batch.num_tokens * shape.num_experts <= 2**19:  # every size of the shapes that are drawn in no time
            assert np.array_equal(histogram, batch.histogram(shape)), batch


@ALL
def test_every_uniform_size_comes_early(shape: MoEShape) -> None:
    early = tune_of(shape)[: 3 * len(TUNE_SIZES)]
    assert {b.num_tokens for b in early if b.routing == "uniform" and b.seed == early[0].seed} == set(TUNE_SIZES)


@MODELS_ONLY
def test_uniform_batches_alternate_with_two_others(shape: MoEShape) -> None:
    tune = tune_of(shape)
    first_draw = [b.routing == "uniform" and b.seed == tune[0].seed for b in tune]
    assert first_draw[: 3 * len(TUNE_SIZES)] == [True, False, False] * len(TUNE_SIZES)


@MODELS_ONLY
def test_a_test_batch_follows_every_two_tune_batches(shape: MoEShape) -> None:
    splits = [b.split for b in planned(shape)[0]]
    turns = (MAX_TUNE - HEAD_START) // 2
    assert splits[:HEAD_START] == ["tune"] * HEAD_START
    assert splits[HEAD_START : HEAD_START + 3 * turns] == ["tune", "tune", "test"] * turns
    assert set(splits[HEAD_START + 3 * turns :]) == {"test"}


@ALL
def test_tests_are_held_out(shape: MoEShape) -> None:
    batches, _ = planned(shape)
    tune, test = ([b for b in batches if b.split == split] for split in ("tune", "test"))
    assert not {b.seed for b in tune} & {b.seed for b in test}
    assert {b.routing for b in tune} & {b.routing for b in test} <= {"uniform"}
    assert {b.routing for b in tune} <= set(TUNE_KINDS)
    assert {b.routing for b in test} <= set(TEST_KINDS)


@ALL
def test_no_batch_is_planned_twice(shape: MoEShape) -> None:
    batches, histograms = planned(shape)
    assert len({(b.num_tokens, h.tobytes()) for b, h in zip(batches, histograms, strict=True)}) == len(batches)


def test_one_expert_leaves_only_the_sizes() -> None:
    batches, _ = planned(ONE_EXPERT)
    assert sorted(b.num_tokens for b in batches if b.split == "tune") == list(TUNE_SIZES)
    assert sorted(b.num_tokens for b in batches if b.split == "test") == sorted(set(TEST_SIZES) - set(TUNE_SIZES))


@MODELS_ONLY
def test_a_prefix_covers_the_pool_better_than_random_batches(shape: MoEShape) -> None:
    drawn = dict(_draw(_tune_pool(), shape))
    pool = list(drawn)
    f = features(np.array([b.num_tokens for b in pool]), np.array(list(drawn.values())))
    order = np.array([pool.index(b) for b in tune_of(shape)])
    rng = np.random.default_rng(0)
    for length in (20, 30, 60):
        random = [rng.choice(len(pool), length, replace=False) for _ in range(200)]
        assert coverage(f, order[:length]) < min(coverage(f, r) for r in random), length
    assert coverage(f, order) < 0.05


@MODELS_ONLY
def test_a_prefix_of_the_tests_has_every_kind_and_small_and_large_batches(shape: MoEShape) -> None:
    test = [b for b in planned(shape)[0] if b.split == "test"][:12]
    assert {b.routing for b in test} == set(TEST_KINDS)
    assert min(b.num_tokens for b in test) <= 3
    assert max(b.num_tokens for b in test) >= 3072


def test_features_span_one_and_survive_columns_that_never_change() -> None:
    f = features(np.array([1, 4]), np.array([[1, 0], [4, 0]]))
    # One active expert in both, and one tile of each block.
    assert f.tolist() == [[0.0] * 8, [1.0, *[0.0] * 6, 1.0]]
