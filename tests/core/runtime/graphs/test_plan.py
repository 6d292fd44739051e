"""What a graph gets is decided before any is captured. Here on the CPU: streams do nothing, and the choice that a GPU's
kernel would make is the model's."""

from __future__ import annotations

import gc
import itertools
import re
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from graph_cases import priced
from layer_cases import BLOCKS, SHAPE, FakeKernel, K, inputs, weights
from ramp_moe import Candidate, Hardware, KernelConfig, KernelError, expert_histogram
from ramp_moe.runtime.graphs import capture as dispatch
from ramp_moe.runtime.graphs import conditional as graph
from ramp_moe.runtime.graphs.capture import GraphDispatch, GraphPlan
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.runtime.reference import reference
from ramp_moe.spec.launchable import Batch, Workspace

TOKENS = 64
DEAR = {8: 100.0, 32: 150.0, 128: 250.0}
"""Microseconds a tile, by token block."""


class Marking(FakeKernel):
    """Its output is as far off, by token block, as is allowed, so that outputs tell what ran. `faults` are of a token
    block each: "raises", "writes outside" or "wrong"."""

    def __init__(self, name: str = "fake") -> None:
        super().__init__(name)
        self.faults: dict[int, str] = {}
        self.error: Exception = RuntimeError("no such luck")

    def launch(
        self, config: KernelConfig, prepared: Any, batch: Batch, out: torch.Tensor, workspace: Workspace
    ) -> None:
        super().launch(config, prepared, batch, out, workspace)
        block = dict(config.params)["block"]
        out *= {8: 1.0, 32: 1.004, 128: 1.008}[block]
        fault = self.faults.get(block)
        if fault == "raises":
            raise self.error
        if fault == "wrong":
            out[3] += 1
        if fault == "writes outside":
            out.as_strided((1, out.shape[1]), out.stride(), out.storage_offset() - out.shape[1]).zero_()


class Choosing:
    """Stands in for `CudaSelector`: it chooses what it is told."""

    function = None

    def __init__(self, table: Any, num_experts: int, device: torch.device) -> None:
        self.choice = torch.zeros(1, dtype=torch.int32)
        self.told = 0

    def launch(self, topk_ids: torch.Tensor, num_valid: Any, kernel_ids: torch.Tensor, *rest: Any, **more: Any) -> None:
        kernel_ids.copy_(topk_ids)
        self.choice.fill_(self.told)


