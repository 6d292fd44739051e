"""Calls FlashInfer's `cutlass_fused_moe` with a configuration's two tactics, in memory of a workspace.

If a token names an expert twice, FlashInfer's routing of many tokens counts it once. For the second id it then reads a
row that was never written. So for batches with this routing, one small launch before merges equal ids. FlashInfer skips
ids outside the experts in any routing.
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
from ramp_moe.runtime.relayout import relayout
from ramp_moe.spec.checks import check_aligned, check_batch, check_bf16, check_hopper
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import build as module
from .config import ALIGNMENT, COUNTS, LAYOUT

PACKAGE = "flashinfer.fused_moe"
ARCH = "90"
ONE_BLOCK_TOP_K = (1, 2, 4, 6, 8)
"""Values of top_k with which FlashInfer can route in one block. That routing takes every id by itself."""
ONE_BLOCK = ((256, 254), (128, 510))
"""Pairs (most tokens, most experts) up to which it does. The block's shared memory sets these limits."""
TOKENS = 64
"""Tokens of one program of the merging kernel."""

_lock = threading.Lock()
"""Held from the question for a workspace's size to the launch.

In fp8, FlashInfer's runner remembers the largest batch in any question, and expects a workspace for that one.
"""


@dataclass(frozen=True, slots=True)
class PreparedFlashInfer:
    """The weights with up rows first, and FlashInfer's two functions with the arguments that every batch shares.

    arguments: of fused_moe. sizes: of workspace_size.
    """

    weights: MoEWeights
    fused_moe: Callable[..., Any]
    workspace_size: Callable[..., int]
    arguments: Mapping[str, Any]
    sizes: Mapping[str, Any]


def prepare(weights: MoEWeights) -> PreparedFlashInfer:
    fp8, dtype = weights.gate_up_scale is not None, weights.gate_up.dtype
    if dtype not in (torch.float8_e4m3fn, torch.bfloat16):
        raise KernelError(f"flashinfer_cutlass takes bf16 or fp8 block-scaled weights, not {dtype}")
    if weights.activation != "swiglu":
        raise KernelError(f"flashinfer_cutlass computes swiglu only, not {weights.activation}")
    experts, hidden, inter = weights.down.shape
    if hidden % ALIGNMENT or inter % ALIGNMENT:
        raise KernelError(
            f"flashinfer_cutlass: hidden_size {hidden} and intermediate_size {inter} must be multiples of {ALIGNMENT}"
        )
    check_hopper("flashinfer_cutlass", weights.gate_up.device)
    weights = relayout(weights, LAYOUT)
    for name in ("gate_up", "down"):
        check_aligned("flashinfer_cutlass", name, getattr(weights, name))
    arguments = {
        "fc1_expert_weights": weights.gate_up,
        "fc2_expert_weights": weights.down,
        "output_dtype": torch.bfloat16,
        "quant_scales": [weights.gate_up_scale, weights.down_scale] if fp8 else [],
        **_biases(weights),
        "use_deepseek_fp8_block_scale": fp8,
    }
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_experts_total": experts,
        "x_dtype": torch.bfloat16,
        "weight_dtype": dtype,
        "use_deepseek_fp8_block_scale": fp8,
        "device": weights.gate_up.device,
    }
    if fp8 and (reason := module.fp8_problem()):
        raise KernelError(reason)
    core = library()
    if not fp8:
        check_tactics(core)
    batch = ("input", "token_selected_experts", "token_final_scales", "output", "profile_ids", "workspace_buffer")
    return PreparedFlashInfer(
        weights,
        _function(core, "cutlass_fused_moe", (*batch, *arguments)),
        _function(core, "cutlass_fused_moe_workspace_size", ("max_num_tokens", "top_k", *sizes)),
        arguments,
        sizes,
    )


