"""Tiny models of the families of Transformers that tests wrap."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from moe_cases import error
from ramp_moe.spec.launchable import MoEWeights
from ramp_moe_kernels import reference
from transformers import AutoConfig, AutoModelForCausalLM

transformers.logging.set_verbosity_error()

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HALF = torch.bfloat16 if GPU else torch.float16
"""Triton's interpreter truncates where a GPU rounds to bf16."""
E, K, H, I, VOCABULARY = 8, 2, 64, 32, 128  # noqa: E741
TINY = {
    "hidden_size": H, "intermediate_size": I, "moe_intermediate_size": I, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "max_position_embeddings": 128,
}  # fmt: skip
EXPERTS = {"num_experts": E, "num_experts_per_tok": K}
LOCAL = {"num_local_experts": E, "num_experts_per_tok": K}
ROUTED = {
    "n_routed_experts": E, "num_experts_per_tok": K, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2,
    "topk_group": 1,
}  # fmt: skip
LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": 32, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "head_dim": 8,
}  # fmt: skip
SHARED = EXPERTS | {"shared_expert_intermediate_size": I}
LINEAR = SHARED | {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"], "head_dim": 16,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": EXPERTS,
    "mixtral": LOCAL,
    "qwen2_moe": SHARED,
    "qwen3_moe": EXPERTS | {"head_dim": 16},
    "qwen3_next": LINEAR,
    "qwen3_5_moe_text": LINEAR,
    "deepseek_v2": ROUTED | LATENT | {"topk_method": "greedy"},
    "deepseek_v3": ROUTED | LATENT,
    "glm4_moe": ROUTED | {"head_dim": 16},
    "gpt_oss": LOCAL | {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma4_text": {
        "num_experts": E, "top_k_experts": K, "enable_moe_block": True, "hidden_size_per_layer_input": 0,
        "head_dim": 16, "global_head_dim": 16, "layer_types": ["sliding_attention", "full_attention"],
    },
    "minimax_m2": LOCAL | {"head_dim": 16, "rotary_dim": 8},
}  # fmt: skip
PROMPT = torch.tensor([[5, 17, 99, 3, 64]])


def model_of(family: str, dtype: torch.dtype = HALF, **changes: Any) -> Any:
    """A model with random weights, wide enough that every expert matters."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(TINY | FAMILIES.get(family, {}) | changes))
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.1)
    return model.to(DEVICE, dtype)


def logits(model: Any, prompt: torch.Tensor = PROMPT) -> torch.Tensor:
    with torch.no_grad():
        return model(prompt.to(DEVICE)).logits.float()


def expert_calls(model: Any, prompt: torch.Tensor = PROMPT) -> list[tuple[Any, Any, torch.Tensor]]:
    """(module, arguments, output) of every module of experts in one pass. Layers are compared on the same routing. In a
    whole model, rounding in one layer may reverse a near tie in the next layer's router."""
    found: list[tuple[Any, Any, torch.Tensor]] = []

    def keep(module: Any, given: Any, out: torch.Tensor) -> None:
        found.append((module, given, out))

    hooks = [m.register_forward_hook(keep) for m in model.modules() if hasattr(m, "_apply_gate")]
    logits(model, prompt)
    for hook in hooks:
        hook.remove()
    return found


def worst(calls: list[tuple[Any, Any, torch.Tensor]]) -> float:
    """Relative error of the outputs when the same calls are repeated."""
    with torch.no_grad():
        return max(error(module(*given), out.float()) for module, given, out in calls)


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k].float(), b[k].float()) for k in a)


def fp8_experts(experts: int = 4, top_k: int = K, hidden: int = 256, inter: int = 128, **options: Any) -> Any:
    """The module with which Transformers replaces experts when it loads a model in fp8."""
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
    from transformers.integrations.moe import use_experts_implementation

    class Experts(FP8Experts):
        pass

    sizes = {"hidden_size": hidden, "intermediate_size": inter, "moe_intermediate_size": inter}
    config = AutoConfig.for_model("olmoe", **(TINY | sizes), num_experts=experts, num_experts_per_tok=top_k)
    config._experts_implementation = "eager"
    decorated = use_experts_implementation(experts_class=Experts, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)
    module = decorated(config, **({"block_size": (128, 128)} | options))
    generator = torch.Generator().manual_seed(0)
    for name in ("gate_up_proj", "down_proj"):
        parameter, scale = getattr(module, name), getattr(module, f"{name}_scale_inv")
        values, scales = reference.quantise_weights(torch.randn(parameter.shape, generator=generator) * 0.1)
        parameter.data = values
        if scale.shape == scales.shape:
            scale.data = scales.to(scale.dtype)
    return module.to(DEVICE)


def computed(weights: MoEWeights, x: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """The output of the reference, in float32."""
    scales = {"gate_up_scale": weights.gate_up_scale, "down_scale": weights.down_scale}
    how = {
        "quantise": weights.gate_up_scale is not None,
        "activation": weights.activation,
        "limit": weights.limit,
        "layout": weights.layout,
    }
    return reference.experts(x, weights.gate_up, weights.down, ids, scores, **how, **scales)
