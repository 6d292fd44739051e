"""A model with random weights, and the device and dtype that it runs in. The scripts beside this share it.

Without a GPU, OLMoE keeps its experts and top-k, but has tiny matrices, and Triton's interpreter runs the kernels.
"""

from __future__ import annotations

import os
from typing import Any

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

from transformers import AutoModelForCausalLM, OlmoeConfig  # noqa: E402

DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float16)
STANDS_FOR = "auto" if GPU else "h200"
"""Argument `device` of ramp_moe.wrap."""
TINY = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 256}


def olmoe() -> Any:
    """OLMoE-1B-7B with random weights, in bf16 on a GPU and in fp16 on the CPU."""
    sizes = {"intermediate_size": 1024} if GPU else TINY | {"num_attention_heads": 4, "num_key_value_heads": 4}
    return built(OlmoeConfig(num_experts=64, num_experts_per_tok=8, eos_token_id=1, pad_token_id=1, **sizes))


def built(config: Any) -> Any:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()


def prompt(model: Any, sequences: int, length: int) -> torch.Tensor:
    """Random ids int64 `[sequences, length]`."""
    return torch.randint(2, model.config.vocab_size, (sequences, length), device=DEVICE)
