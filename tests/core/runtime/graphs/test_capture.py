"""Layers in CUDA graphs: which body runs is chosen on the device, at every replay, in every mode."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from graph_cases import PRICES, SHAPE, priced, triton_of
from moe_cases import H200, weights
from ramp_moe import Candidate, KernelConfig, KernelError, expert_histogram
from ramp_moe.runtime.graphs import capture as dispatch
from ramp_moe.runtime.graphs import conditional as graph
from ramp_moe.runtime.graphs.capture import GraphPlan
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.spec.launchable import Batch, Workspace
from ramp_moe_kernels.triton.kernel import TritonMoE

E, K, H = SHAPE.num_experts, SHAPE.top_k, SHAPE.hidden_size
TOKENS = 256
SKEWS = (0.0, 2.0, 4.0, 30.0)
"""Of routings, between which the choice differs."""
MIB = 2**20
NEAR = 1e-3
"""Two candidates of which the model says so nearly the same are the same to a kernel in float32."""

pytestmark = pytest.mark.gpu


class Marked(TritonMoE):
    """The Triton path, which counts on the device how often each token block ran. A token block may be at fault."""

    def __init__(self, device: str = "cuda", faults: dict[int, str] | None = None) -> None:
        self.marks = torch.zeros(max(PRICES) + 1, dtype=torch.int32, device=device)
        self.faults = faults or {}

    def launch(
        self, config: KernelConfig, prepared: Any, batch: Batch, out: torch.Tensor, workspace: Workspace
    ) -> None:
        super().launch(config, prepared, batch, out, workspace)
        block = block_of(config)
        self.marks[block].add_(1)
        fault = self.faults.get(block)
        if fault == "raises":
            raise RuntimeError("no such luck")
        if fault == "wrong":
            out[3] += 1
        if fault == "writes outside":
            out.as_strided((1, H), (H, 1), out.storage_offset() - H).zero_()


def block_of(config: KernelConfig) -> int:
    return int(dict(config.params)["up_block_m"])


def built(mode: str | None = None, kernel: Marked | None = None, device: str = "cuda") -> LayerRuntime:
    kernel = kernel or Marked(device)
    return LayerRuntime(weights(E, H, SHAPE.intermediate_size, "bf16", device), K, H200, [kernel],
                    cost_model=priced(H200, triton_of(PRICES, kernel)), mode=mode)  # fmt: skip


def routed(tokens: int, skew: float, device: str = "cuda") -> torch.Tensor:
    """int32 `[tokens, K]`, distinct experts a token, drawn on the device."""
    noise = -(-torch.rand(tokens, E, device=device).log()).log()
    return (noise + skew * torch.rand(E, device=device)).topk(K, -1).indices.int()


@dataclass
class Captured:
    """A layer in a graph of its own, and the tensors that it reads at each replay."""

    layer: LayerRuntime
    plan: GraphPlan
    graph: torch.cuda.CUDAGraph
    x: torch.Tensor
    ids: torch.Tensor
    scores: torch.Tensor
    out: torch.Tensor
    valid: torch.Tensor | None = None

    @classmethod
    def of(
        cls, layer: LayerRuntime, tokens: int = TOKENS, wide: bool = False, padded: bool = False, **options: Any
    ) -> Captured:
        device = layer._device
        plan = layer.warm_up(tokens, torch.bfloat16)
        assert plan is not None
        x = torch.randn(tokens, H, device=device).bfloat16()
        ids = routed(tokens, 0.0, str(device)).to(torch.int64 if wide else torch.int32)
        scores = torch.rand(tokens, K, device=device)
        valid = torch.full((1,), tokens, dtype=torch.int32, device=device) if padded else None
        captured = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(device)
        with torch.cuda.graph(captured, **options):
            out = layer(x, ids, scores, num_valid=valid)
        return cls(layer, plan, captured, x, ids, scores, out, valid)

    def replay(self, ids: torch.Tensor) -> None:
        """With new hidden states, too."""
        self.ids.copy_(ids)
        self.x.normal_()
        self.graph.replay()

    def chosen(self) -> Candidate:
        """What the device chose, having checked it against the model."""
        assert self.plan.selector is not None
        index = int(self.plan.selector.choice)
        graphs = self.layer.graphs
        assert graphs is not None
        us = model_us(self)[[graphs.names.index(c.name) for c in self.plan.bodies]]
        assert us[index] <= us.min() * (1 + NEAR)
        return self.plan.bodies[index]

    def check(self) -> Candidate:
        """The output is, bit by bit, that of a plain launch of what was chosen."""
        chosen = self.chosen()
        plain = torch.full_like(self.x, float("nan"))
        self.layer.launch(chosen, Batch(self.x, self.kernel_ids(), self.scores), plain)
        torch.cuda.synchronize(self.x.device)
        assert torch.equal(self.out, plain)
        return chosen

    def kernel_ids(self) -> torch.Tensor:
        """With -1 for what is to be skipped."""
        ids = self.ids.masked_fill((self.ids < 0) | (self.ids >= E), -1).int()
        return (
            ids
            if self.valid is None
            else ids.where(torch.arange(len(ids), device=ids.device)[:, None] < self.valid, -1)
        )


def model_us(captured: Captured) -> Any:
    """Microseconds by candidate, of the routing that was replayed last."""
    assert captured.layer.graphs is not None
    return captured.layer.graphs._model.cost(expert_histogram(captured.kernel_ids(), E))


@pytest.fixture(params=["nodes", "switch", "gated"])
def mode(request: pytest.FixtureRequest) -> str:
    if request.param != "gated" and (reason := graph.unsupported(request.param)):
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.cuda.synchronize()


def test_ten_thousand_replays(mode: str) -> None:
    kernel = Marked()
    moe = built(mode, kernel)
    captured = Captured.of(moe)
    assert captured.plan.mode == mode
    rng, seen, before, launches = np.random.default_rng(0), [], (0, 0), 10_000
    for i in range(launches):
        if i == 100:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        marks = kernel.marks.clone() if i % 100 == 99 else None
        captured.replay(routed(TOKENS, float(rng.choice(SKEWS))))
        if marks is not None:
            ran = (kernel.marks - marks).nonzero().flatten().tolist()
            seen.append(captured.check())
            assert ran == (sorted(block_of(c.config) for c in captured.plan.bodies) if mode == "gated"
                           else [block_of(seen[-1].config)]), "and no other body ran"  # fmt: skip
            del marks
    torch.cuda.synchronize()
    after = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    assert abs(after[0] - before[0]) < MIB
    assert after[1] - before[1] < 16 * MIB
    assert {*seen} == {*captured.plan.bodies}, "each was chosen"


def test_the_choice_is_the_hosts(mode: str) -> None:
    moe = built(mode)
    captured = Captured.of(moe)
    assert len(captured.plan.bodies) == len(PRICES)
    found = set()
    for i in range(100):
        captured.replay(routed(TOKENS, SKEWS[i % 4] + i / 100))
        on_device = captured.check()
        on_host = moe.choose(Batch(captured.x, captured.ids, captured.scores))
        us = model_us(captured)
        if np.partition(us, 1)[1] > us.min() * (1 + NEAR):
            assert on_device == on_host
        found.add(on_host)
    assert len(found) > 2


def test_between_other_operators_of_a_larger_graph(mode: str) -> None:
    """What routes is in the graph as well, so that ids are int64 and made at each replay."""
    moe = built(mode)
    plan = moe.warm_up(TOKENS, torch.bfloat16)
    given = torch.randn(TOKENS, H, device="cuda").bfloat16()
    router = torch.randn(H, E, device="cuda").bfloat16()

    def model() -> tuple[torch.Tensor, ...]:
        x = torch.tanh(given)
        scores, ids = (x @ router).float().softmax(-1).topk(K, -1)
        y = moe(x, ids, scores)
        return x, ids, scores, y, 2 * y + given

    model()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        x, ids, scores, y, last = model()
    for skew in (0.0, 5.0, 0.0, 50.0):
        given.normal_().add_(skew * router[:, :1].T)
        captured.replay()
        whole = Captured(moe, plan, captured, x, ids, scores, y)
        whole.check()
        assert torch.equal(last, 2 * y + given)


def test_eight_layers_in_one_graph(mode: str) -> None:
    layers = [built(mode) for _ in range(8)]
    plans = [layer.warm_up(TOKENS, torch.bfloat16) for layer in layers]
    x = torch.randn(TOKENS, H, device="cuda").bfloat16()
    ids = torch.stack([routed(TOKENS, 0.0) for _ in layers])
    scores = torch.rand(TOKENS, K, device="cuda")
    captured = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(captured):
        outs = [x]
        for i, layer in enumerate(layers):
            outs.append(layer(outs[-1], ids[i], scores))
    for turn in range(8):
        for i in range(8):
            ids[i].copy_(routed(TOKENS, SKEWS[(i + turn) % 4]))
        x.normal_()
        captured.replay()
        found = [Captured(layer, plan, captured, outs[i], ids[i], scores, outs[i + 1]).check()
                 for i, (layer, plan) in enumerate(zip(layers, plans, strict=True))]  # fmt: skip
        assert len({*found}) > 1, "the layers choose for themselves"


@pytest.mark.parametrize("wide", [False, True])
def test_a_padded_batch(mode: str, wide: bool) -> None:
    captured = Captured.of(built(mode), wide=wide, padded=True)
    assert captured.valid is not None
    for valid in (TOKENS, 150, 1, 0, TOKENS - 1):
        captured.valid.fill_(valid)
        ids = routed(TOKENS, 0.0)
        ids[valid:] = 3  # what padding holds sways nothing
        captured.replay(ids)
        captured.check()
        assert not captured.out[valid:].any()


def test_wide_ids_and_those_out_of_range(mode: str) -> None:
    captured = Captured.of(built(mode), wide=True)
    for garbage in (-1, E, -2, 2**31, 2**32 + 3, -(2**63)):
        ids = routed(TOKENS, 30.0).long()
        ids[::7, 1] = garbage
        captured.replay(ids)
        captured.check()


def test_two_streams_capture_in_turn(mode: str) -> None:
    moe = built(mode)
    streams = [torch.cuda.Stream() for _ in range(2)]
    captured = []
    for tokens in (TOKENS, 2 * TOKENS, TOKENS):
        for stream in streams:
            captured.append((stream, Captured.of(moe, tokens, stream=stream)))
    for turn in range(12):
        stream, one = captured[turn * 5 % len(captured)]
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            one.replay(routed(len(one.ids), SKEWS[turn % 4]))
            stream.synchronize()
            one.check()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus(mode: str) -> None:
    captured = []
    for device in ("cuda:0", "cuda:1"):
        with torch.cuda.device(device):
            # torch's own stream for captures is one device's, for all devices.
            captured.append(Captured.of(built(mode, device=device), stream=torch.cuda.Stream(device)))
    for turn in range(8):
        for i, one in enumerate(captured):
            with torch.cuda.device(i):
                one.replay(routed(TOKENS, SKEWS[(turn + i) % 4], f"cuda:{i}"))
        for i, one in enumerate(captured):
            with torch.cuda.device(i):
                one.check()


def test_captured_at_many_batch_sizes(mode: str) -> None:
    moe = built(mode)
    sizes = (*range(256, 0, -24), *range(256, 0, -24))
    pool = torch.cuda.graph_pool_handle()
    captured = [Captured.of(moe, tokens, pool=pool) for tokens in sizes]
    modes = {one.plan.mode for one in captured}
    assert modes <= {mode, "single"}
    assert mode in modes
    for turn, one in enumerate([*captured, *reversed(captured)]):
        one.replay(routed(len(one.ids), SKEWS[turn % 4]))
        if one.plan.selector is not None:
            one.check()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("raises", "raised RuntimeError: no such luck"),
        ("writes outside", "wrote outside its output"),
        ("wrong", "wrong output: relative error"),
    ],
)
def test_what_misbehaves_is_dropped_and_the_next_takes_over(mode: str, fault: str, reason: str) -> None:
    good = Captured.of(built(mode)).plan
    first = good.bodies[0]
    moe = built(mode, Marked(faults={block_of(first.config): fault}))
    captured = Captured.of(moe)
    assert moe.graphs is not None
    assert list(moe.graphs.dropped) == [first.name]
    assert moe.graphs.dropped[first.name].startswith(reason)
    assert first not in captured.plan.bodies
    for skew in SKEWS:
        captured.replay(routed(TOKENS, skew))
        captured.check()


def test_a_graph_replays_rightly_after_one_of_its_bodies_is_dropped(mode: str) -> None:
    """It was captured with that body. Graphs that are captured later, and eager batches, do without it."""
    moe = built(mode)
    before = Captured.of(moe)
    gone = before.plan.bodies[0]
    assert moe.drop(gone, "it failed in an eager batch") is not None
    after = Captured.of(moe)
    assert gone not in after.plan.bodies
    for skew in SKEWS:
        for one in (before, after):
            one.replay(routed(TOKENS, skew))
            torch.cuda.synchronize()
            assert one.plan.selector is not None
            chosen = one.plan.bodies[int(one.plan.selector.choice)]
            plain = torch.full_like(one.x, float("nan"))
            moe.launch(chosen, Batch(one.x, one.kernel_ids(), one.scores), plain)
            torch.cuda.synchronize()
            assert torch.equal(one.out, plain)
        eager = moe(after.x, after.ids, after.scores)
        assert moe.choose(Batch(after.x, after.ids, after.scores)) != gone
        assert torch.isfinite(eager).all()


def test_one_body_where_choosing_does_not_pay(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch.OVERHEAD_US, mode, {1: 0.0, 8: 1e6})
    captured = Captured.of(built(mode))
    assert (captured.plan.mode, len(captured.plan.bodies)) == ("single", 1)
    captured.replay(routed(TOKENS, 30.0))
    plain = torch.empty_like(captured.x)
    captured.layer.launch(captured.plan.bodies[0], Batch(captured.x, captured.ids, captured.scores), plain)
    torch.cuda.synchronize()
    assert torch.equal(captured.out, plain)


def test_without_a_plan_a_graph_holds_one_candidate(mode: str) -> None:
    """No warm-up, so nothing was checked: the choice is for an even spread, as it always was."""
    moe = built(mode)
    x, scores = torch.randn(TOKENS, H, device="cuda").bfloat16(), torch.rand(TOKENS, K, device="cuda")
    ids = routed(TOKENS, 0.0)
    candidate = moe._blind(TOKENS, torch.bfloat16)
    plain = torch.empty_like(x)
    moe.launch(candidate, Batch(x, ids, scores), plain)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out = moe(x, ids, scores)
    for skew in SKEWS:
        ids.copy_(routed(TOKENS, skew))
        captured.replay()
        moe.launch(candidate, Batch(x, ids, scores), plain)
        torch.cuda.synchronize()
        assert torch.equal(out, plain)


def test_a_mode_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "unsupported", lambda mode: "needs CUDA 12.8; the driver has 12.2")
    for asked in ("nodes", "switch"):
        with pytest.raises(KernelError, match=f"in mode {asked}: needs CUDA 12.8; the driver has 12.2"):
            built(asked)
    plan = built().warm_up(TOKENS, torch.bfloat16)
    assert plan is not None
    assert plan.mode in ("inline", "gated")  # whichever is cheaper for the bodies that win
    assert "nodes: needs CUDA 12.8" in plan.why


def test_a_graph_keeps_what_it_holds_while_more_is_compiled(mode: str) -> None:
    """The next one that is planned for the same size takes what was compiled since."""
    moe = built(mode)
    whole = moe.chooser.model
    assert whole is not None
    fast = next(c for c in whole.candidates if block_of(c.config) == 16)
    moe.choose_among(whole.without({fast.name}))
    before = Captured.of(moe)
    assert fast not in before.plan.bodies
    moe.choose_among(whole)
    after = Captured.of(moe)
    assert fast in after.plan.bodies
    chosen = set[str]()
    for skew in SKEWS:
        for captured in (before, after):
            captured.replay(routed(TOKENS, skew))
            index = int(captured.plan.selector.choice)  # type: ignore[union-attr]
            plain = torch.full_like(captured.x, float("nan"))
            batch = Batch(captured.x, captured.kernel_ids(), captured.scores)
            moe.launch(captured.plan.bodies[index], batch, plain)
            torch.cuda.synchronize()
            assert torch.equal(captured.out, plain)
            chosen.add(captured.plan.bodies[index].name)
    assert len(chosen) > 1
