"""The deterministic combine: every token's output is the sum of its routed ids' rows, always in the same order."""
# Triton is untyped, and so is every function that it compiles.
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ramp_moe.plugin import KernelError, ShapeError
from ramp_moe.spec.checks import check_gpu, check_tensor
from torch import Tensor

from .launch import dependent_launch, on_device_of
from .quantise import DTYPES, interpreted

FEW_ELEMENTS = 256 * 1024
"""Output elements up to which narrow programs are needed for all SMs to have some."""


@triton.jit(do_not_specialize=["num_ids", "num_experts"])
def combine_kernel(
    partial,  # [SPLIT_K, num_ids, hidden]
    topk_ids,  # [tokens, TOP_K], or None: no id is skipped
    num_valid,  # int32 [1], or None: every token counts
    out,  # [tokens, hidden]
    num_ids,
    hidden,
    num_experts,
    TOP_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Combine BLOCK columns of one token; the programs are (token, columns).

    Rows of skipped ids were never written, so they are not loaded: a NaN there would survive a multiplication by zero.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)  # elements can exceed 2^31
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    if num_valid is not None:
        inside = inside & (token < tl.load(num_valid))
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(TOP_K):
        row = token * TOP_K + slot
        live = inside
        if topk_ids is not None:
            expert = tl.load(topk_ids + row)
            live = inside & (expert >= 0) & (expert < num_experts)
        for split in tl.static_range(SPLIT_K):
            at = (row + split * num_ids) * hidden
            total += tl.load(partial + at + column, mask=live, other=0.0).to(tl.float32)
    tl.store(out + token * hidden + column, total.to(out.dtype.element_ty), mask=column < hidden)


def combine(
    partial: Tensor,
    topk_ids: Tensor | None,
    out: Tensor,
    *,
    num_experts: int | None = None,
    num_valid: Tensor | None = None,
) -> None:
    """Write out `[T, H]`: each token's sum over its k rows of `partial`, which contain the routing weights already.

    partial: `[n, H]` with n = T * k, or `[S, n, H]` with S partial sums per id.
    topk_ids: int32 or int64 `[T, k]`, given with num_experts. Rows of ids outside [0, num_experts) are neither read nor
        added. None: all rows count.
    num_valid: int32 `[1]` on the device. Tokens from there on become 0.

    partial and out are bf16, fp16 or float32, and contiguous. The sums are in float32, always in the same order: an
    id's S sums, then the next id's. The result is cast once, so equal inputs give equal bits. Without tokens nothing is
    launched. Raises ShapeError for shapes that do not fit, KernelError for wrong dtypes, strides and devices.
    """
    if partial.ndim not in (2, 3) or out.ndim != 2:
        raise ShapeError(
            f"combine sums [n, H] or [S, n, H] into [T, H], not {list(partial.shape)} into {list(out.shape)}"
        )
    tokens, hidden = out.shape
    num_ids = partial.shape[-2]
    if num_ids % tokens if tokens else num_ids:
        raise ShapeError(f"{num_ids} partial rows do not divide among {tokens} tokens")
    check_tensor("the partial sums", partial, (*partial.shape[:-1], hidden), DTYPES, out.device)
    check_tensor("the output", out, (tokens, hidden), DTYPES, out.device)
    if out.numel() == 0:
        return
    top_k = num_ids // tokens
    if topk_ids is not None:
        if num_experts is None:
            raise KernelError("combine needs num_experts beside topk_ids: ids from num_experts on are skipped")
        check_tensor("topk_ids", topk_ids, (tokens, top_k), (torch.int32, torch.int64), out.device)
    if num_valid is not None:
        check_tensor("num_valid", num_valid, (1,), (torch.int32,), out.device)
    if not interpreted(combine_kernel):
        check_gpu("the output", out)
    launch_combine(partial, topk_ids, out, top_k, num_experts if topk_ids is not None else 0, num_valid)


def launch_combine(
    partial: Tensor,
    topk_ids: Tensor | None,
    out: Tensor,
    top_k: int,
    num_experts: int | None,
    num_valid: Tensor | None = None,
) -> None:
    """Do what `combine` does, without checks. There must be at least one token."""
    tokens, hidden = out.shape
    block, warps = columns_of_program(tokens * hidden)
    with on_device_of(out):
        combine_kernel[(tokens, -(-hidden // block))](
            partial,
            topk_ids,
            num_valid,
            out,
            partial.shape[-2],
            hidden,
            num_experts,
            TOP_K=top_k,
            SPLIT_K=partial.shape[0] if partial.ndim == 3 else 1,
            BLOCK=block,
            num_warps=warps,
            **dependent_launch(out.device),
        )


def columns_of_program(elements: int) -> tuple[int, int]:
    """Columns and warps of a program, by the number of the output's elements."""
    return (256, 1) if elements <= FEW_ELEMENTS else (1024, 4)
