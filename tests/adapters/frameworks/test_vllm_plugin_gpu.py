"""vLLM's routed experts of models' own sizes on a GPU, by ours: eager, and in CUDA graphs as vLLM captures them."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
import vllm_cases  # noqa: F401  (before anything of vllm's)
from graph_cases import SHAPE, priced, triton_of
from moe_cases import ROUTINGS, batch, error, expected, weights
from ramp_moe.runtime.layer_factory import Builder, LayerPlan
from ramp_moe.spec.launchable import Batch, MoEWeights
from ramp_moe_adapters.frameworks import vllm as plugin
from ramp_moe_kernels.triton.kernel import TritonMoE
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm_cases import experts_of, load, run, serve

pytestmark = pytest.mark.gpu

OLMOE = (64, 8, 2048, 1024)
ROUTED = [r for r in ROUTINGS if r != "garbage"]
TOLERANCE = 2e-2


@pytest.fixture(scope="module", autouse=True)
def loaded() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(plugin.SWITCH, "1")
        patch.setenv("RAMP_MOE_CALIBRATE_S", "0")  # what is measured would decide instead of the tests' own models
        plugin.register()
        yield
    op_registry_oot.pop("RoutedExperts")


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Builder:
    return serve(monkeypatch).builder


def olmoe(dtype: str) -> MoEWeights:
    experts, _, hidden, inter = OLMOE
    return weights(experts, hidden, inter, dtype, "cuda")


def given(tokens: int, routing: str, shape: tuple[int, int, int] = (64, 8, 2048), seed: int = 0) -> Batch:
    """With ids of -1 alone among those to skip: all that vLLM has."""
    experts, top_k, hidden = shape
    found = batch(tokens, top_k, experts, hidden, routing, "cuda", torch.bfloat16, seed)
    return Batch(found.hidden_states, found.topk_ids.masked_fill(found.topk_ids == experts, -1), found.topk_weights)


def wanted(of: MoEWeights, b: Batch) -> torch.Tensor:
    return expected(of, b, quantise=of.gate_up_scale is not None)


def layer_of(routed: Any) -> Any:
    return routed.quant_method.moe_kernel.fused_experts.layer


class Captured:
    """As vLLM captures: a warm-up on the stream of the capture, then the capture, outputs and inputs in place."""

    def __init__(self, routed: Any, like: Batch, before: Any = None) -> None:
        self.given = Batch(*(t.clone() for t in (like.hidden_states, like.topk_ids, like.topk_weights)))
        self.graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode(), torch.cuda.stream(stream):
            run(routed, self.given)
            if before is not None:
                before()
            torch.cuda.synchronize()
            with torch.cuda.graph(self.graph, stream=stream):
                self.out = run(routed, self.given)

    @torch.inference_mode()
    def replay(self, b: Batch) -> torch.Tensor:
        for name in ("hidden_states", "topk_ids", "topk_weights"):
            getattr(self.given, name).copy_(getattr(b, name))
        self.out.fill_(float("nan"))
        self.graph.replay()
        torch.cuda.synchronize()
        return self.out


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_eager(dtype: str) -> None:
    of = olmoe(dtype)
    routed = experts_of(of, 8)
    assert layer_of(routed) is not None, "not vLLM's own experts"
    for tokens in (1, 33, 512, 2048):
        for routing in ROUTED:
            b = given(tokens, routing)
            assert error(run(routed, b), wanted(of, b)) < TOLERANCE, (tokens, routing)


@pytest.mark.parametrize("how", ["tp", "ep"])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_ranks_add_up(dtype: str, how: str) -> None:
    """Eager, and in graphs whose ids change, where those of other ranks are skipped."""
    of, like = olmoe(dtype), given(64, "uniform")
    routed = [experts_of(of, 8, **{how: (4, rank)}) for rank in range(4)]
    captured = [Captured(r, like) for r in routed]
    for routing in ROUTED:
        b = given(64, routing)
        whole = wanted(of, b)
        assert error(sum(run(r, b).float() for r in routed), whole) < TOLERANCE, routing
        assert error(sum(c.replay(b).float() for c in captured), whole) < TOLERANCE, routing


@pytest.mark.parametrize("tokens", [1, 8, 128, 512])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_a_graph_follows_its_ids(dtype: str, tokens: int) -> None:
    of, like = olmoe(dtype), given(tokens, "uniform")
    routed = experts_of(of, 8)
    captured = Captured(routed, like)
    assert tokens in layer_of(routed).graphs.plans, "warmed up by the run before the capture"
    for seed, routing in enumerate(ROUTED):
        b = given(tokens, routing, seed=seed)
        assert error(captured.replay(b), wanted(of, b)) < TOLERANCE, routing


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_a_graph_computes_with_reloaded_weights(dtype: str) -> None:
    """Layerwise and expert by expert, whatever order the rows lie in; nothing is captured again."""
    old, like = olmoe(dtype), given(64, "uniform")
    new = replace(old, **{f.name: t.flip(0).contiguous() for f in fields(old)
                          if isinstance(t := getattr(old, f.name), torch.Tensor)})  # fmt: skip
    routed = experts_of(old, 8)
    captured = Captured(routed, like)
    for now, way in ((new, "layerwise"), (old, "live")):
        with torch.device("cuda"):
            if way == "layerwise":
                initialize_layerwise_reload(routed)
            load(routed, now)
            if way == "layerwise":
                finalize_layerwise_reload(routed, SimpleNamespace(dtype=torch.bfloat16))
        b = given(64, "skewed")
        assert error(run(routed, b), wanted(now, b)) < TOLERANCE, way
        assert error(captured.replay(b), wanted(now, b)) < TOLERANCE, way


def test_a_batch_of_more_than_a_million_ids() -> None:
    of, shape = weights(16, 256, 128, "bf16", "cuda"), (16, 8, 256)
    b = given(131_073, "skewed", shape)
    assert error(run(experts_of(of, 8), b), wanted(of, b)) < TOLERANCE


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_a_batch_that_fails_is_vllms(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager, and captured after a run that failed."""
    of, b = olmoe(dtype), given(64, "skewed")
    routed = experts_of(of, 8)

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(layer_of(routed), "forward", fail)
    # vLLM may round a scale of fp8 activations up to a power of two: other errors than ours, of the same size.
    exact = expected(of, b, quantise=False)
    most = 1.25 * error(wanted(of, b), exact) if dtype == "fp8" else TOLERANCE
    assert error(run(routed, b), exact) < most
    assert error(Captured(routed, given(64, "uniform")).replay(b), exact) < most


