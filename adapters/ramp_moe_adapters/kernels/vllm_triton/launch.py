"""Calls vLLM's `fused_experts` with one configuration, and has it skip ids that are out of range.

It has no argument for its output (vllm 0.33 dropped `inplace`), so the result is copied. By this copy, and by the
launch that treats the ids, a path here takes longer than in vLLM's own layer.

For ids out of range, vllm 0.33 silently computes wrong results:

- Up to E / 4 routed ids, its GEMM skips -1 alone. It takes any other id for an expert: E reads past the weights.
- Above, `moe_align_block_size` leaves the id out. The GEMMs never write its rows of an uninitialised buffer, and
  `moe_sum` adds them.

So one small launch before gives such an id weight 0, and an expert that its token visits anyway. If a token visits no
expert, its output is set to zero when the result is copied, whatever its hidden state holds.
"""
# Triton is untyped, and so is every function that it compiles.
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import contextlib
import importlib
import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from ramp_moe.plugin import Batch, KernelConfig, KernelError, MoEWeights, Workspace
from ramp_moe.spec.checks import check_batch
from torch import Tensor

PACKAGE = "vllm.model_executor.layers.fused_moe"
ACTIVATIONS = {"swiglu": "SILU", "gelu_tanh": "GELU_TANH"}
"""Members of vLLM's MoEActivation for gate-first rows, by our names.

Its SWIGLUOAI takes interleaved rows. The one for gate-first rows needs a limit, which `fused_experts` does not pass on.
"""
TOKENS = 64
"""Tokens of one program of the routing kernel."""

_override = threading.Lock()
"""Held while vLLM's global configuration is set to one of ours."""


@dataclass(frozen=True, slots=True)
class PreparedVllmTriton:
    """The weights that were given, and vLLM's functions.

    arguments: of fused_experts, the same for every batch.
    zeros: a zero `[]` in each dtype of hidden states.
    """

    weights: MoEWeights
    fused_experts: Callable[..., Tensor]
    override_config: Callable[..., contextlib.AbstractContextManager[Any]]
    arguments: Mapping[str, Any]
    zeros: Mapping[torch.dtype, Tensor]


def prepare(weights: MoEWeights) -> PreparedVllmTriton:
    if weights.activation not in ACTIVATIONS:
        raise KernelError(f"vllm_triton computes {' and '.join(ACTIVATIONS)}, not {weights.activation}")
    try:
        package, config = importlib.import_module(PACKAGE), importlib.import_module(f"{PACKAGE}.config")
    except Exception as e:  # whatever a package does when it is imported without its GPU or with another torch
        raise KernelError(f"vllm cannot be imported ({type(e).__name__}: {e})") from e
    arguments = {
        "w1": weights.gate_up,
        "w2": weights.down,
        "activation": getattr(_attribute(package, "MoEActivation"), ACTIVATIONS[weights.activation]),
        "quant_config": quant_config(weights, config),
    }
    return PreparedVllmTriton(
        weights,
        _function(package, "fused_experts", ("hidden_states", "topk_weights", "topk_ids", *arguments)),
        _function(package, "override_config", ("config",)),
        arguments,
        {dtype: torch.zeros((), dtype=dtype, device=weights.down.device) for dtype in (torch.bfloat16, torch.float16)},
    )


def quant_config(weights: MoEWeights, config: Any) -> Any:
    """vLLM's configuration of the weights' scales and biases; None if they have neither.

    config: the module that makes it. Raises KernelError for scales that vLLM's Triton path does not take, and for
    blocks that it counts in another way.
    """
    biases = {"w1_bias": weights.gate_up_bias, "w2_bias": weights.down_bias}
    if weights.gate_up_scale is not None:
        given = {"w1_scale": weights.gate_up_scale, "w2_scale": weights.down_scale, **biases}
        if weights.stored.weights == "fp8-channel":
            rows = {"per_act_token_quant": True, "per_out_ch_quant": True}
            return _function(config, "fp8_w8a8_moe_quant_config", (*given, *rows))(**given, **rows)
        if weights.stored.weights != "fp8":
            raise KernelError(f"vLLM's Triton path takes fp8 with scales of blocks or rows, not {weights.stored.name}")
        make = _function(config, "fp8_w8a8_moe_quant_config", (*given, "block_shape"))
        block, inter = weights.scale_block, weights.down.shape[2]
        if block is None or inter % block:
            raise KernelError(
                f"vLLM counts scale blocks over gate and up together: {inter} is not a multiple of {block}"
            )
        return make(**given, block_shape=[block, block])
    if any(b is not None for b in biases.values()):
        return _function(config, "biased_moe_quant_config", tuple(biases))(**biases)
    return None


