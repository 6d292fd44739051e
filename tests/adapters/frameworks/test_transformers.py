"""Models of Transformers, wrapped: tiny ones of many families, with random weights, against their own eager experts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import ramp_moe
import ramp_moe_adapters
import torch
import torch.distributed as dist
from moe_cases import error
from ramp_moe import HardwareError, KernelError, ShapeError
from ramp_moe.runtime.formats import dequantise
from ramp_moe.runtime.layer_factory import Builder
from ramp_moe.runtime.placeholder import Placeholder
from ramp_moe.runtime.relayout import relayout
from ramp_moe.runtime.wrapped_experts import experts_of
from tiers import slow_except
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoModelForCausalLM
from transformers_cases import (
    DEVICE,
    FAMILIES,
    GPU,
    HALF,
    PROMPT,
    E,
    H,
    K,
    computed,
    expert_calls,
    fp8_experts,
    logits,
    model_of,
    same,
    state,
    worst,
)

TOLERANCE = 2e-2 if GPU else 4e-3


@pytest.fixture(scope="module")
def olmoe_model() -> Any:
    """Shared: every test leaves it unwrapped."""
    return model_of("olmoe")


def wrap(model: Any, **options: Any) -> ramp_moe.Wrapped:
    return ramp_moe.wrap(model, device="auto" if GPU else "h200", **options)


@pytest.mark.parametrize("family", slow_except(["qwen3_moe", "gpt_oss"], FAMILIES))
def test_families(family: str) -> None:
    model = model_of(family)
    model.set_experts_implementation("eager")
    calls, expected, before = expert_calls(model), logits(model), state(model)
    wrapped = wrap(model)
    assert len(calls) == len(wrapped.layers) >= 1
    assert 0 < worst(calls) < TOLERANCE
    assert model.get_experts_implementation()[""] == "ramp_moe"
    with wrapped.record() as recording:
        ours = expert_calls(model)
    assert len(recording._batches) == len(ours) == len(calls)
    ramp_moe.unwrap(model)
    assert 0 < worst(ours) < TOLERANCE, "of the stock experts, on what reached each layer of the wrapped model"
    assert model.get_experts_implementation()[""] == "eager"
    assert same(state(model), before)
    assert torch.equal(logits(model), expected)


@pytest.mark.slow
def test_another_processors_roundings_turn_near_ties_of_routers_alone() -> None:
    """Stock against itself, with each projection rounded anew: MiniMax-M2's second router has a near tie here, so that
    whole models differ. The layers do not."""
    model = model_of("minimax_m2", torch.float16)
    model.set_experts_implementation("eager")
    generator, expected = torch.Generator(DEVICE).manual_seed(0), logits(model)

    def rounded(module: Any, given: Any, out: torch.Tensor) -> torch.Tensor:
        return out * (1 + 2.0**-11 * torch.randn(out.shape, generator=generator, device=DEVICE)).to(out.dtype)

    for module in [m for m in model.modules() if isinstance(m, torch.nn.Linear)]:
        module.register_forward_hook(rounded)
    assert max(float(error(logits(model), expected)) for _ in range(40)) > 4e-2
    wrapped = wrap(model)
    calls = [call for _ in range(8) for call in expert_calls(model)]
    assert len(calls) == 8 * len(wrapped.layers)
    ramp_moe.unwrap(model)
    assert 0 < worst(calls) < TOLERANCE


def test_gpt_oss_clamps_as_its_own_experts_do() -> None:
    model = model_of("gpt_oss")
    (experts, _) = [m for m in model.modules() if hasattr(m, "gate_up_proj")]
    with torch.no_grad():
        experts.gate_up_proj.mul_(30)
    x = torch.randn(5, H, device=DEVICE).to(HALF)
    ids = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7], [7, 0]], device=DEVICE)
    scores = torch.rand(5, K, device=DEVICE).to(HALF)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        projected = x @ experts.gate_up_proj[0]
        assert projected.abs().max() > 14, "the clamp at 7 matters"
        expected = experts(x, ids, scores)
        wrap(model)
        assert 0 < error(experts(x, ids, scores), expected.float()) < TOLERANCE


def test_generate(olmoe_model: Any) -> None:
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = olmoe_model.generate(PROMPT.to(DEVICE), **options)
    wrapped = wrap(olmoe_model)
    with wrapped.record() as recording:
        found = olmoe_model.generate(PROMPT.to(DEVICE), cache_implementation="static", disable_compile=True, **options)
    ramp_moe.unwrap(olmoe_model)
    assert found.shape == expected.shape
    assert GPU or torch.equal(found, expected), "in bf16 near ties may fall otherwise"
    tokens = [tokens for tokens, _ in recording._batches]
    assert tokens == [5, 1, 1, 1] * 2, "prefill, then decode, of two layers"


def test_the_sentinel_is_skipped(olmoe_model: Any) -> None:
    wrap(olmoe_model)
    experts = olmoe_model.model.layers[0].mlp.experts
    x, scores = torch.randn(3, H, device=DEVICE).to(HALF), torch.rand(3, K, device=DEVICE).to(HALF)
    with torch.no_grad():
        out = experts(x, torch.tensor([[1, E], [E, E], [2, 3]], device=DEVICE), scores)
        alone = experts(x, torch.tensor([[1, E], [1, 2], [2, 3]], device=DEVICE), scores)
    ramp_moe.unwrap(olmoe_model)
    assert not out[1].any()
    assert torch.equal(out[::2], alone[::2])
    assert out[0].any()


def test_gradients_are_refused(olmoe_model: Any) -> None:
    wrap(olmoe_model)
    loss = olmoe_model(PROMPT.to(DEVICE)).logits.float().sum()
    with pytest.raises(KernelError, match=r"computes no gradients; run the model under torch.no_grad\(\), or ramp_moe"):
        loss.backward()
    for name, parameter in olmoe_model.named_parameters():
        parameter.requires_grad_("experts" in name or "lm_head" in name)
    loss = olmoe_model(PROMPT.to(DEVICE)).logits.float().sum()  # the experts' alone, with a head that has one anyway
    with pytest.raises(KernelError, match="computes no gradients"):
        loss.backward()
    olmoe_model.requires_grad_(True)
    olmoe_model.zero_grad()
    ramp_moe.unwrap(olmoe_model)
    olmoe_model(PROMPT.to(DEVICE)).logits.float().sum().backward()
    assert olmoe_model.model.layers[0].mlp.experts.gate_up_proj.grad.any()
    olmoe_model.zero_grad()


@pytest.mark.slow
def test_compiled_whole(olmoe_model: Any) -> None:
    wrap(olmoe_model)
    expected = logits(olmoe_model)
    torch.compiler.reset()
    found = logits(torch.compile(olmoe_model, backend="aot_eager", fullgraph=True))
    ramp_moe.unwrap(olmoe_model)
    assert error(found, expected) < 1e-3


def test_loaded_by_name(
    tmp_path: Path, olmoe_model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import ramp_moe_adapters.frameworks.transformers.registration as registered

    olmoe_model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=HALF).to(DEVICE)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=HALF, experts_implementation="ramp_moe").to(DEVICE)
    if not GPU:
        with pytest.raises(HardwareError, match="the experts' weights are on the CPU"):
            logits(model)
        monkeypatch.setattr(registered, "_builder", Builder("h200"))
    assert 0 < error(logits(model), logits(stock)) < (0.3 if GPU else TOLERANCE)
    (said,) = [record.message for record in caplog.records if record.name == "ramp_moe"]
    assert "measure with `ramp-moe profile --model" in said or "measure it with `ramp-moe profile --model" in said
    layers = [experts_of(layer.mlp.experts) for layer in model.model.layers]
    assert all(layers)
    assert layers[0].layer.workspace is layers[1].layer.workspace
    with pytest.raises(KernelError, match="wrapped already"):
        wrap(model)
    ramp_moe.unwrap(model)
    assert model.config._experts_implementation == "grouped_mm"
    assert torch.equal(logits(model), logits(stock))


@pytest.mark.slow
def test_a_name_is_registered_without_a_model() -> None:
    code = (
        "import sys, ramp_moe; assert 'transformers' not in sys.modules; import ramp_moe_adapters.transformers; "
        "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as a; "
        "from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS as b; "
        "print('ramp_moe' in a, 'ramp_moe' in b)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]


def test_other_implementations_can_be_had_while_it_is_wrapped(olmoe_model: Any) -> None:
    expected = logits(olmoe_model)
    wrap(olmoe_model)
    olmoe_model.set_experts_implementation("grouped_mm")
    assert torch.equal(logits(olmoe_model), expected)
    olmoe_model.set_experts_implementation("ramp_moe")
    assert not torch.equal(logits(olmoe_model), expected)
    ramp_moe.unwrap(olmoe_model)


def test_nothing_is_copied_where_the_order_will_do(olmoe_model: Any) -> None:
    wrapped = wrap(olmoe_model)
    for name, layer in wrapped.layers.items():
        experts = olmoe_model.get_submodule(name)
        (held,) = layer.held
        assert held.gate_up.data_ptr() == experts.gate_up_proj.data_ptr()
        assert held.down.data_ptr() == experts.down_proj.data_ptr()
    ramp_moe.unwrap(olmoe_model)


def test_what_is_moved_is_held_once() -> None:
    model = model_of("gpt_oss")
    before = state(model)
    wrapped = wrap(model)
    for name in wrapped.layers:
        experts = model.get_submodule(name)
        assert isinstance(experts.gate_up_proj, Placeholder)
        assert isinstance(experts.down_proj, Placeholder)
    assert same(state(model), before)
    ramp_moe.unwrap(model)
    assert same(state(model), before)


# --- fp8 -------------------------------------------------------------------------------------------------------------


def test_fp8_experts_without_a_profile_of_their_shape() -> None:
    module = fp8_experts()
    wrapped = wrap(module)
    (layer,) = wrapped.layers.values()
    assert layer.shape.dtype == "fp8"
    assert any("guessed from other shapes; measure it with `ramp-moe profile --model E4-k2-h256-i128-fp8" in n
               for n in wrapped.notes)  # fmt: skip
    x = torch.randn(6, 256, device=DEVICE).to(HALF)
    ids = torch.tensor([[0, 1], [2, 3], [3, 0], [1, 2], [0, 2], [1, 3]], device=DEVICE)
    scores = torch.rand(6, 2, device=DEVICE)
    with torch.no_grad():
        found = module(x, ids, scores)
    assert error(found, computed(layer.held[0], x, ids, scores)) < 2e-2
    ramp_moe.unwrap(module)
    assert module.config._experts_implementation == "eager"


def test_scales_that_are_powers_of_two() -> None:
    module = fp8_experts(scale_fmt="ue8m0")
    assert module.down_proj_scale_inv.dtype == torch.float8_e8m0fnu
    (layer,) = wrap(module).layers.values()
    assert layer.held[0].down_scale is not None
    assert torch.equal(layer.held[0].down_scale, module.down_proj_scale_inv.float())


@pytest.mark.parametrize(("inter", "block"), [(192, 64), (160, 32)])
def test_scale_blocks_that_hold_gate_and_up(inter: int, block: int) -> None:
    """Transformers counts the blocks over the rows of both together."""
    module = fp8_experts(inter=inter)
    together = dequantise(module.gate_up_proj, module.gate_up_proj_scale_inv)
    down = dequantise(module.down_proj, module.down_proj_scale_inv)
    (layer,) = wrap(module).layers.values()
    held = relayout(layer.held[0], "gate-first")
    assert held.scale_block == block
    assert held.gate_up_scale is not None
    assert held.down_scale is not None
    assert torch.equal(dequantise(held.gate_up, held.gate_up_scale, block), together)
    assert torch.equal(dequantise(held.down, held.down_scale, block), down)
    ramp_moe.unwrap(module)


@pytest.mark.parametrize("inter", [16, 64, 80, 96, 224])
def test_scale_blocks_that_may_be_counted_in_two_ways(inter: int) -> None:
    """As many blocks of gate and up together as of each by itself."""
    with pytest.raises(KernelError, match=f"intermediate size {inter} is no multiple of 128.* where the blocks of up"):
        wrap(fp8_experts(inter=inter))


def test_fp8_that_is_not_ours() -> None:
    for options, message in (
        ({"activation_scheme": "static"}, "activations have static scales"),
        ({"block_size": (64, 64)}, r"blocks \(64, 64\); ramp_moe takes \[128, 128\]"),
        ({"block_size": None}, "scales belong to blocks None"),
    ):
        with pytest.raises(KernelError, match=message):
            wrap(fp8_experts(**options))


def test_half_quantised() -> None:
    module = fp8_experts()
    module.down_proj.data = module.down_proj.data.to(HALF)
    with pytest.raises(ShapeError, match=r"down must be torch.float8_e4m3fn, not"):
        wrap(module)
    assert module.config._experts_implementation == "eager"


# --- What cannot be wrapped -------------------------------------------------------------------------------------------


def test_models_without_experts() -> None:
    with pytest.raises(KernelError, match=r"LlamaForCausalLM has no MoE layer that ramp_moe knows: .* a dense model"):
        wrap(model_of("llama"))
    with pytest.raises(KernelError, match=r"Linear has no MoE layer .*: name the experts of .* with ramp_moe\.Experts"):
        wrap(torch.nn.Linear(2, 2))
    model = model_of("llama")
    model.config.quantization_config = type("Config", (), {"quant_method": "mxfp4"})()
    with pytest.raises(KernelError, match="it is quantised by mxfp4; ramp_moe takes bf16, fp16 and fp8 experts"):
        wrap(model)


def test_a_wrapped_model(olmoe_model: Any) -> None:
    wrap(olmoe_model)
    with pytest.raises(KernelError, match=r"OlmoeForCausalLM is wrapped already; ramp_moe\.unwrap\(model\) first"):
        wrap(olmoe_model)
    ramp_moe.unwrap(olmoe_model)
    with pytest.raises(KernelError, match="OlmoeForCausalLM is not wrapped"):
        ramp_moe.unwrap(olmoe_model)


def test_the_model_is_left_as_it_was_where_one_layer_cannot_be_had() -> None:
    model = model_of("gpt_oss")
    last = model.model.layers[1].mlp.experts
    limited, before = last._apply_gate, state(model)
    model.set_experts_implementation("eager")
    expected = logits(model)
    last.alpha = 1.5
    with pytest.raises(KernelError, match=r"model\.layers\.1\.mlp\.experts: its activation is none of swiglu"):
        wrap(model)
    last.alpha = 1.702
    assert last._apply_gate == limited
    assert model.config._experts_implementation == "eager"
    assert same(state(model), before)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("olmoe", {"hidden_act": "relu"}, r"model\.layers\.0\.mlp\.experts: its activation is none of swiglu"),
        ("olmoe", {"hidden_act": "gelu"}, "its activation is none of swiglu"),
        ("olmoe", {"intermediate_size": 24}, "intermediate_size 24 is not a multiple of 16"),
        (
            "nemotron_h",
            {
                "n_routed_experts": E,
                "num_experts_per_tok": K,
                "layers_block_type": ["attention", "moe"],
                "moe_shared_expert_intermediate_size": 32,
                "n_group": 1,
                "topk_group": 1,
            },
            "its experts have no gate",
        ),
    ],
)
def test_experts_that_no_kernel_computes(family: str, changes: dict[str, Any], message: str) -> None:
    model = model_of(family, **changes)
    expected = logits(model)
    with pytest.raises(KernelError, match=message):
        wrap(model)
    assert torch.equal(logits(model), expected)


def test_weights_in_float32() -> None:
    with pytest.raises(ShapeError, match=r"experts: gate_up is torch.float32; weights must be bf16, fp16 or float8"):
        wrap(model_of("olmoe", torch.float32))


def test_weights_that_are_not_there(olmoe_model: Any) -> None:
    with pytest.raises(KernelError, match=r"gate_up_proj is not loaded \(it is on the device meta\)"):
        wrap(model_of("olmoe").to("meta"))
    model = model_of("olmoe")
    model.model.layers[1].mlp.experts.to("meta")
    with pytest.raises(KernelError, match=rf"weights lie on {DEVICE}.*, meta; wrap a model on one device"):
        wrap(model)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Of one process, this one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh(DEVICE, (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_sharded_weights(mesh: DeviceMesh, name: str) -> None:
    model = model_of("olmoe")
    before, expected = state(model), logits(model)
    experts = model.model.layers[1].mlp.experts  # the first layer has been wrapped by then
    whole = getattr(experts, name)
    sharded = torch.nn.Parameter(DTensor.from_local(whole.detach(), mesh, [Shard(0)]))
    setattr(experts, name, sharded)
    with pytest.raises(
        KernelError, match=rf"model\.layers\.1\.mlp\.experts: {name} is sharded over several devices; .* whole experts"
    ):
        wrap(model)
    assert getattr(experts, name) is sharded
    assert not any(experts_of(module) for module in model.modules())
    assert model.config._experts_implementation == "grouped_mm"
    setattr(experts, name, whole)
    assert same(state(model), before)
    assert torch.equal(logits(model), expected)


def test_on_another_gpu_than_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(
        HardwareError, match=r"on cuda:1, the current device is cuda:0, .* torch\.cuda\.set_device\(1\)"
    ):
        Builder()._hardware(torch.device("cuda:1"))


def test_on_the_cpu_it_must_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("olmoe").to("cpu")
    with pytest.raises(HardwareError, match=r"are on the CPU; move the model to a GPU\. To try it without"):
        ramp_moe.wrap(model)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(HardwareError, match="set TRITON_INTERPRET=1 before anything imports Triton"):
        ramp_moe.wrap(model, device="h200")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ramp_moe.UnknownNameError, match="unknown device 'h2000'"):
        ramp_moe.wrap(model, device="h2000")


def test_a_version_without_the_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    from ramp_moe_adapters.frameworks.transformers import hints as transformers_hints

    model = model_of("olmoe")
    monkeypatch.setattr(transformers_hints.metadata, "version", lambda name: "4.57.1")
    with pytest.raises(KernelError, match=r"transformers 4.57.1 has no experts interface; install 5.17 or a newer 5"):
        wrap(model_of("llama"))
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    monkeypatch.delitem(sys.modules, "ramp_moe_adapters.frameworks.transformers.registration", raising=False)
    monkeypatch.delattr(ramp_moe_adapters, "transformers", raising=False)
    with pytest.raises(KernelError, match=r"needs the experts interface of transformers 5.17 or a newer 5"):
        wrap(model)
    assert model.config._experts_implementation == "grouped_mm"
