"""The selection kernel against what the table costs by hand; interpreted where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RECORDED
from ramp_moe import CostModel, Hardware, ProfileStore, Registry
from ramp_moe.errors import KernelError, ShapeError
from ramp_moe.evaluation.replay import load_replay
from ramp_moe.runtime.graphs.cost_table import CostTable
from ramp_moe.runtime.graphs.recorder import Recorder
from ramp_moe.runtime.graphs.selector_triton import MAX_IDS, TritonSelector
from ramp_moe.spec.routing import IntArray
from select_cases import ROUTINGS, by_hand, counted, largest_table, routed
from tiers import slow_except

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOP_K = 2
"""Mixtral's: all routings can be drawn for every model."""


def whole(model: CostModel) -> CostTable:
    """Of all candidates that can be chosen."""
    return CostTable.of(model, model.contenders.tolist())


def check(
    selector: TritonSelector,
    table: CostTable,
    topk_ids: torch.Tensor,
    num_valid: int | None = None,
    recorder: Recorder | None = None,
) -> IntArray:
    """Run, compare with the table by hand; its histogram."""
    cost = torch.full((table.num_candidates,), torch.nan, device=DEVICE)
    valid = None if num_valid is None else torch.tensor([num_valid], dtype=torch.int32, device=DEVICE)
    selector.choice.fill_(-77)
    selector.histogram.fill_(-77)
    selector.launch(topk_ids.to(DEVICE), valid, recorder=recorder, cost_us=cost)
    histogram = counted(topk_ids, len(selector.histogram), num_valid)
    assert selector.histogram.tolist() == histogram.tolist()
    expected, found = by_hand(table, histogram), cost.cpu().numpy()
    assert found == pytest.approx(expected, rel=1e-3)
    assert selector.choice.item() == found.argmin()
    return histogram


@pytest.fixture(scope="module")
def table(registry: Registry, h200: Hardware) -> CostTable:
    """OLMoE's, the smooth form. Of what ships, whatever is in the user's data folder."""
    shape = registry.shape("olmoe-1b-7b", "fp8")
    store = ProfileStore(registry.profile_dirs)
    return whole(load_replay(registry, store, shape, h200, ("alpha_moe", "triton")).fit(form="smooth"))


@pytest.mark.parametrize("form", ["active", "smooth"])
@pytest.mark.parametrize("kernels", [("alpha_moe",), ("triton",), ("alpha_moe", "deep_gemm", "triton")], ids=" + ".join)
@pytest.mark.parametrize("model", slow_except(RECORDED[:1], RECORDED))
def test_recorded_models(
    registry: Registry, shipped: ProfileStore, h200: Hardware, model: str, kernels: tuple[str, ...], form: str
) -> None:
    shape = registry.shape(model, "fp8")
    table = whole(load_replay(registry, shipped, shape, h200, kernels).fit(form=form))
    selector = TritonSelector(table, shape.num_experts, DEVICE)
    choices = set()
    for seed, routing in enumerate(ROUTINGS):
        tokens = (1, 700, 60, 512, 37, 20, 100)[seed]
        check(selector, table, routed(routing, tokens, shape.num_experts, TOP_K, seed))
        choices.add(selector.choice.item())
    assert len(choices) > 1


@pytest.mark.parametrize("form", ["paper", "ceil"])
def test_other_forms(registry: Registry, shipped: ProfileStore, h200: Hardware, form: str) -> None:
    shape = registry.shape("qwen3-30b-a3b", "fp8")
    table = whole(load_replay(registry, shipped, shape, h200, ("triton",)).fit(form=form))
    selector = TritonSelector(table, shape.num_experts, DEVICE)
    for tokens in (1, 50, 400):
        check(selector, table, routed("uniform", tokens, shape.num_experts, TOP_K))


@pytest.mark.parametrize("num_valid", [0, 1, 30, 37, 38, 2**31 - 1, -1, -(2**31)])
def test_tokens_past_num_valid_are_skipped(table: CostTable, num_valid: int) -> None:
    check(TritonSelector(table, 64, DEVICE), table, routed("padded", 37, 64, 8), num_valid)


def test_int64_ids_do_not_wrap_into_range(table: CostTable) -> None:
    ids = torch.tensor([[0, 2**32], [2**32 + 1, 1], [-(2**63), 2**63 - 1]])
    check(TritonSelector(table, 64, DEVICE), table, ids)


@pytest.mark.parametrize("tokens", [0, 1, 512, 513, 2000])
def test_any_number_of_ids(table: CostTable, tokens: int) -> None:
    check(TritonSelector(table, 64, DEVICE), table, routed("uniform", tokens, 64, 2))


@pytest.mark.parametrize("form", ["active", "smooth"])
def test_the_first_of_equal_ones(registry: Registry, shipped: ProfileStore, h200: Hardware, form: str) -> None:
    replay = load_replay(registry, shipped, registry.shape("olmoe-1b-7b", "fp8"), h200, ("alpha_moe", "triton"))
    model = replay.fit(form=form)
    ids = routed("uniform", 64, 64, 8)
    us = model.cost(counted(ids, 64))[model.contenders]
    order = model.contenders[np.argsort(us, kind="stable")].tolist()
    best = order[0]
    for behind, columns in ((0, [best] * 40), (30, order[30:0:-1] + [best] * 20), (6, [*order[1:7], *order] * 3)):
        table = CostTable.of(model, columns)
        selector = TritonSelector(table, 64, DEVICE)
        check(selector, table, ids)
        assert selector.choice.item() == behind