@pytest.fixture
def dispatcher(monkeypatch: pytest.MonkeyPatch, h200: Hardware) -> Callable[..., tuple[GraphDispatch, Marking]]:
    """Makes one over a kernel whose three configurations win for different routings, on a machine that refuses modes
    as asked."""
    stream = SimpleNamespace(wait_stream=lambda other: None, cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(dispatch, "CudaSelector", Choosing)
    monkeypatch.setattr(graph, "kernel_nodes", lambda body, side: 5)

    def make(
        mode: str | None = None, refused: dict[str, str] | None = None, prices: dict[int, float] = DEAR
    ) -> tuple[GraphDispatch, Marking]:
        monkeypatch.setattr(graph, "unsupported", (refused or {}).get)
        kernel = Marking()
        model = priced(h200, {Candidate("fake", kernel.config(b)): us for b, us in prices.items()}, SHAPE)
        layer = LayerRuntime(weights(), K, h200, [kernel], cost_model=model)
        layer.graphs = GraphDispatch(layer, weights(), model, K, mode)
        return layer.graphs, kernel

    return make


def prepared(graphs: GraphDispatch) -> GraphPlan:
    return graphs.prepare(TOKENS, torch.bfloat16)


def names(plan: GraphPlan) -> set[str]:
    return {c.config.name for c in plan.bodies}


Make = Callable[..., tuple[GraphDispatch, Marking]]
OLD = "needs CUDA 12.8; the driver has 12.2"


@pytest.mark.parametrize(
    ("mode", "refused", "found", "why"),
    [
        (None, {}, "nodes", "least expected time"),
        (None, {"nodes": OLD}, "switch", f"least expected time; nodes: {OLD}"),
        (None, {"nodes": OLD, "switch": OLD}, "gated", f"least expected time; nodes: {OLD}; switch: {OLD}"),
        ("switch", {"nodes": OLD}, "switch", "least expected time"),
        ("gated", {"nodes": OLD, "switch": OLD}, "gated", "least expected time"),
        ("single", {}, "single", "one candidate is best, or switching would cost more than it gains"),
    ],
)
def test_the_cheapest_mode_that_there_is(
    dispatcher: Make, mode: str | None, refused: dict[str, str], found: str, why: str
) -> None:
    graphs, _ = dispatcher(mode, refused)
    plan = prepared(graphs)
    assert (plan.mode, plan.why, plan.num_tokens) == (found, why, TOKENS)
    assert (len(plan.bodies) > 1) is (plan.selector is not None) is (found != "single")
    assert plan.kernels == (5 * len(plan.bodies) if found == "nodes" else 0)
    assert plan.bodies == tuple(graphs._model.candidates[c] for c in plan.shortlist.columns)
    assert prepared(graphs) is plan, "it is decided once"


@pytest.mark.parametrize(
    ("nodes", "why"),
    [
        ([5, None, 5], "nodes: fake/bm.* launches more than kernels"),
        ([43, 43, 43], "nodes: the bodies have 129 kernels, more than 128"),
    ],
)
def test_bodies_that_cannot_be_switched_node_by_node(
    dispatcher: Make, monkeypatch: pytest.MonkeyPatch, nodes: list[int | None], why: str
) -> None:
    counts = itertools.cycle(nodes)
    monkeypatch.setattr(graph, "kernel_nodes", lambda body, side: next(counts))
    for refused, found in (({}, "switch"), ({"switch": OLD}, "gated")):
        plan = prepared(dispatcher(refused=refused)[0])
        assert plan.mode == found
        assert len(plan.bodies) > 1
        assert re.search(why, plan.why)
    with pytest.raises(KernelError, match=f"in mode {why}; leave the mode out"):
        prepared(dispatcher("nodes")[0])


def test_a_mode_that_cannot_be_had(dispatcher: Make) -> None:
    for mode in ("nodes", "switch"):
        with pytest.raises(KernelError, match=f"in mode {mode}: {OLD}; leave the mode out"):
            dispatcher(mode, {mode: OLD})
    with pytest.raises(
        KernelError, match=r"there is no mode 'best' .* take one of nodes, switch, inline, gated, single"
    ):
        dispatcher("best")


def test_one_body_where_switching_would_cost_more_than_it_gains(
    dispatcher: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prepared(dispatcher()[0]).mode == "nodes"
    monkeypatch.setitem(dispatch.OVERHEAD_US, "nodes", {1: 0.0, 8: 1e6})
    plan = prepared(dispatcher("nodes")[0])
    assert (plan.mode, len(plan.bodies), plan.selector) == ("single", 1, None)
    # The price is that of the mode that will be used.
    assert prepared(dispatcher()[0]).mode == "switch"
    assert prepared(dispatcher("gated")[0]).mode == "gated"
    cheap = {block: price / 1e4 for block, price in DEAR.items()}
    assert prepared(dispatcher("gated", prices=cheap)[0]).mode == "single"


def test_one_body_at_sizes_that_are_not_to_choose(dispatcher: Make) -> None:
    graphs, _ = dispatcher()
    assert graphs.outlook(TOKENS)[0] == "nodes"
    graphs.choosing = frozenset({2 * TOKENS})
    assert graphs.outlook(TOKENS)[0] == "single"
    plan = prepared(graphs)
    assert (plan.mode, len(plan.bodies)) == ("single", 1)
    assert graphs.prepare(2 * TOKENS, torch.bfloat16).mode == "nodes"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("raises", "raised RuntimeError: no such luck"),
        ("writes outside", "wrote outside its output"),
        ("wrong", r"wrong output: relative error .* of output; at most 0.01"),
    ],
)
def test_what_misbehaves_is_dropped_and_the_next_takes_its_place(dispatcher: Make, fault: str, reason: str) -> None:
    graphs, _ = dispatcher()
    assert names(prepared(graphs)) == {"bm8", "bm32", "bm128"}
    first = prepared(graphs).bodies[0]
    graphs, kernel = dispatcher()
    kernel.faults[dict(first.config.params)["block"]] = fault
    plan = prepared(graphs)
    assert list(graphs.dropped) == [first.name]
    assert re.match(reason, graphs.dropped[first.name])
    assert names(plan) == {"bm8", "bm32", "bm128"} - {first.config.name}
    # At another size it is not tried again.
    kernel.launched.clear()
    graphs.prepare(2 * TOKENS, torch.bfloat16)
    assert (first.config.name, 2 * TOKENS) not in kernel.launched


