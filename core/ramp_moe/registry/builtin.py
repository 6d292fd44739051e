"""The models and GPUs that ship with the library, given through the same hooks as a plugin's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path

from ..spec.hardware import Hardware
from ..spec.shapes import Model, MoEShape
from .gpus import GPUS
from .hookspecs import hookimpl

# name, experts, top_k, hidden, intermediate of one routed expert, format of the release, source
_MODELS: tuple[tuple[str, int, int, int, int, str, str], ...] = (
    ("olmoe-1b-7b", 64, 8, 2048, 1024, "bf16", "config.json of allenai/OLMoE-1B-7B-0924"),
    ("mixtral-8x7b", 8, 2, 4096, 14336, "bf16", "config.json of mistralai/Mixtral-8x7B-v0.1"),
    ("mixtral-8x22b", 8, 2, 6144, 16384, "bf16", "config.json of mistralai/Mixtral-8x22B-v0.1"),
    ("qwen1.5-moe-a2.7b", 60, 4, 2048, 1408, "bf16", "config.json of Qwen/Qwen1.5-MoE-A2.7B"),
    ("qwen2-57b-a14b", 64, 8, 3584, 2560, "bf16", "config.json of Qwen/Qwen2-57B-A14B"),
    ("qwen3-30b-a3b", 128, 8, 2048, 768, "bf16", "config.json of Qwen/Qwen3-30B-A3B"),
    ("qwen3-235b-a22b", 128, 8, 4096, 1536, "bf16", "config.json of Qwen/Qwen3-235B-A22B"),
    ("qwen3-next-80b", 512, 10, 2048, 512, "bf16", "config.json of Qwen/Qwen3-Next-80B-A3B-Instruct"),
    ("qwen3.5-35b-a3b", 256, 8, 2048, 512, "bf16", "config.json of Qwen/Qwen3.5-35B-A3B"),
    ("deepseek-v2-lite", 64, 6, 2048, 1408, "bf16", "config.json of deepseek-ai/DeepSeek-V2-Lite"),
    ("deepseek-v3", 256, 8, 7168, 2048, "fp8", "config.json of deepseek-ai/DeepSeek-V3"),
    ("deepseek-v4-flash", 256, 6, 4096, 2048, "mxfp4", "public tables of DeepSeek-V4-Flash"),
    ("deepseek-v4-pro", 384, 6, 7168, 3072, "mxfp4", "public tables of DeepSeek-V4-Pro"),
    ("deepseek-v4.1-flash", 384, 6, 5120, 2304, "mxfp4", "public tables of DeepSeek-V4.1-Flash"),
    ("glm-4.5-air", 128, 8, 4096, 1408, "bf16", "config.json of zai-org/GLM-4.5-Air"),
    ("glm-4.5", 160, 8, 5120, 1536, "bf16", "config.json of zai-org/GLM-4.5"),
    ("gpt-oss-20b", 32, 4, 2880, 2880, "mxfp4", "config.json of openai/gpt-oss-20b"),
    ("gpt-oss-120b", 128, 4, 2880, 2880, "mxfp4", "config.json of openai/gpt-oss-120b"),
    ("phi-3.5-moe", 16, 2, 4096, 6400, "bf16", "config.json of microsoft/Phi-3.5-MoE-instruct"),
    ("llama-4-scout", 16, 1, 5120, 8192, "bf16", "config.json of meta-llama/Llama-4-Scout-17B-16E"),
    ("kimi-k2", 384, 8, 7168, 2048, "fp8", "config.json of moonshotai/Kimi-K2-Instruct"),
    ("kimi-k3", 896, 16, 3584, 3072, "mxfp4", "public tables of Kimi-K3"),
)
_ALSO: Mapping[str, tuple[str, ...]] = {
    "glm-4.5": ("fp8-channel",),
    "glm-4.5-air": ("fp8-channel",),
    "kimi-k2": ("int4-g32",),
}
"""Further formats in which the makers published a model: the FP8 checkpoints of GLM-4.5, and Kimi-K2 since Thinking."""


_REPOSITORIES: Mapping[str, str] = {
    "olmoe-1b-7b": """
        allenai/OLMoE-1B-7B-0924 allenai/OLMoE-1B-7B-0924-Instruct allenai/OLMoE-1B-7B-0125
        allenai/OLMoE-1B-7B-0125-Instruct""",
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1 mistralai/Mixtral-8x7B-Instruct-v0.1",
    "mixtral-8x22b": "mistralai/Mixtral-8x22B-v0.1 mistralai/Mixtral-8x22B-Instruct-v0.1",
    "qwen1.5-moe-a2.7b": "Qwen/Qwen1.5-MoE-A2.7B Qwen/Qwen1.5-MoE-A2.7B-Chat",
    "qwen2-57b-a14b": "Qwen/Qwen2-57B-A14B Qwen/Qwen2-57B-A14B-Instruct",
    "qwen3-30b-a3b": """
        Qwen/Qwen3-30B-A3B Qwen/Qwen3-30B-A3B-Base Qwen/Qwen3-30B-A3B-FP8=fp8 Qwen/Qwen3-30B-A3B-Instruct-2507
        Qwen/Qwen3-30B-A3B-Instruct-2507-FP8=fp8 Qwen/Qwen3-30B-A3B-Thinking-2507 Qwen/Qwen3-Coder-30B-A3B-Instruct""",
    "qwen3-235b-a22b": """
        Qwen/Qwen3-235B-A22B Qwen/Qwen3-235B-A22B-FP8=fp8 Qwen/Qwen3-235B-A22B-Instruct-2507
        Qwen/Qwen3-235B-A22B-Thinking-2507""",
    "qwen3-next-80b": "Qwen/Qwen3-Next-80B-A3B-Instruct Qwen/Qwen3-Next-80B-A3B-Thinking",
    "qwen3.5-35b-a3b": "Qwen/Qwen3.5-35B-A3B",
    "deepseek-v2-lite": "deepseek-ai/DeepSeek-V2-Lite deepseek-ai/DeepSeek-V2-Lite-Chat",
    "deepseek-v3": """
        deepseek-ai/DeepSeek-V3 deepseek-ai/DeepSeek-V3-0324 deepseek-ai/DeepSeek-V3.1 deepseek-ai/DeepSeek-V3.2-Exp
        deepseek-ai/DeepSeek-R1 deepseek-ai/DeepSeek-R1-0528""",
    "glm-4.5-air": "zai-org/GLM-4.5-Air zai-org/GLM-4.5-Air-FP8=fp8-channel",
    "glm-4.5": "zai-org/GLM-4.5 zai-org/GLM-4.5-FP8=fp8-channel",
    "gpt-oss-20b": "openai/gpt-oss-20b",
    "gpt-oss-120b": "openai/gpt-oss-120b",
    "phi-3.5-moe": "microsoft/Phi-3.5-MoE-instruct",
    "llama-4-scout": "meta-llama/Llama-4-Scout-17B-16E meta-llama/Llama-4-Scout-17B-16E-Instruct",
    "kimi-k2": "moonshotai/Kimi-K2-Instruct moonshotai/Kimi-K2-Base moonshotai/Kimi-K2-Thinking=int4-g32",
}
"""Checkpoints on Hugging Face by model, each with its format behind "=" if that is not the release's."""


def _repositories(name: str, dtype: str) -> dict[str, str]:
    """Formats by id."""
    parted = (entry.partition("=") for entry in _REPOSITORIES.get(name, "").split())
    return {repository: form or dtype for repository, _, form in parted}


@hookimpl
def ramp_moe_models() -> Iterable[Model]:
    for name, experts, top_k, hidden, intermediate, dtype, source in _MODELS:
        shape = MoEShape(experts, top_k, hidden, intermediate, dtype, name)
        yield Model(shape, source, _ALSO.get(name, ()), _repositories(name, dtype))


@hookimpl
def ramp_moe_hardware() -> Iterable[Hardware]:
    return GPUS


@hookimpl
def ramp_moe_profiles() -> Iterable[Path]:
    yield Path(str(resources.files("ramp_moe_profiles")))
