"""A layer from router logits: which candidate takes them, what it computes, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layer_cases import FakeKernel, by_hand, inputs, layer, weights
from ramp_moe import Candidate, Hardware, KernelConfig, KernelError, MoEShape, RoutingError, ShapeError
from ramp_moe.plugin import RouterLogits
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.runtime.routed import forward_routed, routing_candidate
from ramp_moe.spec.launchable import Batch, MoEWeights, Workspace
from ramp_moe_kernels.triton.config import GemmConfig, Path
from ramp_moe_kernels.triton.kernel import TritonMoE

TOKENS, EXPERTS, TOP_K, HIDDEN, INTER = 5, 16, 2, 32, 16


class Routing(FakeKernel):
    """A kernel that routes batches of 5 tokens, by softmax."""

    def routes(self, config: KernelConfig, shape: MoEShape, num_tokens: int) -> bool:
        return num_tokens == TOKENS

    def launch_routed(
        self, config: Any, prepared: Any, router: RouterLogits, batch: Batch, out: torch.Tensor, workspace: Workspace
    ) -> None:
        found, ids = router.logits.softmax(-1).topk(batch.top_k)
        batch.topk_ids.copy_(ids)
        batch.topk_weights.copy_(found)
        self.launch(config, prepared, batch, out, workspace)


def planned(kernel: FakeKernel, h200: Hardware, tokens: int = TOKENS, bodies: int = 1, **options: Any) -> LayerRuntime:
    """A layer whose graphs of this size hold so many bodies."""
    found = layer(h200, kernel, **options)
    candidate = Candidate(kernel.name, kernel.default_config(found.shape, h200, tokens))
    plan = SimpleNamespace(dtype=torch.bfloat16, bodies=(candidate,) * bodies)
    found.graphs = SimpleNamespace(plans={tokens: plan})  # type: ignore[assignment]
    return found


def given(tokens: int = TOKENS) -> dict[str, torch.Tensor]:
    x, ids, scores = inputs(tokens)
    return {
        "hidden_states": x,
        "topk_ids": torch.full_like(ids, -77),
        "topk_weights": torch.full_like(scores, float("nan")),
        "out": torch.empty_like(x),
    }


def router(tokens: int = TOKENS) -> RouterLogits:
    return RouterLogits(torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(2)), renormalise=False)


def test_the_kernel_chooses_and_computes(h200: Hardware) -> None:
    tensors, chosen = given(), router()
    forward_routed(planned(Routing(), h200), router=chosen, **tensors)
    scores, ids = chosen.logits.softmax(-1).topk(TOP_K)
    assert tensors["topk_ids"].tolist() == ids.tolist()
    expected = by_hand(tensors["hidden_states"], ids.int(), scores)
    torch.testing.assert_close(tensors["out"].float(), expected, rtol=1e-2, atol=1e-3)


def test_who_takes_logits(h200: Hardware) -> None:
    found = routing_candidate(planned(Routing(), h200), TOKENS, torch.bfloat16)
    assert found is not None
    assert found.kernel == "fake"
    assert routing_candidate(planned(Routing(), h200), TOKENS, torch.float16) is None
    assert routing_candidate(planned(Routing(), h200), TOKENS + 1, torch.bfloat16) is None, "no plan"
    assert routing_candidate(planned(Routing(), h200, 6), 6, torch.bfloat16) is None, "not of this size"
    assert routing_candidate(planned(Routing(), h200, bodies=2), TOKENS, torch.bfloat16) is None
    assert routing_candidate(planned(Routing(), h200, ep_size=2), TOKENS, torch.bfloat16) is None
    assert routing_candidate(planned(FakeKernel(), h200), TOKENS, torch.bfloat16) is None
    assert routing_candidate(layer(h200, Routing()), TOKENS, torch.bfloat16) is None, "no graphs"


def test_what_does_not_fit_is_refused_before_anything_is_written(h200: Hardware) -> None:
    found, chosen = planned(Routing(), h200), router()
    for wrong in (
        RouterLogits(chosen.logits[:, :-1]),
        RouterLogits(chosen.logits[:-1]),
        RouterLogits(chosen.logits.T.contiguous().T),
        RouterLogits(chosen.logits.double()),
        RouterLogits(chosen.logits, padding=torch.zeros(TOKENS, dtype=torch.uint8)),
        RouterLogits(chosen.logits, padding=torch.zeros(2 * TOKENS, dtype=torch.bool)[::2]),
        RouterLogits(chosen.logits, padding=torch.zeros(TOKENS, dtype=torch.bool, device="meta")),
        RouterLogits(chosen.logits, padding=torch.zeros(TOKENS + 1, dtype=torch.bool)),
    ):
        tensors = given()
        with pytest.raises(RoutingError):
            forward_routed(found, router=wrong, **tensors)
        assert bool((tensors["topk_ids"] == -77).all())
    with pytest.raises(ShapeError):
        forward_routed(found, router=chosen, **{**given(), "out": torch.empty(TOKENS, HIDDEN)})
    with pytest.raises(KernelError):
        forward_routed(planned(FakeKernel(), h200), router=chosen, **given())
    found.stale = "the weights are gone"
    with pytest.raises(KernelError, match="gone"):
        forward_routed(found, router=chosen, **given())


def test_a_kernel_without_such_a_launch_says_so(h200: Hardware) -> None:
    kernel, tensors = FakeKernel(), given()
    batch = Batch(*(tensors[name] for name in ("hidden_states", "topk_ids", "topk_weights")))
    config = kernel.default_config(MoEShape(EXPERTS, TOP_K, HIDDEN, INTER, "bf16"), h200, TOKENS)
    with pytest.raises(KernelError, match="fake"):
        kernel.launch_routed(config, weights(), router(), batch, tensors["out"], Workspace())


def test_triton_routes_what_it_schedules(h200: Hardware) -> None:
    """Interpreted without a GPU; in fp16, since the interpreter truncates to bf16."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(3)
    shape = MoEShape(8, 2, 64, 32, "fp16")
    gate_up, down, x = (
        (torch.randn(size, generator=generator) * 0.3).half().to(device) for size in ((8, 64, 64), (8, 64, 32), (3, 64))
    )
    kernel, gemm = TritonMoE(), GemmConfig(16, 32, 32, 4, 3, 1, 1, False)
    config = kernel.describe(Path(gemm, gemm), shape)
    assert kernel.routes(config, shape, 3)
    assert not kernel.routes(config, shape, 4096)
    assert not kernel.routes(kernel.describe(Path(gemm, gemm, direct=True), shape), shape, 3)
    held = kernel.prepare(MoEWeights(gate_up, down))
    logits = torch.randn(3, 8, generator=generator).to(device)
    padding = torch.tensor([False, True, False], device=device)
    ids = torch.empty(3, 2, dtype=torch.int32, device=device)
    scores = torch.empty(3, 2, dtype=torch.float32, device=device)
    out, expected = torch.empty_like(x), torch.empty_like(x)
    kernel.launch_routed(config, held, RouterLogits(logits, padding=padding), Batch(x, ids, scores), out, Workspace())
    top, chosen = logits.softmax(-1).topk(2)
    chosen[1] = -1
    assert ids.tolist() == chosen.tolist()
    batch = Batch(x, chosen.int(), top / top.sum(-1, keepdim=True))
    kernel.launch(config, held, batch, expected, Workspace())
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-3)
    assert bool((expected[0] != 0).any())
    assert not bool(out[1].any())
