"""Grid arithmetic against brute force: tokens are laid into tiles one by one, CTAs are listed and counted."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ramp_moe import GridGeometry, MoEShape, ShapeError
from ramp_moe.cost_model.grids import Grids
from ramp_moe.spec.geometry import MAX_FIELDS, GridFields, m_tiles

CONSTRUCTORS = GridGeometry.gate_up, GridGeometry.down, GridGeometry.fused
histograms = st.lists(st.integers(0, 300), min_size=1, max_size=24).map(lambda h: np.array(h, np.int64))


@st.composite
def geometries(draw: st.DrawFn) -> GridGeometry:
    block_k = draw(st.sampled_from([32, 64, 128]))
    reduction = draw(st.integers(1, 1024))
    return GridGeometry(
        block_m=draw(st.integers(1, 130)),
        block_n=draw(st.integers(1, 512)),
        block_k=block_k,
        n=draw(st.integers(1, 4096)),
        k=reduction,
        expert_bytes=draw(st.integers(1, 10**6)),
        split_k=draw(st.integers(1, -(-reduction // block_k))),
        persistent_ctas=(persistent := draw(st.none() | st.integers(1, 300))),
        stream_k=persistent is not None and draw(st.booleans()),
        ctas_per_sm=draw(st.integers(1, 3)),
        cluster_m=draw(st.sampled_from([1, 2, 4])),
        align_block_size=draw(st.booleans()),
    )


def brute_force_ctas(g: GridGeometry, histogram: np.ndarray) -> int:
    """Every CTA named by (cluster, M-tile within, first row, part of the reduction), of M-tiles that are named by
    (expert, first token)."""
    tiles = {(e, token // g.block_m) for e, count in enumerate(histogram.tolist()) for token in range(count)}
    return len(
        {
            (i // g.cluster_m, within, row, part)
            for i in range(len(tiles))
            for within in range(g.cluster_m)
            for row in range(0, g.n, g.block_n)
            for part in range(g.split_k)
        }
    )


@given(histograms.map(lambda h: h % 40), geometries().filter(lambda g: g.tiles_n * g.split_k <= 40))
def test_logical_matches_brute_force(histogram: np.ndarray, g: GridGeometry) -> None:
    assert int(g.logical(histogram)) == brute_force_ctas(g, histogram)


@given(st.lists(histograms, min_size=1, max_size=3), st.lists(geometries(), min_size=1, max_size=4, unique=True))
def test_grids_together_count_as_each_alone(batch: list[np.ndarray], found: list[GridGeometry]) -> None:
    """As the cost model evaluates them."""
    wide = max(map(len, batch))
    together = np.array([np.pad(h, (0, wide - len(h))) for h in batch])
    grids = Grids([(g,) for g in found], 132)
    counts = grids.count(together)
    ctas = grids.ctas(counts)
    assert ctas[:, grids.launch_of].tolist() == np.stack([g.logical(together) for g in found], 1).tolist()
    waves = grids.by_part("ceil_waves", counts, ctas)
    assert waves.tolist() == np.stack([g.waves(together, 132) for g in found], 1).tolist()


@given(histograms, geometries(), st.data())
def test_one_more_token_never_costs_less(histogram: np.ndarray, g: GridGeometry, data: st.DataObject) -> None:
    more = histogram.copy()
    more[data.draw(st.integers(0, len(histogram) - 1))] += data.draw(st.integers(1, 50))
    assert g.logical(more) >= g.logical(histogram)
    assert g.waves(more, 132) >= g.waves(histogram, 132)
    assert g.weight_bytes(more) >= g.weight_bytes(histogram)


@given(histograms, geometries(), st.integers(1, 40))
def test_empty_experts_cost_nothing(histogram: np.ndarray, g: GridGeometry, extra: int) -> None:
    wider = np.concatenate([histogram, np.zeros(extra, np.int64)])
    for what in ("m_tiles", "logical", "weight_bytes", "weight_traffic", "padding_waste"):
        assert getattr(g, what)(wider) == getattr(g, what)(histogram)


@given(st.lists(st.integers(0, 300), min_size=6, max_size=6), geometries())
def test_a_batch_of_histograms_equals_one_at_a_time(counts: list[int], g: GridGeometry) -> None:
    batch = np.array(counts, np.int64).reshape(2, 3)
    for what in (g.m_tiles, g.logical, g.weight_bytes, g.weight_traffic, g.padding_waste):
        assert what(batch).tolist() == [what(h).tolist() for h in batch]
    assert g.waves(batch, 132).tolist() == [int(g.waves(h, 132)) for h in batch]
    assert g.tail_utilisation(batch, 132).tolist() == [float(g.tail_utilisation(h, 132)) for h in batch]
    blocks = np.array([1, 16, 128])
    assert m_tiles(batch, blocks).tolist() == [[int(m_tiles(h, int(b))) for b in blocks] for h in batch]


@given(histograms, geometries())
def test_the_launch_covers_every_routing(histogram: np.ndarray, g: GridGeometry) -> None:
    if g.persistent_ctas is not None:
        assert g.launched(int(histogram.sum()), len(histogram)) == g.persistent_ctas
        return
    assert g.launched(int(histogram.sum()), len(histogram)) >= int(g.logical(histogram))


@given(st.integers(0, 400), st.integers(1, 24), st.integers(1, 130))
def test_the_tight_bound_is_reached(ids: int, experts: int, block: int) -> None:
    g = GridGeometry(block_m=block, block_n=64, block_k=64, n=64, k=64, expert_bytes=1)
    worst = np.zeros(experts, np.int64)
    worst[: min(ids, experts)] = 1
    worst[0] += max(0, ids - experts)
    assert g.max_m_tiles(ids, experts) == int(g.m_tiles(worst))


@given(st.integers(1, 5000), st.integers(1, 300), st.sampled_from([16, 32, 64, 128]))
def test_aligned_bound_is_vllms_buffer(ids: int, experts: int, block: int) -> None:
    padded = ids + experts * (block - 1)
    if ids < experts:
        padded = min(ids * block, padded)
    g = GridGeometry(block_m=block, block_n=64, block_k=64, n=64, k=64, expert_bytes=1, align_block_size=True)
    # vLLM also caps the grid at one tile an id for batches below the block; no buffer is longer than that here
    assert g.max_m_tiles(ids, experts) == min(ids, math.ceil(padded / block))


@given(histograms, geometries(), st.integers(1, 200))
def test_waves_tail_and_padding(histogram: np.ndarray, g: GridGeometry, sms: int) -> None:
    slots = sms * g.ctas_per_sm if g.persistent_ctas is None else min(sms * g.ctas_per_sm, g.persistent_ctas)
    ctas = int(g.logical(histogram))
    assert g.cta_slots(sms) == slots
    assert int(g.waves(histogram, sms)) == math.ceil(ctas / slots)
    if ctas == 0:
        assert float(g.tail_utilisation(histogram, sms)) == 1.0
        assert float(g.padding_waste(histogram)) == 0.0
        return
    tail = 1.0 if g.stream_k else ctas / slots / math.ceil(ctas / slots)
    assert float(g.tail_utilisation(histogram, sms)) == pytest.approx(tail)
    filled = float(histogram.sum()) / (int(g.m_tiles(histogram)) * g.block_m)
    assert float(g.padding_waste(histogram)) == pytest.approx(1 - filled)


def test_bytes_of_weights() -> None:
    g = GridGeometry(block_m=16, block_n=128, block_k=128, n=256, k=512, expert_bytes=1000)
    histogram = np.array([0, 1, 16, 17])
    assert int(g.weight_bytes(histogram)) == 3 * 1000
    assert int(g.weight_traffic(histogram)) == 4 * 1000


WRONG: list[Any] = [1.5, 2.0, True, "1", float("nan")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({field: 0}, f"{field} must lie between 1 and ") for field in MAX_FIELDS),
        *(
            ({field: most + 1}, f"{field} must lie between 1 and {most}, not {most + 1}")
            for field, most in MAX_FIELDS.items()
        ),
        *(({field: value}, f"{field} must be an integer, not {value!r}") for field in MAX_FIELDS for value in WRONG),
        ({"block_n": 10**30}, "block_n must lie between 1 and 1048576"),
        ({"block_m": 2**11, "block_n": 2**10}, "a tile of 2048 tokens by 1024 weight rows has more than"),
        ({"split_k": 5}, "split_k 5 exceeds the 4 steps"),
        ({"cluster_m": 3}, "cluster_m must be 1, 2, 4, 8 or 16, not 3"),
        ({"stream_k": True}, "stream_k needs persistent_ctas"),
    ],
)
def test_impossible_grids(change: dict[str, Any], message: str) -> None:
    assert {f.name for f in dataclasses.fields(GridGeometry)} == {*MAX_FIELDS, "align_block_size", "stream_k"}
    g = GridGeometry(block_m=16, block_n=128, block_k=128, n=256, k=512, expert_bytes=1)
    with pytest.raises(ShapeError, match=message):
        dataclasses.replace(g, **change)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("inter", [768, 320])
def test_constructors_for_the_projections(dtype: str, inter: int) -> None:
    shape = MoEShape(8, 2, 2048, inter, dtype)
    tile = {"block_m": 16, "block_n": 128, "block_k": 64}
    up, down, fused = (make(shape, **tile, split_k=2) for make in CONSTRUCTORS)
    assert (up.n, up.k, up.expert_bytes) == (2 * inter, 2048, shape.gate_up_bytes)
    assert (down.n, down.k, down.expert_bytes) == (2048, inter, shape.down_bytes)
    assert (fused.n, fused.k, fused.expert_bytes) == (2 * inter, 2048, shape.expert_bytes)
    assert {(g.block_m, g.block_n, g.block_k, g.split_k) for g in (up, down, fused)} == {(16, 128, 64, 2)}


def test_fields_are_given_by_name() -> None:
    with pytest.raises(TypeError):
        GridGeometry(16, 128, 128, 256, 512, 1)  # type: ignore[misc]
    for make in CONSTRUCTORS:
        with pytest.raises(TypeError):
            make(MoEShape(8, 2, 128, 128, "bf16"), 16, 128, 64)  # type: ignore[misc]


def test_constructors_take_every_field_that_the_shape_does_not_give() -> None:
    fields = {f.name for f in dataclasses.fields(GridGeometry)}
    assert {*GridFields.__annotations__, "n", "k", "expert_bytes"} == fields