def test_what_was_right_in_one_layer_is_run_but_not_compared_in_the_next(
    dispatcher: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs, kernel = dispatcher()
    bad = prepared(graphs).bodies[-1]
    graphs, kernel = dispatcher()
    kernel.faults[dict(bad.config.params)["block"]] = "wrong"
    plan, asked = prepared(graphs), []
    monkeypatch.setattr(dispatch, "reference", lambda *of: asked.append(of) or reference(*of))
    kernel.launched.clear()
    again = GraphDispatch(graphs._launches, weights(), graphs._model, K)
    assert names(prepared(again)) == names(plan)
    assert {name for name, _ in kernel.launched} == names(plan) | {bad.config.name}
    assert len(asked) == 1, "for the one that was wrong, which might be right here"
    assert list(again.dropped) == [bad.name]
    asked.clear()
    again.prepare(2 * TOKENS, torch.bfloat16)
    assert len(asked) == 1, "another size"


def test_none_is_left(dispatcher: Make) -> None:
    graphs, kernel = dispatcher()
    kernel.faults.update(dict.fromkeys(BLOCKS, "raises"))
    each = "raised RuntimeError: no such luck"
    with pytest.raises(KernelError, match=rf"no candidate is left for a graph \(fake/bm\d+: {each}; .*{each}\)"):
        prepared(graphs)


@pytest.mark.parametrize("error", [KeyError("missing"), AssertionError(), type("OutOfResources", (Exception,), {})()])
def test_whatever_a_candidate_raises_it_is_dropped(dispatcher: Make, error: Exception) -> None:
    graphs, kernel = dispatcher()
    kernel.error = error
    kernel.faults[8] = "raises"
    assert "bm8" not in names(prepared(graphs))
    assert graphs.dropped["fake/bm8"].startswith(f"raised {type(error).__name__}")


def test_what_lacks_memory_is_left_out_of_one_plan_alone(dispatcher: Make) -> None:
    """A full GPU says nothing of a candidate."""
    graphs, kernel = dispatcher()
    kernel.error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")
    kernel.faults[8] = "raises"
    plan = prepared(graphs)
    assert "bm8" not in names(plan)
    assert plan.why.endswith("fake/bm8: lacks memory: CUDA out of memory. Tried to allocate 2 GiB")
    assert graphs.dropped == {}
    kernel.faults.clear()
    assert "bm8" in names(graphs.prepare(2 * TOKENS, torch.bfloat16))
    kernel.faults.update(dict.fromkeys(BLOCKS, "raises"))
    with pytest.raises(KernelError, match=r"no candidate is left for a graph \(fake/bm\d+: lacks memory: CUDA"):
        graphs.prepare(4 * TOKENS, torch.bfloat16)
    kernel.faults.clear()
    assert graphs.prepare(4 * TOKENS, torch.bfloat16).bodies


def test_what_does_not_take_the_hidden_states_is_passed_over(dispatcher: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, kernel = dispatcher()
    monkeypatch.setattr(
        graphs._launches, "takes", lambda c, dtype: dtype is torch.float16 or c.config.name != "bm8", raising=False
    )
    plan = prepared(graphs)
    assert "bm8" not in names(plan)
    assert all(name != "bm8" for name, _ in kernel.launched)
    assert graphs.dropped == {}
    assert prepared(graphs) is plan
    other = graphs.prepare(TOKENS, torch.float16)
    assert (other.dtype, "bm8" in names(other)) == (torch.float16, True)
    monkeypatch.setattr(graphs._launches, "takes", lambda c, dtype: False)
    with pytest.raises(KernelError, match=r"no candidate is left for a graph \(fake/bm8: takes no hidden states in"):
        graphs.prepare(TOKENS + 1, torch.bfloat16)


def eager(graphs: GraphDispatch) -> set[str]:
    """What eager batches of every routing run."""
    layer = graphs._launches
    assert isinstance(layer, LayerRuntime)
    kinds = ("uniform", "zipf2.0", "active0.25", "one-hot")
    return {layer.choose(Batch(*inputs(TOKENS, kind))).config.name for kind in kinds}


def test_what_is_wrong_in_a_graph_is_run_in_no_eager_batch_either(dispatcher: Make) -> None:
    graphs, kernel = dispatcher()
    assert len(eager(graphs)) > 1
    bad = sorted(eager(graphs))[0]
    kernel.faults[int(bad.removeprefix("bm"))] = "wrong"
    assert bad not in names(prepared(graphs))
    assert bad not in eager(graphs)
    assert graphs._launches.dropped[f"fake/{bad}"].startswith("wrong output")  # type: ignore[attr-defined]
    kernel.faults.update(dict.fromkeys(BLOCKS, "writes outside"))
    with pytest.raises(KernelError, match="no candidate is left"):
        graphs.prepare(2 * TOKENS, torch.bfloat16)
    with pytest.raises(KernelError, match="every kernel of the layer computes something else"):
        eager(graphs)


def test_what_fails_in_an_eager_batch_is_in_no_later_graph(dispatcher: Make) -> None:
    graphs, kernel = dispatcher()
    layer = graphs._launches
    assert isinstance(layer, LayerRuntime)
    bad = prepared(graphs).bodies[0]
    kernel.faults[dict(bad.config.params)["block"]] = "raises"
    for kind in ("uniform", "zipf2.0", "active0.25", "one-hot"):
        layer(*inputs(TOKENS, kind))
    assert bad.name in layer.dropped
    assert bad.name in graphs.dropped
    assert graphs.plans == {}
    assert bad not in prepared(graphs).bodies


def test_a_batch_in_parts_is_no_inline_graph(dispatcher: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, kernel = dispatcher()
    layer = graphs._launches
    monkeypatch.setattr(kernel, "inline_key", lambda config, shape: 1)
    monkeypatch.setattr(kernel, "max_tokens", lambda config, shape: TOKENS - 1)
    plan = prepared(graphs)
    bodies = plan.bodies if len(plan.bodies) > 1 else graphs._left({}).candidates
    with pytest.raises(KernelError) as caught:
        graphs._check_inline(list(bodies)[:2], graphs._trial(TOKENS, torch.bfloat16))
    reason = str(caught.value)
    assert reason == f"{TOKENS} tokens are more than one launch takes"
    assert layer.max_tokens(bodies[0]) == TOKENS - 1


def test_buffers_have_their_size_on_every_stream(dispatcher: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, kernel = dispatcher("gated")
    plan = prepared(graphs)
    workspace = graphs._launches.workspace
    other = SimpleNamespace(cuda_stream=7, wait_stream=lambda stream: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: other)
    kernel.launched.clear()
    graphs.ready(TOKENS + 1, torch.bfloat16)
    assert kernel.launched == [], "nothing was planned for that many"
    for capturing in (True, False, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        graphs.ready(TOKENS, torch.bfloat16)
    assert kernel.launched == [(c.config.name, TOKENS) for c in plan.bodies], "once, and not in a capture"
    size = workspace.bytes
    graphs.ready(TOKENS, torch.bfloat16)
    assert workspace.bytes == size


def test_more_ids_than_can_be_counted_leave_one_body(dispatcher: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "MAX_IDS", TOKENS)
    plan = prepared(dispatcher()[0])
    assert (plan.mode, len(plan.bodies), plan.selector) == ("single", 1, None)
    with pytest.raises(KernelError, match=f"mode nodes: {TOKENS * K} routed ids are more than {TOKENS}; leave"):
        prepared(dispatcher("nodes")[0])


def test_a_body_that_cannot_be_captured(dispatcher: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(body: object, side: object) -> int:
        raise KernelError("it synchronises")

    monkeypatch.setattr(graph, "kernel_nodes", fails)
    plan = prepared(dispatcher()[0])
    assert plan.mode == "switch"
    assert "cannot be captured: it synchronises" in plan.why


def test_layers_of_one_model_share_their_shortlists(dispatcher: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, _ = dispatcher()
    plan = prepared(graphs)
    another, _ = dispatcher()
    another._model = graphs._model
    monkeypatch.setattr(dispatch, "shortlist", None)
    assert prepared(another).shortlist is plan.shortlist


def test_recorders_outlive_those_that_replace_them(dispatcher: Make) -> None:
    graphs, _ = dispatcher()
    first, second = graphs.record(2), graphs.record(3)
    assert graphs.recorder is second
    assert graphs._recorders == [first, second], "graphs that were captured before write to it"


@pytest.mark.parametrize("how", ["a candidate fails later", "another dtype is planned"])
def test_what_graphs_were_captured_with_outlives_its_plan(dispatcher: Make, how: str) -> None:
    """They read its tables, and write its choice, at every replay: other tensors must not get the memory."""
    graphs, _ = dispatcher("gated")
    plan = prepared(graphs)
    choice = weakref.ref(plan.selector.choice)
    x, ids, scores = inputs(TOKENS)
    graphs.capture(plan, x, ids, scores, torch.empty_like(x), None)
    if how == "a candidate fails later":
        graphs.drop(plan.bodies[0].name, "raised")
    else:
        graphs.plans[TOKENS] = replace(plan, dtype=torch.float16, selector=None)
    del plan
    gc.collect()
    assert choice() is not None


def test_kernels_that_are_slow_as_switched_nodes_are_left_to_the_other_modes(dispatcher: Make, h200: Hardware) -> None:
    graphs, _ = dispatcher()
    fakes = [(c.config, DEAR[dict(c.config.params)["block"]]) for c in graphs._model.candidates]
    both = {Candidate(kernel, config): price for kernel in ("fake", "slow") for config, price in fakes}
    graphs._model, graphs._fixed = priced(h200, both, SHAPE), frozenset({"slow"})
    offers = {mode: graphs._offer(mode, graphs._left({}), TOKENS) for mode in ("nodes", "switch")}
    kernels = {mode: {c.kernel for c in offer.model.candidates} for mode, offer in offers.items()}
    assert kernels == {"nodes": {"fake"}, "switch": {"fake", "slow"}}


def test_no_node_is_switched_where_all_kernels_are_slow_so_unless_asked(dispatcher: Make) -> None:
    for mode, found in ((None, "switch"), ("nodes", "nodes")):
        graphs, _ = dispatcher(mode)
        graphs._fixed = frozenset({"fake"})
        plan = prepared(graphs)
        assert plan.mode == found
        assert ("nodes are switched" in plan.why) is (mode is None)


def test_without_nvrtc_the_choice_is_made_in_triton(dispatcher: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted."""

    def fails(*arguments: Any) -> None:
        raise KernelError("no cuda.bindings")

    monkeypatch.setattr(dispatch, "CudaSelector", type("CudaSelector", (), {"__init__": fails}))
    with pytest.raises(KernelError, match=r"in mode nodes: no cuda\.bindings; leave the mode out"):
        prepared(dispatcher("nodes")[0])
    graphs, _ = dispatcher("gated")
    plan, recorder = prepared(graphs), graphs.record(4)
    x, ids, scores = inputs(TOKENS, "one-hot")
    ids[0, 0] = 2**20  # skipped
    for num_valid in (TOKENS, TOKENS // 2):
        out, alone = torch.full((2, *x.shape), float("nan"), dtype=x.dtype)
        valid = torch.tensor([num_valid], dtype=torch.int32)
        graphs.capture(plan, x, ids.long(), scores, out, valid)
        seen = ids.masked_fill(ids == 2**20, -1).where(torch.arange(TOKENS)[:, None] < valid, -1)
        chosen = plan.bodies[int(plan.selector.choice)]
        us = graphs._model.cost(expert_histogram(seen, SHAPE.num_experts))[list(plan.shortlist.columns)]
        assert us[int(plan.selector.choice)] == pytest.approx(us.min(), rel=1e-3)
        graphs._launches.launch(chosen, Batch(x, seen, scores), alone)
        assert torch.equal(out, alone)
        found = recorder.read()
        assert graphs.names[found.choices[-1]] == chosen.name
        assert found.tokens[-1] == num_valid


@pytest.mark.parametrize("routing", ["uniform", "active0.25", "one-hot"])
def test_gated_all_run_and_the_chosen_output_is_the_layers(dispatcher: Make, routing: str) -> None:
    graphs, kernel = dispatcher("gated")
    plan = prepared(graphs)
    x, ids, scores = inputs(TOKENS, routing)
    outs = []
    for i, body in enumerate(plan.bodies):
        plan.selector.told = i
        kernel.launched.clear()
        out, alone = torch.full((2, *x.shape), float("nan"), dtype=x.dtype)
        graphs.capture(plan, x, ids, scores, out, None)
        assert kernel.launched == [(c.config.name, TOKENS) for c in plan.bodies]
        graphs._launches.launch(body, Batch(x, ids, scores), alone)
        assert torch.equal(out, alone)
        outs.append(out)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(outs, 2))


def test_in_a_capture_the_best_single_one_is_launched_where_none_chooses(
    dispatcher: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs, kernel = dispatcher("single")
    plan = prepared(graphs)
    monkeypatch.setattr("ramp_moe.runtime.layer._capturing", lambda topk_ids: True)
    kernel.launched.clear()
    graphs._launches(*inputs(TOKENS, "one-hot"))
    assert kernel.launched == [(plan.bodies[0].config.name, TOKENS)]


def test_what_is_compiled_later_comes_into_graphs_that_are_planned_later(
    dispatcher: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    graphs, kernel = dispatcher(prices={8: 100.0, 32: 1.0})
    whole = graphs._model
    graphs.take(whole.without({"fake/bm32"}))
    before = prepared(graphs)
    assert names(before) == {"bm8"}
    graphs.ready(TOKENS, torch.bfloat16)
    graphs.take(whole)
    assert graphs.plans[TOKENS] is before, "a capture that is under way finds what was prepared for it"
    after = prepared(graphs)
    assert names(after) == {"bm32"}
    assert prepared(graphs) is after
    kernel.launched.clear()
    graphs.ready(TOKENS, torch.bfloat16)
    assert {name for name, _ in kernel.launched} == {"bm32"}, "what is captured must have run on that stream"
