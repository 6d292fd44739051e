"""Who chooses the experts of a batch in vLLM: its router, or the kernel in captures that were tried before."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
import vllm_cases  # noqa: F401  (before anything of vllm's)
from ramp_moe.errors import KernelError
from ramp_moe_adapters.frameworks.vllm import routing
from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import MoEPrepareAndFinalizeNoDPEPModular
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter

TOP_K, EXPERTS = 2, 8
X, LOGITS = torch.ones(3, 16), torch.arange(24.0).reshape(3, EXPERTS)


class Router(FusedTopKRouter):
    def _compute_routing(self, hidden_states: Any, router_logits: Any, *_: Any, **__: Any) -> Any:
        weights, ids = router_logits.topk(self.top_k)
        return weights, ids.int()


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A module of routed experts, whose runner vLLM knows. The class of its router is taken for vLLM's own."""
    monkeypatch.setattr(routing, "FusedTopKRouter", Router)
    prepare = object.__new__(MoEPrepareAndFinalizeNoDPEPModular)
    method = SimpleNamespace(moe_kernel=SimpleNamespace(prepare_finalize=prepare))
    found = SimpleNamespace(layer_name="layer", expert_map=None, quant_method=method)
    found.router = Router(TOP_K, EXPERTS)
    runner = SimpleNamespace(router=found.router, routed_experts=found)
    monkeypatch.setattr(routing, "is_forward_context_available", lambda: True)
    monkeypatch.setattr(
        routing, "get_forward_context", lambda: SimpleNamespace(no_compile_layers={found.layer_name: runner})
    )
    monkeypatch.setattr(routing, "_get_padding_mask", lambda tokens: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return found


@pytest.fixture
def capturing(module: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def taken(module: SimpleNamespace, sizes: set[int]) -> routing.KernelRouting:
    """The routing of a layer after these sizes were tried."""
    layer: Any = SimpleNamespace(ep_size=1, shape=SimpleNamespace(top_k=TOP_K))
    found = routing.KernelRouting.of(layer, module)
    assert found is not None
    module.router.select_experts(X, LOGITS)
    found._sizes = sizes
    return found


def test_ids_are_chosen_outside_of_captures(module: SimpleNamespace) -> None:
    found = taken(module, {3})
    weights, ids = module.router.select_experts(X, LOGITS)
    assert ids.tolist() == [[7, 6]] * 3
    assert found.take(ids, weights) is None


@pytest.mark.usefixtures("capturing")
def test_the_kernel_is_given_the_logits_in_captures(module: SimpleNamespace) -> None:
    found = taken(module, {3})
    weights, ids = module.router.select_experts(X, LOGITS)
    pending = found.take(ids, weights)
    assert pending is not None
    assert pending.router.logits is LOGITS
    assert (pending.ids.data_ptr(), pending.weights.shape) == (ids.data_ptr(), (3, TOP_K))
    assert found.take(ids, weights) is None, "once"
    found.choose(pending)
    assert ids.tolist() == [[7, 6]] * 3
    assert weights.tolist() == LOGITS.topk(TOP_K).values.tolist()


@pytest.mark.usefixtures("capturing")
def test_ids_that_are_not_chosen_yet_may_not_be_copied(module: SimpleNamespace) -> None:
    found = taken(module, {3})
    weights, ids = module.router.select_experts(X, LOGITS)
    with pytest.raises(KernelError):
        found.take(ids.clone(), weights)


@pytest.mark.usefixtures("capturing")
@pytest.mark.parametrize("why", ["size", "dtype", "strides", "hook", "replay", "recorder"])
def test_what_was_not_tried_or_is_read_by_others_is_chosen_by_vllm(
    module: SimpleNamespace, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, logits = taken(module, {4} if why == "size" else {3}), LOGITS
    if why == "dtype":
        logits = LOGITS.double()
    if why == "strides":
        logits = LOGITS.T.contiguous().T
    if why == "hook":
        module.router.set_capture_fn(lambda ids: None)
    if why == "replay":
        module.router._routing_replay_out = torch.zeros(8, TOP_K, dtype=torch.int16)
    if why == "recorder":
        monkeypatch.setattr(routing.recorder.recording, "current", object())
    weights, ids = module.router.select_experts(X, logits)
    assert ids.tolist() == [[7, 6]] * 3
    assert found.take(ids, weights) is None


@pytest.mark.parametrize("why", ["other router", "ranks", "scoring", "taken already", "other runner"])
def test_other_layers_keep_their_router(module: SimpleNamespace, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer: Any = SimpleNamespace(ep_size=1, shape=SimpleNamespace(top_k=TOP_K))
    if why == "other router":
        monkeypatch.setattr(routing, "FusedTopKRouter", FusedTopKRouter)
    if why == "ranks":
        layer.ep_size = 2
    if why == "scoring":
        module.router.scoring_func = "softplus"
    if why == "taken already":
        assert routing.KernelRouting.of(layer, module) is not None
    if why == "other runner":
        module = SimpleNamespace(**vars(module))
    assert routing.KernelRouting.of(layer, module) is None