def test_without_any_cost_the_choice_exists(table: CostTable) -> None:
    without = {"unit": table.unit[:0], "points": table.points[:0], "weights": table.weights[:0]}
    for given in (table, replace(table, **without)):
        broken = replace(given, floor=np.full_like(table.floor, np.nan), coefficients=table.coefficients * np.nan)
        selector = TritonSelector(broken, 64, DEVICE)
        selector.launch(routed("uniform", 9, 64, 8).to(DEVICE))
        assert selector.choice.tolist() == [0]


@pytest.mark.parametrize("num_experts", slow_except([1024], [1, 3, 1024]))
def test_as_much_as_a_table_may_have(num_experts: int) -> None:
    table = largest_table()
    selector = TritonSelector(table, num_experts, DEVICE)
    for seed, routing in enumerate(("uniform", "garbage", "empty")):
        ids = routed(routing, 300, num_experts, min(8, num_experts), seed)
        check(selector, table, ids)


def test_most_ids(table: CostTable) -> None:
    ids = routed("zipf1.2", MAX_IDS // 8, 64, 8)
    check(TritonSelector(table, 64, DEVICE), table, ids, MAX_IDS // 8 - 5)


def test_it_records(table: CostTable) -> None:
    recorder = Recorder(3, 64, 8, DEVICE)
    selector = TritonSelector(table, 64, DEVICE)
    rows = []
    for tokens, num_valid in ((5, None), (9, 4), (6, 0), (1, None), (200, 400)):
        histogram = check(selector, table, routed("uniform", tokens, 64, 8, tokens), num_valid, recorder)
        label = table.label[selector.choice.item()]
        rows.append([tokens if num_valid is None else min(tokens, num_valid), label, *histogram])
    assert recorder.counter.tolist() == [5]
    assert recorder.ring.tolist() == [rows[3], rows[4], rows[2]]


def test_bad_input(table: CostTable) -> None:
    selector = TritonSelector(table, 64, DEVICE)
    ids = routed("uniform", 8, 64, 2).to(DEVICE)
    few = torch.zeros(3, device=DEVICE)
    for arguments, error, message in (
        ((ids.float(),), KernelError, "topk_ids must be int32 or int64, not float32; convert"),
        ((ids.T,), KernelError, "topk_ids must be contiguous, its strides are"),
        ((ids.to("meta"),), KernelError, f"topk_ids must be on {ids.device}, not on meta; move"),
        ((ids[0],), ShapeError, r"topk_ids must be \[T, k\], not \[2\]"),
        ((torch.zeros(2**13 + 1, 8, dtype=torch.int32, device=DEVICE),), KernelError, "65536 ids at most, not 65544"),
        ((ids, torch.tensor([1], device=DEVICE)), KernelError, "num_valid must be int32, not int64"),
        ((ids, torch.tensor(1, device=DEVICE)), ShapeError, r"num_valid must be \[1\], not \[\]"),
        (
            (ids, None, None, None, few),
            ShapeError,
            rf"cost_us must be \[{table.num_candidates}\]",
        ),
    ):
        with pytest.raises(error, match=message):
            selector.launch(*arguments)
    for num_experts in (0, 1025):
        with pytest.raises(KernelError, match=f"1 to 1024 experts, not {num_experts}; choose on the host"):
            TritonSelector(table, num_experts, DEVICE)
    for recorder in (Recorder(4, 8, 2, DEVICE), Recorder(4, 64, 8, DEVICE)):
        with pytest.raises(
            KernelError, match=f"the recorder is for {recorder.top_k} of {recorder.num_experts} experts"
        ):
            selector.launch(ids, recorder=recorder)


@pytest.mark.slow
def test_it_compiles_small() -> None:
    """In a process that knows nothing of the interpreter. Code is fetched from memory once a layer."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parents[3] / "support" / "compile_select.py"
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 3
    for case, of_case in found.items():
        assert of_case["shared"] <= 16384
        assert 0 < of_case["code"] <= 30 * 1024, case


@pytest.mark.gpu
@pytest.mark.parametrize("num_experts", [64, 1024])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_large_batches(table: CostTable, routing: str, num_experts: int) -> None:
    for given in (table, largest_table()):
        selector = TritonSelector(given, num_experts, DEVICE)
        for tokens in (1, 100, 2000, MAX_IDS // 8):
            ids = routed(routing, tokens, num_experts, 8, tokens)
            check(selector, given, ids)
            check(selector, given, ids.long(), tokens // 2)


@pytest.mark.gpu
def test_a_graph_chooses_anew(table: CostTable) -> None:
    recorder = Recorder(16, 64, 8, DEVICE)
    for tokens in (4, 256, MAX_IDS // 8):
        recorder.counter.zero_()
        selector = TritonSelector(table, 64, DEVICE)
        ids = routed("uniform", tokens, 64, 8).to(DEVICE)
        valid = torch.tensor([tokens], dtype=torch.int32, device=DEVICE)
        cost = torch.zeros(table.num_candidates, device=DEVICE)
        selector.launch(ids, valid, recorder=recorder, cost_us=cost)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            selector.launch(ids, valid, recorder=recorder, cost_us=cost)
        rows = []
        for seed, routing in enumerate(ROUTINGS):
            num_valid = tokens if seed % 2 else max(1, tokens // 2)
            ids.copy_(routed(routing, tokens, 64, 8, seed))
            valid.fill_(num_valid)
            graph.replay()
            histogram = counted(ids, 64, num_valid)
            expected = by_hand(table, histogram)
            assert selector.histogram.tolist() == histogram.tolist()
            assert cost.tolist() == pytest.approx(expected.tolist(), rel=1e-3)
            assert selector.choice.item() == cost.cpu().numpy().argmin()
            rows.append([num_valid, table.label[selector.choice.item()], *histogram.tolist()])
        found = recorder.read()
        read = np.column_stack([found.tokens, found.choices, found.histograms]).tolist()
        assert read[1:] == rows