def _attribute(module: Any, name: str) -> Any:
    if not hasattr(module, name):
        raise KernelError(f"the installed vllm has no {module.__name__}.{name}, which this adapter uses")
    return getattr(module, name)


def _function(module: Any, name: str, passed: tuple[str, ...]) -> Callable[..., Any]:
    """The function of this name. Raises KernelError if it lacks one of the arguments, or requires others."""
    function: Callable[..., Any] = _attribute(module, name)
    parameters = inspect.signature(function).parameters.values()
    needed = {p.name for p in parameters if p.default is p.empty}
    for what, names in (("does not take", set(passed) - {p.name for p in parameters}), ("needs", needed - set(passed))):
        if names:
            raise KernelError(
                f"the installed vllm's {name} {what} {', '.join(sorted(names))}: it is of another version than this "
                "adapter was written for"
            )
    return function


def launch(config: KernelConfig, prepared: PreparedVllmTriton, batch: Batch, out: Tensor, workspace: Workspace) -> None:
    _check(batch, out, prepared.weights)
    x = batch.hidden_states
    # Triton and vLLM launch on the current device, whichever x is on.
    with torch.cuda.device(x.get_device()) if x.is_cuda else contextlib.nullcontext():
        ids, weights, routed = routing(batch, len(prepared.weights.gate_up), workspace)
        result = _run(prepared, dict(config.params), hidden_states=x, topk_weights=weights, topk_ids=ids)
        torch.where(routed[:, None], result, prepared.zeros[x.dtype], out=out)


def _run(prepared: PreparedVllmTriton, config: dict[str, Any], **batch: Tensor) -> Tensor:
    """Call fused_experts under a configuration.

    vLLM's override_config does not restore the old one after an exception, so none may pass through it.
    """
    outcome: Tensor | BaseException
    with _override, prepared.override_config(config):
        try:
            outcome = prepared.fused_experts(**batch, **prepared.arguments)
        except BaseException as e:
            outcome = e
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _check(batch: Batch, out: Tensor, weights: MoEWeights) -> None:
    x = batch.hidden_states
    if weights.gate_up_scale is None and x.dtype != weights.gate_up.dtype:
        raise KernelError(f"vllm_triton: hidden_states are {x.dtype}, the weights {weights.gate_up.dtype}")
    check_batch("vllm_triton", batch, out, weights.gate_up.shape[2], weights.gate_up.device)


@triton.jit(do_not_specialize=["num_tokens", "num_experts"])
def routing_kernel(
    topk_ids,  # [tokens, TOP_K]
    topk_weights,  # [tokens, TOP_K]
    ids,  # [tokens, TOP_K]
    weights,  # [tokens, TOP_K]
    routed,  # uint8 [tokens]
    num_tokens,
    num_experts,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,  # TOP_K rounded up to a power of two
    BLOCK: tl.constexpr,
):
    """Replace ids out of range by the token's largest valid one, or 0 if it has none, and their weights by 0."""
    token, slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    inside = (token < num_tokens)[:, None] & (slot < TOP_K)[None, :]
    at = token[:, None] * TOP_K + slot[None, :]
    given = tl.load(topk_ids + at, mask=inside, other=-1)
    valid = (given >= 0) & (given < num_experts)
    largest = tl.max(tl.where(valid, given, -1), 1)
    tl.store(ids + at, tl.where(valid, given, tl.maximum(largest, 0)[:, None]), mask=inside)
    tl.store(weights + at, tl.load(topk_weights + at, mask=inside & valid, other=0.0), mask=inside)
    tl.store(routed + token, (largest >= 0).to(tl.uint8), mask=token < num_tokens)


def routing(batch: Batch, num_experts: int, workspace: Workspace) -> tuple[Tensor, Tensor, Tensor]:
    """Replace ids out of range, and set their weights to 0.

    Returns ids int32 `[T, k]`, all in range; weights float32 `[T, k]`; and bool `[T]`, whether a token visits any
    expert.
    """
    tokens, top_k = batch.topk_ids.shape
    device = batch.topk_ids.device
    ids = workspace.get("ids", (tokens, top_k), torch.int32, device)
    weights = workspace.get("weights", (tokens, top_k), torch.float32, device)
    routed = workspace.get("routed", (tokens,), torch.uint8, device)
    routing_kernel[(triton.cdiv(tokens, TOKENS),)](
        batch.topk_ids,
        batch.topk_weights,
        ids,
        weights,
        routed,
        tokens,
        num_experts,
        TOP_K=top_k,
        WIDTH=triton.next_power_of_2(top_k),
        BLOCK=TOKENS,
    )
    return ids, weights, routed.view(torch.bool)
