"""Weights of wrapped models of Transformers: loaded, written, saved, copied and read as those of any model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import ramp_moe
import torch
from moe_cases import error
from ramp_moe import KernelError
from ramp_moe.runtime.formats import dequantise
from ramp_moe.runtime.layer_factory import Builder
from ramp_moe.runtime.placeholder import Placeholder
from ramp_moe.runtime.relayout import relayout
from ramp_moe.runtime.wrapped_experts import experts_of
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM
from transformers_cases import DEVICE, GPU, HALF, H, K, fp8_experts, logits, model_of, same, state

TOLERANCE = 2e-2 if GPU else 4e-3
NAMES = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")


def wrap(model: Any, **options: Any) -> ramp_moe.Wrapped:
    return ramp_moe.wrap(model, device="auto" if GPU else "h200", **options)


def gpt_oss(scale: float = 1.0) -> Any:
    """Of one layer, whose experts are transposed, biased, and gate and up in turn."""
    model = model_of("gpt_oss", num_hidden_layers=1, layer_types=["full_attention"])
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in experts(model).parameters():
            parameter.mul_(scale)
    return model


def experts(model: Any) -> Any:
    return model.model.layers[0].mlp.experts


@pytest.fixture(scope="module")
def stock() -> tuple[Any, Any]:
    """Two models, never wrapped, and of each its logits."""
    found = gpt_oss(), gpt_oss(1.5)
    return [(model, logits(model)) for model in found]


@pytest.fixture
def by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import ramp_moe_adapters.frameworks.transformers.registration as registered

    monkeypatch.setattr(registered, "_builder", Builder("auto" if GPU else "h200"))


def test_states_and_updates_in_place(stock: Any) -> None:
    (first, expected), (second, other) = stock
    model = copy.deepcopy(first)
    parameters = dict(model.named_parameters())
    wrap(model)
    assert isinstance(experts(model).gate_up_proj, Placeholder)
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert same(state(model), state(first))
    assert not model.load_state_dict(second.state_dict()).missing_keys
    assert 0 < error(logits(model), other) < TOLERANCE
    with torch.no_grad():
        for name in NAMES:  # as engines that train do, tensor by tensor, and expert by expert
            new = getattr(experts(first), name)
            for expert in range(len(new)):
                parameters[f"model.layers.0.mlp.experts.{name}"].data[expert].copy_(new[expert])
    assert 0 < error(logits(model), expected) < TOLERANCE
    ramp_moe.unwrap(model)
    assert torch.equal(logits(model), expected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_another_implementation_without_unwrapping(implementation: str, dtype: torch.dtype, by_name: None) -> None:
    """What the experts' own code reads are the weights, wherever they are."""
    if not GPU and dtype == torch.bfloat16:  # Triton's interpreter has no bf16 dot: wrapped, and not run
        model = gpt_oss().to(dtype)
        model.set_experts_implementation(implementation)
        expected = logits(model)
        wrap(model)
    else:
        model = gpt_oss().to(dtype)
        model.set_experts_implementation(implementation)
        expected = logits(model)
        model.set_experts_implementation("ramp_moe")
        assert 0 < error(logits(model), expected) < TOLERANCE
    assert isinstance(experts(model).gate_up_proj, Placeholder)
    model.set_experts_implementation(implementation)
    assert torch.equal(logits(model), expected)
    ramp_moe.unwrap(model)
    assert type(experts(model).gate_up_proj) is nn.Parameter


def test_saved_while_it_is_wrapped(stock: Any, tmp_path: Path) -> None:
    (first, expected), _ = stock
    model = copy.deepcopy(first)
    wrap(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=HALF, experts_implementation="eager").to(DEVICE)
    assert same(state(loaded), state(first))
    assert error(logits(loaded), expected) < TOLERANCE
    torch.save(model.state_dict(), tmp_path / "state.pt")
    assert same(torch.load(tmp_path / "state.pt"), state(first))
    with pytest.raises(KernelError, match="cannot be pickled"):
        torch.save(model, tmp_path / "model.pt")


def test_copied_while_it_is_wrapped(stock: Any) -> None:
    (first, expected), (second, other) = stock
    model = copy.deepcopy(first)
    wrap(model)
    copied = copy.deepcopy(model)
    copied.load_state_dict(second.state_dict())
    assert 0 < error(logits(copied), other) < TOLERANCE
    assert 0 < error(logits(model), expected) < TOLERANCE
    ramp_moe.unwrap(copied)
    assert torch.equal(logits(copied), other)
    assert experts_of(experts(model))