def _biases(weights: MoEWeights) -> dict[str, Tensor]:
    """The arguments of both biases in bf16, or of neither: FlashInfer does not take a single one."""
    given = {"fc1_expert_biases": weights.gate_up_bias, "fc2_expert_biases": weights.down_bias}
    if all(b is None for b in given.values()):
        return {}
    missing = torch.zeros(1, dtype=torch.bfloat16, device=weights.down.device)
    rows = (w.shape[:2] for w in (weights.gate_up, weights.down))
    biases = ((missing if b is None else b).expand(shape) for b, shape in zip(given.values(), rows, strict=True))
    return dict(zip(given, (b.to(torch.bfloat16).contiguous() for b in biases), strict=True))


def library() -> Any:
    """The package flashinfer.fused_moe.core, once its module is compiled. Raises KernelError if it cannot be loaded."""
    if reason := module.problem():
        raise KernelError(reason)
    if not module.ready():
        module.announced()
    try:
        core = importlib.import_module(f"{PACKAGE}.core")
        core.get_cutlass_fused_moe_module(ARCH)
    except Exception as e:  # a package that looks for a compiler, makes folders and loads a library
        raise KernelError(f"flashinfer cannot be loaded ({type(e).__name__}: {e})") from e
    return core


def check_tactics(core: Any) -> None:
    """Raises KernelError if the module's number of tactics is not the one that this adapter knows."""
    runner = (
        core.get_cutlass_fused_moe_module(ARCH)
        .MoERunner(
            x_dtype=torch.bfloat16,
            weight_dtype=torch.bfloat16,
            output_dtype=torch.bfloat16,
            top_k=1,
            **dict.fromkeys(("tp_size", "ep_size", "cluster_size"), 1),
            **dict.fromkeys(("tp_rank", "ep_rank", "cluster_rank"), 0),
            **dict.fromkeys(("enable_alltoall", "use_deepseek_fp8_block_scale", "use_w4_group_scaling"), False),
            **dict.fromkeys(("use_mxfp8_act_scaling", "min_latency_mode", "use_packed_weights"), False),
            enable_pdl=True,
            activation_type=core.ActivationType.Swiglu,
            use_fused_finalize=True,
            use_wfp4afp8_humming=False,
        )
        .fused_moe_runner
    )
    found = runner.get_gemm1_tactic_count(), runner.get_gemm2_tactic_count()
    if found != COUNTS:
        raise KernelError(
            f"flashinfer's module has {found[0]} + {found[1]} tactics for bf16, this adapter knows the order of "
            f"{COUNTS[0]} + {COUNTS[1]}: it is of another version"
        )


def _function(core: Any, name: str, passed: tuple[str, ...]) -> Callable[..., Any]:
    """The function of this name. Raises KernelError if it does not take all of the arguments by name."""
    function: Callable[..., Any] | None = getattr(core, name, None)
    if function is None:
        raise KernelError(f"the installed flashinfer has no {name}, which this adapter uses")
    if unknown := set(passed) - set(inspect.signature(function).parameters):
        raise KernelError(f"the installed flashinfer's {name} does not take {', '.join(sorted(unknown))}")
    return function


def launch(config: KernelConfig, prepared: PreparedFlashInfer, batch: Batch, out: Tensor, workspace: Workspace) -> None:
    _check(batch, out, prepared.weights)
    x, experts, tactics = batch.hidden_states, len(prepared.weights.down), dict(config.params)
    # In fp8 there are no tactics, and these are ignored: so the autotuner is not asked.
    profile_ids = [tactics.get("gemm1", -1), tactics.get("gemm2", -1)]
    with torch.cuda.device(x.get_device()) if x.is_cuda else contextlib.nullcontext():
        ids, weights = batch.topk_ids, batch.topk_weights
        if not routed_in_one_block(batch.num_tokens, batch.top_k, experts):
            ids, weights = merged(batch, workspace)
        with _lock:
            size = prepared.workspace_size(max_num_tokens=batch.num_tokens, top_k=batch.top_k, **prepared.sizes)
            buffer = workspace.get("flashinfer", (size,), torch.uint8, x.device)
            with FromWorkspace(workspace):
                prepared.fused_moe(
                    input=x,
                    token_selected_experts=ids,
                    token_final_scales=weights,
                    output=out,
                    profile_ids=profile_ids,
                    workspace_buffer=buffer,
                    **prepared.arguments,
                )