def test_the_device_chooses_in_the_graph(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a cost model by which routings differ in their best configuration; experts of all ranks, and of one."""
    shapes = {ep: (SHAPE.num_experts * ep, SHAPE.top_k, SHAPE.hidden_size) for ep in (1, 2)}
    for ep, shape in shapes.items():
        kernel = TritonMoE()

        def plan(_: Any, hardware: Any, kernel: TritonMoE = kernel) -> LayerPlan:
            return LayerPlan(hardware, [kernel], priced(hardware, triton_of(kernel=kernel)))

        monkeypatch.setattr(builder, "_plan", plan)
        of = weights(shape[0], shape[2], SHAPE.intermediate_size, "bf16", "cuda")
        routed = [experts_of(of, SHAPE.top_k, ep=(ep, rank)) for rank in range(ep)]
        recorders: list[Any] = []

        def record(r: Any, into: list[Any] = recorders) -> None:
            into.append(layer_of(r).graphs.record(64))

        captured = [Captured(r, given(128, "uniform", shape), lambda r=r: record(r)) for r in routed]
        assert all(len(layer_of(r).graphs.plans[128].bodies) > 1 for r in routed)
        for seed in range(3):
            for routing in ROUTED:
                b = given(128, routing, shape, seed)
                assert error(sum(c.replay(b).float() for c in captured), wanted(of, b)) < TOLERANCE, (ep, routing)
        assert all(len(set(r.read().choices.tolist())) > 1 for r in recorders), "routings differ in their best"


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.usefixtures("builder")
def test_weights_are_not_doubled(dtype: str) -> None:
    """Of the third layer: the first has the workspace that all share, and the second what is made once for two."""
    of, made, grown = olmoe(dtype), [], []
    for _ in range(3):
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        made.append(experts_of(of, 8))
        gc.collect()
        torch.cuda.synchronize()
        grown.append(torch.cuda.memory_allocated() - before)
    size = sum(p.numel() * p.element_size() for p in made[-1].parameters())
    assert grown[-1] < 1.01 * size, grown
    assert len({id(layer_of(routed)) for routed in made}) == 3


def test_registering_leaves_cuda_alone() -> None:
    """vLLM may fork its workers from a process that has loaded plugins."""
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]; import vllm_cases, torch, ramp_moe_adapters.frameworks.vllm as v; "
        "v.register(); assert v.__name__ + '.layer' in sys.modules; print(torch.cuda.is_initialized())"
    )
    run = subprocess.run([sys.executable, "-c", code, *sys.path], capture_output=True, text=True)
    assert run.stdout.splitlines()[-1:] == ["False"], run.stderr[-2000:]
