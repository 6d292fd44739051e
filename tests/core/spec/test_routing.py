from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ramp_moe import RoutingError, UnknownNameError, expert_histogram, generate
from ramp_moe.spec.routing import _largest as largest
from ramp_moe.spec.routing import balancedness, check_histogram

KINDS = ("uniform", "zipf1.2", "dirichlet0.3", "balancedness0.5", "distinct0.5", "active0.25", "one-hot")


@given(st.lists(st.lists(st.integers(-1, 8), min_size=2, max_size=2), max_size=40))
def test_histogram_counts_and_skips_padding(ids: list[list[int]]) -> None:
    flat = [i for row in ids for i in row]
    assert expert_histogram(ids, 8).tolist() == [flat.count(e) for e in range(8)]


def test_histogram_of_torch_ids() -> None:
    torch = pytest.importorskip("torch")
    ids = torch.tensor([[0, 2], [2, -1]], dtype=torch.int32)
    assert expert_histogram(ids, 3).tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[0, 9]], r"expert id 9 is outside \[0, 8\)"),
        ([[-2, 0]], "expert id -2 is outside"),
        ([[0.5, 1.0]], "must be integers, not float64"),
        ([[0, 1], [2]], "ragged"),
    ],
)
def test_bad_ids(ids: list[list[float]], message: str) -> None:
    with pytest.raises(RoutingError, match=message):
        expert_histogram(ids, 8)


@pytest.mark.parametrize(
    ("histogram", "message"),
    [
        ([1, 2, 3], "has 3 entries, the shape has 4 experts"),
        ([1, 2, -3, 0], r"negative count \(-3\) at expert 2"),
        ([1, 2.5, 0, 0], "whole token counts, not float64"),
        ([1, float("nan"), 0, 0], "whole token counts"),
        (["a", "b", "c", "d"], "whole token counts"),
        ([[1, 2, 3, 4], [1]], "differ in length"),
        (3, "needs one count per expert"),
        ([], "needs one count per expert"),
        ([5, 5, 5, 2], r"counts 17 ids, more than tokens x top_k = 16"),
    ],
)
def test_bad_histograms(histogram: object, message: str) -> None:
    with pytest.raises(RoutingError, match=message):
        check_histogram(histogram, 4, max_ids=16)


def test_fewer_counts_than_ids_are_legal() -> None:
    assert check_histogram([1.0, 0, 0, 0], 4, max_ids=16).dtype == np.int64


@pytest.mark.parametrize("kind", KINDS)
def test_generators_are_seeded_and_in_range(kind: str) -> None:
    ids = generate(kind, 50, 32, 4, seed=7)
    assert ids.shape == (50, 4)
    assert ids.dtype == np.int64
    assert ids.min() >= 0
    assert ids.max() < 32
    assert np.array_equal(ids, generate(kind, 50, 32, 4, seed=7))
    assert not np.array_equal(ids, generate(kind, 50, 32, 4, seed=8))
    if kind not in ("balancedness0.5", "one-hot"):
        assert all(len(set(row)) == 4 for row in ids.tolist())


def test_balancedness_has_half_the_ids_on_the_hot_expert_and_repeats_it() -> None:
    ids = balancedness(4000, 64, 8, 0.5, seed=1)
    share = np.bincount(ids.ravel(), minlength=64) / ids.size
    assert share.max() == pytest.approx(0.5 + 0.5 / 64, abs=0.01)
    assert any(len(set(row)) < 8 for row in ids.tolist())
    distinct = balancedness(4000, 64, 8, 0.5, distinct=True, seed=1)
    # every token names the hot expert at most once: an eighth of the ids
    assert (np.bincount(distinct.ravel(), minlength=64) / distinct.size).max() <= 1 / 8


def test_uniform_is_flat_and_zipf_follows_its_ranks() -> None:
    flat = expert_histogram(generate("uniform", 4000, 16, 1), 16)
    assert flat.std() / flat.mean() < 0.1
    skewed = np.sort(expert_histogram(generate("zipf1", 20000, 16, 1), 16))[::-1]
    assert skewed[0] / skewed[3] == pytest.approx(4, rel=0.15)


def test_few_active_and_one_hot() -> None:
    assert np.count_nonzero(expert_histogram(generate("active0.25", 500, 64, 4), 64)) == 16
    assert np.count_nonzero(expert_histogram(generate("active0", 500, 64, 4), 64)) == 4
    assert np.count_nonzero(expert_histogram(generate("one-hot", 500, 64, 4), 64)) == 1


def test_zero_tokens() -> None:
    assert expert_histogram(generate("uniform", 0, 8, 2), 8).sum() == 0


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("unifrom", UnknownNameError, "did you mean 'uniform'"),
        ("zipf", UnknownNameError, "did you mean 'zipfV'"),
        ("balancedness1.5", RoutingError, r"must lie in \[0, 1\], not 1.5"),
        ("dirichlet0", RoutingError, "must be positive"),
    ],
)
def test_bad_kinds(kind: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        generate(kind, 4, 8, 2)


def test_bad_sizes() -> None:
    with pytest.raises(RoutingError, match="at least 0, not -1"):
        generate("uniform", -1, 8, 2)
    with pytest.raises(RoutingError, match=r"top_k must lie in \[1, 8\], not 9"):
        generate("uniform", 1, 8, 9)


@pytest.mark.parametrize("kind", ["uniform", "zipf1.2", "dirichlet0.3", "distinct0.5", "active0.3"])
def test_ids_drawn_in_parts_are_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = generate(kind, 100, 16, 4, seed=3)
    monkeypatch.setattr("ramp_moe.spec.routing.DRAWN_AT_ONCE", 16 * 7)
    assert generate(kind, 100, 16, 4, seed=3).tolist() == whole.tolist()


@given(
    st.lists(st.lists(st.sampled_from([-np.inf, 0.0, 0.5, 1.0]), min_size=5, max_size=5), min_size=1), st.integers(1, 5)
)
def test_the_first_of_equal_keys_is_drawn_first(rows: list[list[float]], count: int) -> None:
    keys = np.array(rows)
    expected = [sorted(range(5), key=lambda i: (-row[i], i))[:count] for row in rows]
    assert largest(keys, count).tolist() == expected
