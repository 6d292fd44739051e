"""What wrapped experts are called with: other dtypes than their weights' give what stock gives, and top_k is the
router's."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")

import ramp_moe
import torch
from moe_cases import error
from ramp_moe import KernelError, ShapeError
from ramp_moe.runtime.layer_factory import Builder
from ramp_moe.runtime.wrapped_experts import experts_of
from ramp_moe_adapters.frameworks.transformers.experts import TransformersExperts
from transformers import OlmoeConfig
from transformers_cases import (
    DEVICE,
    EXPERTS,
    GPU,
    HALF,
    LOCAL,
    E,
    H,
    K,
    computed,
    expert_calls,
    fp8_experts,
    model_of,
    worst,
)  # fmt: skip

ADAPTER = TransformersExperts()
TOLERANCE = 2e-2 if GPU else 4e-3
HUNYUAN = {"num_experts": E, "head_dim": 16}


def wrap(model: Any) -> ramp_moe.Wrapped:
    return ramp_moe.wrap(model, device="auto" if GPU else "h200")


def given(x: torch.dtype, scores: torch.dtype = torch.float32, hidden: int = H, experts: int = E) -> Any:
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:K] for _ in range(6)])
    states = torch.randn(6, hidden, generator=generator).to(x)
    return states.to(DEVICE), ids.to(DEVICE), torch.rand(6, K, generator=generator).to(scores).to(DEVICE)


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def olmoe() -> Any:
    return model_of("olmoe")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("x", "scores"),
    [
        *((x, torch.float32) for x in (torch.float32, torch.float64, torch.bfloat16, torch.float16)),
        *((HALF, scores) for scores in (torch.float64, torch.bfloat16, torch.float16)),
        (torch.float32, torch.bfloat16),
    ],
    ids=str,
)
def test_any_float_gives_what_stock_gives(olmoe: Any, x: torch.dtype, scores: torch.dtype) -> None:
    experts, call = olmoe.model.layers[0].mlp.experts, given(x, scores)
    assert olmoe.config._experts_implementation == "grouped_mm"
    with torch.no_grad():
        expected = experts(*call)
        wrap(olmoe)
        found = experts(*call)
    ramp_moe.unwrap(olmoe)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape) == (x, call[0].shape)
    rounding = 8e-3 if torch.bfloat16 in (x, scores) else 0
    assert error(found, expected.float()) < TOLERANCE + rounding


@pytest.mark.parametrize("stock", ["eager", "grouped_mm"])
def test_float32_hidden_states_under_autocast(stock: str) -> None:
    """As Phimoe's experts get them: on a GPU autocast has LayerNorm give float32."""
    model = model_of("phimoe", **LOCAL)
    model.set_experts_implementation(stock)
    experts, call = model.model.layers[0].mlp.experts, given(torch.float32)
    with torch.autocast(DEVICE, HALF), torch.no_grad():
        expected = experts(*call)
        wrapped = wrap(model)
        found = experts(*call)
    assert found.dtype == expected.dtype == torch.float32
    assert 0 < error(found, expected) < TOLERANCE
    wrapped.warm_up(3, torch.float32)


def test_float32_weights_under_autocast_are_refused_with_the_reason() -> None:
    model = model_of("olmoe", torch.float32)
    with (
        torch.autocast(DEVICE, HALF),
        pytest.raises(ShapeError, match=r"gate_up is torch.float32; weights must be bf16, fp16 or float8_e4m3fn"),
    ):
        wrap(model)


@pytest.mark.slow
@pytest.mark.parametrize("x", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fp8_weights_take_float32_too(x: torch.dtype) -> None:
    module, call = fp8_experts(), given(x, hidden=256, experts=4)
    (layer,) = wrap(module).layers.values()
    with torch.no_grad():
        found = module(*call)
    assert found.dtype == x
    # The interpreter truncates to bf16 where a GPU rounds.
    assert error(found, computed(layer.held[0], call[0].float(), *call[1:])) < 3e-2


# --- top_k ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "num_selected_experts"]
)
@pytest.mark.parametrize("value", [3, [3], [3, 3, 3], (3, 3)])
def test_top_k_by_the_names_of_configurations(name: str, value: Any) -> None:
    module = torch.nn.Module()
    module.config = type("Config", (), {name: value})()  # type: ignore[assignment]
    assert ADAPTER.top_k_of(module, module) == 3


