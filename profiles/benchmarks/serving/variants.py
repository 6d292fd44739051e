"""The variants to compare: an engine's own choice of kernels for experts, its backends, and ramp_moe's plugin."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ramp_moe.spec.formats import FORMATS

ENGINES = ("vllm", "sglang")
STOCK, PLUGIN, WITHOUT_EXPERTS = "stock", "plugin", "without_experts"
REFERENCE = "float32"
"""Name of the engine in float32, with which log-probabilities are compared. It cannot be asked for as a variant."""
MAX_BATCH = 256
MAX_BATCHED_TOKENS = 8192
MAX_LENGTH = 9216
GRAPH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
REFERENCE_TOKENS = 16384


@dataclass(frozen=True)
class Variant:
    """An engine to start.

    arguments: of its Python class.
    server: options of its HTTP server.
    variables: of its environment.
    """

    name: str
    arguments: Mapping[str, Any]
    server: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Served:
    """A model to serve.

    folder: of the model.
    plain: folder of the same model without quantisation.
    dtype: of the experts, one of FORMATS.
    tokens: for whose keys and values an engine has memory.
    token_bytes: of one token's keys and values.
    expert_parameters: number of parameters of all experts.
    """

    folder: str
    plain: str
    dtype: str
    tokens: int
    token_bytes: int
    expert_parameters: int

    def gib(self, name: str) -> float:
        """About the GiB of GPU memory of a variant, for experts, keys and values."""
        if name == REFERENCE:
            return (4 * self.expert_parameters + 2 * REFERENCE_TOKENS * self.token_bytes) / 2**30
        return (FORMATS[self.dtype].bits / 8 * self.expert_parameters + self.tokens * self.token_bytes) / 2**30


def variant(engine: str, name: str, served: Served) -> Variant:
    """Make the variant of this name: STOCK, PLUGIN, WITHOUT_EXPERTS, REFERENCE, or one of the engine's backends."""
    return {"vllm": _vllm, "sglang": _sglang}[engine](name, served)


def compiled(name: str) -> Path:
    """Folder in which vLLM keeps what it compiles for a variant. Each has its own, since they start together."""
    root = os.environ.get("VLLM_CACHE_ROOT") or Path.home() / ".cache" / "vllm"
    return Path(root, f"serving-{name}")


def _vllm(name: str, served: Served) -> Variant:
    reference = name == REFERENCE
    tokens = REFERENCE_TOKENS if reference else served.tokens
    arguments: dict[str, Any] = {
        "model": served.plain if reference else served.folder,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": MAX_LENGTH,
        "max_num_seqs": MAX_BATCH,
        "max_num_batched_tokens": MAX_BATCHED_TOKENS,
        "kv_cache_memory_bytes": tokens * served.token_bytes * (2 if reference else 1),
        "gpu_memory_utilization": 0.02,  # checked against what is free, though the cache's size is given
        "disable_log_stats": False,
        "enable_prefix_caching": False,
        "seed": 0,
        "dtype": "float32" if reference else "bfloat16",
        "worker_extension_cls": "vllm_worker.Extension",
    }
    if reference:
        arguments |= {"enforce_eager": True, "max_num_seqs": 32}
    else:
        arguments["compilation_config"] = {"cudagraph_capture_sizes": list(GRAPH_SIZES)}
        if served.dtype == "fp8":
            arguments["linear_backend"] = "cutlass"  # the same in all, so that the experts alone differ
    if name not in (STOCK, PLUGIN, WITHOUT_EXPERTS, REFERENCE):
        arguments["moe_backend"] = name
    variables = {
        "RAMP_MOE_VLLM": "1" if name == PLUGIN else "0",
        "VLLM_CACHE_ROOT": str(compiled(name)),
        "VLLM_DEEP_GEMM_WARMUP": "skip",
    }
    own = ("load_format", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization")
    own += ("kv_cache_memory_bytes", "worker_extension_cls", "linear_backend", "moe_backend")
    server = [x for o in own if o in arguments for x in (f"--{o.replace('_', '-')}", str(arguments[o]))]
    server.append("--no-enable-prefix-caching")
    return Variant(name, arguments, tuple(server), variables | _of_worker(name, served))


def _sglang(name: str, served: Served) -> Variant:
    reference = name == REFERENCE
    arguments: dict[str, Any] = {
        "model_path": served.plain if reference else served.folder,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "context_length": MAX_LENGTH,
        "max_running_requests": 32 if reference else MAX_BATCH,
        "max_total_tokens": REFERENCE_TOKENS if reference else served.tokens,
        "mem_fraction_static": 0.9,
        "disable_radix_cache": True,
        "random_seed": 1,
    }
    if name not in (STOCK, WITHOUT_EXPERTS, REFERENCE):
        arguments["moe_runner_backend"] = "ramp_moe" if name == PLUGIN else name
    if reference:
        arguments |= {"dtype": "float32", "disable_cuda_graph": True, "attention_backend": "triton"}
    server = []
    for option, value in arguments.items():
        server.append(f"--{option.replace('_', '-')}")
        server += [] if value is True else [str(value)]
    return Variant(name, arguments, tuple(server), _of_worker(name, served))


def _of_worker(name: str, served: Served) -> dict[str, str]:
    """The variables of a variant that `in_worker.py` reads."""
    of: dict[str, dict[str, str]] = {
        REFERENCE: {"SERVING_ROUNDED": served.dtype},
        WITHOUT_EXPERTS: {"SERVING_WITHOUT_EXPERTS": "1"},
    }
    return of.get(name, {})