def test_a_failed_wrap() -> None:
    model = model_of("gpt_oss")
    parametrize.register_parametrization(model.model.layers[1].mlp.experts, "down_proj", nn.Identity())
    expected, parameters = logits(model), list(model.parameters())
    with pytest.raises(
        KernelError, match=r"model\.layers\.1\.mlp\.experts: down_proj is parametrised \(Identity\): merge or remove"
    ):
        wrap(model)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(logits(model), expected)
    with pytest.raises(KernelError, match="GptOssForCausalLM is not wrapped"):
        ramp_moe.unwrap(model)


def test_parametrised_and_run_by_name(by_name: None) -> None:
    model = gpt_oss()
    parametrize.register_parametrization(experts(model), "down_proj", nn.Identity())
    model.set_experts_implementation("ramp_moe")
    with pytest.raises(KernelError, match=r"GptOssExperts: down_proj is parametrised \(Identity\): merge or remove"):
        logits(model)
    parametrize.remove_parametrizations(experts(model), "down_proj")
    found = logits(model)
    model.set_experts_implementation("eager")
    assert 0 < error(found, logits(model)) < TOLERANCE


# --- fp8 --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_scales_of_powers_of_two_are_written_through() -> None:
    """The layer has float32 copies of them."""
    module = fp8_experts(scale_fmt="ue8m0")
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    (layer,) = wrap(module).layers.values()
    assert isinstance(module.down_proj_scale_inv, Placeholder)
    doubled = (module.down_proj_scale_inv.float() * 2).to(torch.float8_e8m0fnu)
    module.down_proj_scale_inv.copy_(doubled)
    module.gate_up_proj_scale_inv.data[1].copy_(module.gate_up_proj_scale_inv[0])
    held = layer.held[0]
    assert torch.equal(held.down_scale, doubled.float())  # type: ignore[arg-type]
    assert torch.equal(held.gate_up_scale[1], held.gate_up_scale[0])  # type: ignore[index]
    assert module.state_dict()["down_proj_scale_inv"].dtype == torch.float8_e8m0fnu
    ramp_moe.unwrap(module)
    assert torch.equal(module.down_proj_scale_inv.float(), doubled.float())
    assert torch.equal(module.gate_up_proj.float(), before["gate_up_proj"].float())


@torch.no_grad()
def test_scales_of_blocks_that_hold_gate_and_up_are_written_through() -> None:
    """The layer has those of smaller blocks."""
    module = fp8_experts(inter=192)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    (layer,) = wrap(module).layers.values()
    for name in ("gate_up_proj_scale_inv", "down_proj_scale_inv"):
        assert torch.equal(getattr(module, name), before[name])
        getattr(module, name).mul_(torch.arange(1, 5).view(-1, 1, 1))
        getattr(module, name)[1, 1].fill_(3.0)
    changed = {name: p.detach().clone() for name, p in module.named_parameters()}
    assert torch.equal(changed["down_proj_scale_inv"][3], 4 * before["down_proj_scale_inv"][3])
    held = relayout(layer.held[0], "gate-first")
    for weight, scale, name in (
        (held.gate_up, held.gate_up_scale, "gate_up_proj"),
        (held.down, held.down_scale, "down_proj"),
    ):
        assert scale is not None
        of_module = dequantise(before[name], changed[f"{name}_scale_inv"])
        assert torch.equal(dequantise(weight, scale, 64), of_module)
    ramp_moe.unwrap(module)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.float(), changed[name].float())


# --- PEFT -------------------------------------------------------------------------------------------------------------


def adapted(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(target_parameters=targets, target_modules=[], r=4,
                                                      init_lora_weights=False))  # fmt: skip


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_peft_in_both_orders(family: str) -> None:
    model = adapted(model_of(family))
    expected = logits(model)
    with pytest.raises(KernelError, match=r"\w+_proj is adapted by ParamWrapper; merge that into the weights"):
        wrap(model)
    assert torch.equal(logits(model), expected)
    merged = model.merge_and_unload()
    merged.set_experts_implementation("eager")
    stock = logits(merged)
    wrap(merged)
    assert 0 < error(logits(merged), stock) < TOLERANCE
    later = adapted(merged)
    with pytest.raises(KernelError, match=r"is parametrised \(_Lora|needs the memory of down_proj"):
        logits(later)


def test_hidden_states_are_still_checked(stock: Any) -> None:
    model = copy.deepcopy(stock[0][0])
    wrap(model)
    with pytest.raises(ramp_moe.ShapeError, match="the layer takes hidden_states"):
        experts(model)(torch.zeros(2, H * 2, device=DEVICE, dtype=HALF), torch.zeros(2, K, device=DEVICE).int(),
                       torch.ones(2, K, device=DEVICE))  # fmt: skip