class FromWorkspace(TorchFunctionMode):
    """Context in which `torch.empty` takes its memory from a workspace.

    FlashInfer's wrapper allocates in each call what only its low-latency mode uses. A graph would keep that memory.
    """

    def __init__(self, workspace: Workspace) -> None:
        super().__init__()
        self._workspace, self._served = workspace, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is not torch.empty or set(given) != {"dtype", "device"} or len(args) != 1:
            return func(*args, **given)
        self._served += 1
        return self._workspace.get(f"flashinfer{self._served}", args[0], given["dtype"], torch.device(given["device"]))


def _check(batch: Batch, out: Tensor, weights: MoEWeights) -> None:
    check_bf16("flashinfer_cutlass", batch, out)
    check_batch("flashinfer_cutlass", batch, out, weights.down.shape[1], weights.down.device)
    for name, tensor in (("hidden_states", batch.hidden_states), ("out", out)):
        check_aligned("flashinfer_cutlass", name, tensor)


def routed_in_one_block(num_tokens: int, top_k: int, experts: int) -> bool:
    """Whether FlashInfer routes a batch in one block, which takes every id by itself."""
    fits = any(num_tokens <= tokens and experts <= most for tokens, most in ONE_BLOCK)
    return fits and top_k in ONE_BLOCK_TOP_K


@triton.jit(do_not_specialize=["num_tokens"])
def merging_kernel(
    topk_ids,  # [tokens, TOP_K]
    topk_weights,  # [tokens, TOP_K]
    ids,  # [tokens, TOP_K]
    weights,  # [tokens, TOP_K]
    num_tokens,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,  # TOP_K rounded up to a power of two
    BLOCK: tl.constexpr,
):
    """Replace a token's repeated ids by -1, and add their weights to that of the first one."""
    token, slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    inside = (token < num_tokens)[:, None] & (slot < TOP_K)[None, :]
    at = token[:, None] * TOP_K + slot[None, :]
    given = tl.load(topk_ids + at, mask=inside, other=-1)
    total = tl.zeros([BLOCK, WIDTH], tl.float32)
    before = tl.zeros([BLOCK, WIDTH], tl.int1)
    for other in tl.static_range(TOP_K):
        expert = tl.load(topk_ids + token * TOP_K + other, mask=token < num_tokens, other=-1)
        weight = tl.load(topk_weights + token * TOP_K + other, mask=token < num_tokens, other=0.0)
        same = given == expert[:, None]
        total += tl.where(same, weight[:, None], 0.0)
        before = before | (same & (slot > other)[None, :])
    tl.store(ids + at, tl.where(before, -1, given), mask=inside)
    tl.store(weights + at, total, mask=inside)


def merged(batch: Batch, workspace: Workspace) -> tuple[Tensor, Tensor]:
    """Merge equal ids of a token. Returns ids int32 `[T, k]` that name no expert twice, and weights float32
    `[T, k]`."""
    tokens, top_k = batch.topk_ids.shape
    ids = workspace.get("ids", (tokens, top_k), torch.int32, batch.topk_ids.device)
    weights = workspace.get("weights", (tokens, top_k), torch.float32, batch.topk_ids.device)
    merging_kernel[(triton.cdiv(tokens, TOKENS),)](
        batch.topk_ids,
        batch.topk_weights,
        ids,
        weights,
        tokens,
        TOP_K=top_k,
        WIDTH=triton.next_power_of_2(top_k),
        BLOCK=TOKENS,
    )
    return ids, weights
