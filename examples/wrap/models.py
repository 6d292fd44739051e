"""What the scripts beside this share: models of known architectures with random weights, and what they run on.

Without a GPU OLMoE has its experts and top-k, but tiny matrices, and Triton's interpreter runs the kernels.
"""

from __future__ import annotations

import os
from typing import Any

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

from ramp_moe_kernels.reference import quantise_weights  # noqa: E402
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, OlmoeConfig, Qwen3MoeConfig  # noqa: E402
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear  # noqa: E402

DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float16)
STANDS_FOR = "auto" if GPU else "h200"
"""The `device` of ramp_moe.wrap."""
TINY = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 256}


def olmoe() -> Any:
    """OLMoE-1B-7B, in bf16 on a GPU, in fp16 on the CPU."""
    sizes = {"intermediate_size": 1024} if GPU else TINY | {"num_attention_heads": 4, "num_key_value_heads": 4}
    return built(OlmoeConfig(num_experts=64, num_experts_per_tok=8, eos_token_id=1, pad_token_id=1, **sizes))


def qwen3() -> Any:
    """Qwen3-30B-A3B."""
    sizes = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48, "vocab_size": 151936}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
    return built(Qwen3MoeConfig(num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, **sizes, **heads))


MODELS = {"olmoe-1b-7b": olmoe, "qwen3-30b-a3b": qwen3}


def built(config: Any) -> Any:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()


def in_fp8(model: Any) -> Any:
    """A model of which the experts are this one's in block-scaled fp8, as Transformers makes them of a checkpoint, and
    the rest is shared with it: Transformers' linear layers in fp8 need packages that it downloads."""
    with torch.device("meta"):
        found = AutoModelForCausalLM.from_config(model.config, dtype=DTYPE).eval()
    experts = [name for name, _ in model.named_modules() if name.endswith(".experts")]
    linear = [name for name, module in found.named_modules() if isinstance(module, torch.nn.Linear)]
    replace_with_fp8_linear(found, linear, FineGrainedFP8Config(weight_block_size=(128, 128)))
    rest = {name: t for name, t in model.state_dict().items() if ".experts." not in name}
    found.load_state_dict(rest, strict=False, assign=True)
    for name, buffer in model.named_buffers():  # which a state has not all of
        owner, _, last = name.rpartition(".")
        found.get_submodule(owner).register_buffer(last, buffer, persistent=False)
    for name in experts:
        given, module = model.get_submodule(name), found.get_submodule(name)
        for projection in ("gate_up_proj", "down_proj"):
            for what, t in zip(("", "_scale_inv"), quantise_weights(getattr(given, projection)), strict=True):
                setattr(module, projection + what, torch.nn.Parameter(t, requires_grad=False))
    return found


def prompt(model: Any, sequences: int, length: int) -> torch.Tensor:
    """Random ids int64 `[sequences, length]`."""
    return torch.randint(2, model.config.vocab_size, (sequences, length), device=DEVICE)
