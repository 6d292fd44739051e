"""Makes models to serve from the library's shapes: a configuration and a tokenizer, without weights.

OLMoE-1B-7B and Qwen3-30B-A3B are as they were published. Any other shape becomes the experts of a small Qwen3-MoE,
whose attention is not measured. Examples are DeepSeek-V3's experts on one of eight tensor-parallel ranks
(`deepseek-v3-tp8`), and Mixtral's on one of four (`mixtral-8x7b-tp4`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ramp_moe import MoEShape

MAX_POSITIONS = 16384
"""Longer than the published models', so that prompts of 8,192 tokens fit."""
SCALES = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
COMPRESSED: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "fp8-channel": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True},
    ),
    "int4-g32": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}, None),
}
"""Formats of which compressed-tensors checkpoints are published: its format, weights and activations. vLLM alone."""
OLMOE = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "clip_qkv": None,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "rope_theta": 10000.0,
    "vocab_size": 50304,
}
QWEN3 = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rope_theta": 1000000.0,
    "vocab_size": 151936,
}
OTHER = QWEN3 | {"num_attention_heads": 16, "num_hidden_layers": 8, "vocab_size": 32000}
PUBLISHED = {"olmoe-1b-7b": OLMOE, "qwen3-30b-a3b": QWEN3}


def config(shape: MoEShape, layers: int | None = None) -> dict[str, Any]:
    """The contents of the model's config.json. layers: number of layers; None: the model's own."""
    around = PUBLISHED.get(shape.name or "", OTHER)
    found = around | {
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": MAX_POSITIONS,
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.top_k,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    if layers is not None:
        found["num_hidden_layers"] = layers
    if around is not OLMOE:
        found["moe_intermediate_size"] = shape.intermediate_size
    if shape.dtype == "fp8":
        gates = [f"model.layers.{i}.mlp.gate" for i in range(found["num_hidden_layers"])]
        found["quantization_config"] = SCALES | {"modules_to_not_convert": ["lm_head", *gates]}
    elif shape.dtype in COMPRESSED:
        found["quantization_config"] = compressed(shape.dtype)
    return found


def compressed(dtype: str) -> dict[str, Any]:
    """The quantization_config of a compressed-tensors checkpoint whose experts alone are quantised."""
    format, weights, activations = COMPRESSED[dtype]
    group = {"targets": ["Linear"], "weights": weights | {"symmetric": True, "dynamic": False}}
    if activations is not None:
        group["input_activations"] = activations
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"],
    }


def cache_bytes_per_token(found: dict[str, Any]) -> int:
    """Bytes of keys and values in bf16 of one token of a model with this configuration."""
    width = found.get("head_dim") or found["hidden_size"] // found["num_attention_heads"]
    return int(2 * 2 * found["num_hidden_layers"] * found["num_key_value_heads"] * width)


def write(folder: Path, found: dict[str, Any]) -> None:
    """Write a model that engines load without weights: its config.json, and a tokenizer of the words t0, t1, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    words = {f"t{i}": i for i in range(found["vocab_size"])}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "t0"},
    }
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "t1", "unk_token": "t0"}
    for name, content in (("config", found), ("tokenizer", tokenizer), ("tokenizer_config", named)):
        (folder / f"{name}.json").write_text(json.dumps(content))