@pytest.mark.parametrize("name", ["top_k", "num_experts_per_tok", "moe_topk"])
@pytest.mark.parametrize("config", [{}, {"moe_topk": [1, 3]}, {"num_experts_per_tok": None}])
@pytest.mark.parametrize("inside", [False, True])
def test_top_k_of_the_router_beside_the_experts(name: str, config: dict[str, Any], inside: bool) -> None:
    block, module, router = torch.nn.Module(), torch.nn.Module(), torch.nn.Module()
    module.config = type("Config", (), config)()  # type: ignore[assignment]
    block.experts, block.gate = module, router
    setattr(router if inside else block, name, 3)
    assert ADAPTER.top_k_of(module, block) == 3


def test_top_k_of_a_configuration_whose_layers_differ() -> None:
    """Transformers raises a RuntimeError when such an attribute is asked of the whole model's configuration."""
    config = OlmoeConfig(num_hidden_layers=2, num_experts_per_tok=2, per_layer_config={1: {"num_experts_per_tok": 3}})
    block, module, router = torch.nn.Module(), torch.nn.Module(), torch.nn.Module()
    block.experts, block.gate, router.top_k = module, router, 3
    for of_layer, beside, expected in ((config, block, 3), (config.per_layer_config[0], module, 2)):
        module.config = of_layer
        assert ADAPTER.top_k_of(module, beside) == expected


def test_top_k_that_nobody_tells() -> None:
    block, module = torch.nn.Sequential(), torch.nn.Module()
    module.config = type("Config", (), {"moe_topk": [1, 2]})()  # type: ignore[assignment]
    message = (
        r"neither Config \(num_experts_per_tok, .*\) nor a router in Sequential tells how many experts a token visits; "
        r"set experts_implementation='ramp_moe' instead, where the call tells"
    )
    with pytest.raises(KernelError, match=message):
        ADAPTER.top_k_of(module, block)


@pytest.mark.parametrize("top_k", [2, [2, 2], [1, 3]], ids=str)
def test_hunyuan_s_layers_may_each_have_their_own(top_k: int | list[int]) -> None:
    model = model_of("hunyuan_v1_moe", moe_topk=top_k, **HUNYUAN)
    calls = expert_calls(model)
    wrapped = wrap(model)
    wanted = top_k if isinstance(top_k, list) else [top_k] * 2
    assert [layer.shape.top_k for layer in wrapped.layers.values()] == wanted
    assert 0 < worst(calls) < TOLERANCE


def test_by_name_the_call_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    import ramp_moe_adapters.frameworks.transformers.registration as registered

    if not GPU:
        monkeypatch.setattr(registered, "_builder", Builder("h200"))
    model = model_of("hunyuan_v1_moe", moe_topk=[1, 3], **HUNYUAN)
    calls = expert_calls(model)
    model.set_experts_implementation("ramp_moe")
    assert 0 < worst(calls) < TOLERANCE
    tops = [found.layer.shape.top_k for module in model.modules() if (found := experts_of(module))]
    assert tops == [1, 3]


@pytest.mark.parametrize("columns", [1, 3])
def test_another_top_k_than_the_layer_s_is_refused(olmoe: Any, columns: int) -> None:
    wrap(olmoe)
    x, _, _ = given(HALF)
    ids, scores = torch.zeros(6, columns, dtype=torch.int64, device=DEVICE), torch.rand(6, columns, device=DEVICE)
    with pytest.raises(ShapeError, match=f"the layer takes .* and {K} ids a token, not .* and {columns}"):
        olmoe.model.layers[0].mlp.experts(x, ids, scores)
    ramp_moe.unwrap(olmoe)


def test_experts_that_are_the_model() -> None:
    module = model_of("olmoe", **EXPERTS).model.layers[0].mlp.experts
    (layer,) = wrap(module).layers.values()
    assert layer.shape.top_k == K
