"""Samples of what a server routed: histograms that ran, weighted by how often."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ramp_moe import RoutingError, expert_histogram, generate
from ramp_moe.measurements.trace import load_trace
from ramp_moe.runtime.traffic import CLASSES, SLOTS, Traffic

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EXPERTS, TOP_K = 20, 3


def ids(tokens: int, seed: int = 0, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(generate("uniform", tokens, EXPERTS, TOP_K, seed), dtype=dtype, device=DEVICE)


def counts(of: torch.Tensor) -> list[int]:
    found: list[int] = expert_histogram(of.cpu().numpy(), EXPERTS).tolist()
    return found


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("tokens", [1, 2, 7, 500])
def test_a_batch_is_what_ran(tokens: int, dtype: torch.dtype) -> None:
    traffic = Traffic(EXPERTS, TOP_K, DEVICE)
    layer, batch = traffic.layer(), ids(tokens, dtype=dtype)
    traffic.sample(layer, batch)
    assert list(traffic.read()) == [(tokens, counts(batch), 1.0)]


def test_ids_out_of_range_are_skipped() -> None:
    traffic = Traffic(EXPERTS, TOP_K, DEVICE)
    batch = torch.tensor([[-1, EXPERTS, 3], [99, 3, -7]], dtype=torch.int32, device=DEVICE)
    traffic.sample(traffic.layer(), batch)
    ((tokens, histogram, _),) = traffic.read()
    assert tokens == 2
    assert histogram == [2 if e == 3 else 0 for e in range(EXPERTS)]


def test_the_latest_are_kept_and_stand_for_all() -> None:
    """Of each layer and class of sizes."""
    traffic = Traffic(EXPERTS, TOP_K, DEVICE)
    layers = [traffic.layer(), traffic.layer()]
    ran = 3 * SLOTS + 5
    for i in range(ran):
        traffic.sample(layers[0], ids(5, i))
    traffic.sample(layers[1], ids(300))
    found = list(traffic.read())
    small = [(h, runs) for tokens, h, runs in found if tokens == 5]
    assert len(small) == SLOTS - 1, "the oldest could be half overwritten"
    latest = [counts(ids(5, i)) for i in range(ran - SLOTS + 1, ran)]
    assert sorted(h for h, _ in small) == sorted(latest)
    assert sum(runs for _, runs in small) == pytest.approx(ran)
    assert [(tokens, runs) for tokens, _, runs in found if tokens != 5] == [(300, 1.0)]


def test_sizes_beyond_the_last_class_are_in_it() -> None:
    traffic = Traffic(1, 1, DEVICE)
    batch = torch.zeros((1 << CLASSES) + 1, 1, dtype=torch.int32, device=DEVICE)
    traffic.sample(traffic.layer(), batch)
    assert list(traffic.read()) == [(len(batch), [len(batch)], 1.0)]


def test_what_is_written_is_a_trace(tmp_path: Path) -> None:
    traffic = Traffic(EXPERTS, TOP_K, DEVICE)
    layer = traffic.layer()
    with pytest.raises(RoutingError, match="no batch with a token"):
        traffic.write(tmp_path / "trace.jsonl", "a server")
    traffic.sample(layer, ids(0).reshape(0, TOP_K))
    for i in range(3):
        traffic.sample(layer, ids(4, i))
    traffic.sample(layer, ids(100))
    assert traffic.write(tmp_path / "trace.jsonl", "a server") == 4
    trace = load_trace(tmp_path / "trace.jsonl")
    assert (trace.num_experts, trace.top_k, trace.source) == (EXPERTS, TOP_K, "a server")
    assert [b.tokens for b in trace.batches] == [4, 4, 4, 100]
    assert [b.runs for b in trace.batches] == [1.0] * 4
    assert trace.batches[3].histogram.tolist() == counts(ids(100))
