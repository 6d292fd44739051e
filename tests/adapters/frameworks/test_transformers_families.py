"""All classes of the installed Transformers' experts interface: wrapped and right, or left out with the true reason.

CI runs the installed version. Another one, the oldest that is supported say, is tried so:

    pip install --target older --no-deps transformers==5.17.0 'huggingface-hub>=1.5,<2' httpx httpcore h11 anyio
    PYTHONPATH=older python -m pytest tests/adapters/frameworks/test_transformers_*.py
"""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
import transformers
from moe_cases import error
from ramp_moe import KernelError
from ramp_moe.runtime.layer_factory import Builder
from ramp_moe.runtime.wrap import attach
from ramp_moe.runtime.wrapped_experts import experts_of
from ramp_moe_adapters.frameworks.transformers.experts import NAME, TOP_K, TransformersExperts
from ramp_moe_adapters.frameworks.transformers.hints import EXPERTS, OTHERS
from transformers_cases import DEVICE, GPU
from transformers_families import CLASS, DECORATED, E, H, K, names_of_classes, sources, tiny

ADAPTER = TransformersExperts()
CLASSES = names_of_classes()
COUNTS = {"5.17.0": 55, "5.24.0": 68}
LEFT_OUT = {
    "MuseSparkExperts": r"experts have has_post_expert_norm=True \(transformers .*\), which ramp_moe does not compute",
    "NemotronHExperts": r"its experts have no gate; ramp_moe computes activation\(gate\) \* up",
    "Inkling2Experts": r"its activation is none of swiglu, .* \(Inkling2SoftcappedSwiGLU\)",
    "Inkling2LoopExperts": r"its activation is none of swiglu, .* \(Inkling2LoopSoftcappedSwiGLU\)",
}
"""By class, why."""
ROUTED = re.compile(r"self\.top_k = config\.(\w+)")
CLAMPED = {"DeepseekV4Experts", "Glm5NextTextExperts", "HYV4Experts", "HYV4VLExperts"}


@pytest.fixture(scope="module")
def builder() -> Builder:
    """Of all layers, which then share a plan and buffers."""
    return Builder("auto" if GPU else "h200")


def test_all_are_found() -> None:
    assert len(CLASSES) == COUNTS.get(transformers.__version__, len(CLASSES)) >= min(COUNTS.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES, ids=[name.partition(":")[2] for name in CLASSES])
def test_a_class_is_right_or_left_out(name: str, builder: Builder) -> None:
    module, kind = tiny(name).to(DEVICE), name.partition(":")[2]
    assert ADAPTER.finds(module)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, H, generator=generator).to(DEVICE, torch.float16)
    ids = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(5)]).to(DEVICE)
    scores = torch.rand(5, K, generator=generator).to(DEVICE)
    if kind in LEFT_OUT:
        with pytest.raises(KernelError, match=LEFT_OUT[kind]):
            attach(module, ADAPTER, K, builder)
        assert experts_of(module) is None
        assert module.config._experts_implementation == "eager"
        module.config._experts_implementation = NAME
        with pytest.raises(KernelError, match=LEFT_OUT[kind]):
            module(x, ids, scores)
        return
    assert 1 <= ADAPTER.top_k_of(module, module) <= 10
    scores[1, 0] = 0  # some classes' eager code does not know the id to skip; without its weight it is skipped, too
    with torch.no_grad():
        expected = module(x, ids, scores)
        attached = attach(module, ADAPTER, K, builder)
        ids[1, 0], scores[1, 0] = E, 1
        found = module(x, ids, scores)
    assert found.dtype == expected.dtype
    assert 0 < error(found, expected.float()) < 1e-3
    assert attached.layer.held[0].limit == (10.0 if kind in CLAMPED else None)


def test_routers_take_top_k_from_names_that_are_known() -> None:
    named = {name for _, text in sources() if DECORATED.search(text) for name in ROUTED.findall(text)}
    assert "num_experts_per_tok" in named <= set(TOP_K)


def test_experts_outside_the_interface_have_a_reason() -> None:
    """Every file of models that holds experts, and none of the interface, has a class that the hint knows."""
    unknown = {
        module: found
        for module, text in sources()
        if not DECORATED.search(text)
        if (found := [name for name in CLASS.findall(text) if EXPERTS.search(name)])
        if not OTHERS.keys() & set(found)
    }
    assert not unknown, "say in transformers_hints.OTHERS what these are, and why they are left out"


@pytest.mark.parametrize(
    ("model_class", "config_class", "changes"),
    [
        ("Llama4ForCausalLM", "Llama4TextConfig", {"num_local_experts": E}),
        ("LongcatFlashForCausalLM", "LongcatFlashConfig", {"n_routed_experts": E, "num_layers": 1}),
        ("JetMoeForCausalLM", "JetMoeConfig", {}),
        ("Step3p7TextModel", "Step3p7TextConfig", {"num_hidden_layers": 4}),  # the first three are dense
        ("SwitchTransformersModel", "SwitchTransformersConfig", {"num_layers": 3, "num_decoder_layers": 3}),
        ("NllbMoeModel", "NllbMoeConfig", {"encoder_layers": 4, "decoder_layers": 4, "num_experts": 4}),
        ("DbrxForCausalLM", "DbrxConfig", {"n_layers": 1, "attn_config": {"rope_theta": 10000.0}}),
        ("DogeForCausalLM", "DogeConfig", {"is_moe": True}),
    ],
)
def test_models_outside_the_interface_are_told_why(
    model_class: str, config_class: str, changes: dict[str, Any]
) -> None:
    if not hasattr(transformers, model_class):
        pytest.skip(f"transformers {transformers.__version__} has no {model_class}")
    config = getattr(transformers, config_class)(**({"num_hidden_layers": 2} | changes))
    with torch.device("meta"):
        model = getattr(transformers, model_class)(config)
    hint = ADAPTER.hint(model)
    assert hint is not None
    named = [name for name in OTHERS if name in hint]
    assert len(named) == 1
    assert hint == f"its experts, {named[0]}, are not those of the experts interface: {OTHERS[named[0]]}"
    assert any(type(module).__name__ == named[0] for module in model.modules())
