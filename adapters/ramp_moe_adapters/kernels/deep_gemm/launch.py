"""Computes a batch with DeepGEMM: permute, up, activation, down, unpermute.

DeepGEMM's settings belong to the process, and are read when a GEMM is launched. So this library sets, uses and restores
them under one lock.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from ramp_moe.plugin import Batch, KernelConfig, KernelError, MoEShape, MoEWeights, Workspace
from ramp_moe.runtime.relayout import relayout
from ramp_moe.spec.checks import check_batch, check_bf16, check_hopper
from ramp_moe_kernels.limits import check_tokens
from ramp_moe_kernels.permute.permute import permute
from ramp_moe_kernels.permute.unpermute import activate, unpermute
from torch import Tensor

from .config import most_tokens

NEEDED = (
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_bf16_gemm_nt_contiguous",
    "set_num_sms",
    "get_num_sms",
    "set_mk_alignment_for_contiguous_layout",
    "get_mk_alignment_for_contiguous_layout",
    "set_pdl",
    "get_pdl",
)
MULTIPLE = "set_block_size_multiple_of"

_lock = threading.RLock()


@dataclass(frozen=True, slots=True)
class PreparedDeepGEMM:
    weights: MoEWeights
    library: Any


def prepare(weights: MoEWeights) -> PreparedDeepGEMM:
    device = weights.gate_up.device
    if weights.gate_up.dtype not in (torch.float8_e4m3fn, torch.bfloat16):
        raise KernelError(f"deep_gemm takes fp8 block-scaled or bf16 weights, not {weights.gate_up.dtype}")
    check_hopper("deep_gemm", device)
    if weights.gate_up_scale is not None and weights.layout == "gate-up-interleaved-8":
        weights = relayout(weights, "gate-first")
    return PreparedDeepGEMM(weights, library())


def library() -> Any:
    """The module deep_gemm. Raises KernelError if it cannot be loaded, or lacks a function that is needed."""
    try:
        module = importlib.import_module("deep_gemm")
    except Exception as e:  # it loads a library, looks for a compiler and makes folders
        raise KernelError(f"deep_gemm cannot be loaded ({type(e).__name__}: {e})") from e
    if lacking := [name for name in NEEDED if not hasattr(module, name)]:
        raise KernelError(f"the installed deep_gemm has no {', '.join(lacking)}; install a tested version")
    return module


def launch_steps(
    config: KernelConfig, prepared: PreparedDeepGEMM, batch: Batch, out: Tensor, workspace: Workspace
) -> Iterator[None]:
    """Launch a layer. Yields after each stage."""
    w, x = prepared.weights, batch.hidden_states
    experts, hidden, inter = w.down.shape
    fp8 = w.gate_up_scale is not None
    check_bf16("deep_gemm", batch, out)
    check_batch("deep_gemm", batch, out, hidden, w.down.device)

    def parameters() -> dict[str, Any]:
        params: dict[str, Any] = dict(config.params)
        shape = MoEShape(experts, batch.top_k, hidden, inter, "fp8" if fp8 else "bf16")
        check_tokens("deep_gemm", config.name, batch.num_tokens, most_tokens(params["block_m"], shape))
        return params

    p = workspace.plan("deep_gemm", (config, batch.topk_ids.shape, w.down.shape, w.down.dtype), x.device, parameters)
    block = p["block_m"]
    rows = permute(x, batch.topk_ids, experts, block, fp8, workspace)
    size = len(rows.values)
    yield
    gate_up = workspace.get("rows_gate_up", (size, 2 * inter), x.dtype, x.device)
    gemm(prepared, p, "up", rows.values, rows.scale, w.gate_up, w.gate_up_scale, gate_up, rows.ends)
    yield
    act, act_scale = activate(
        gate_up, w.gate_up_bias, batch.topk_ids, rows, fp8, w.layout, w.activation, w.limit, workspace
    )
    yield
    values = workspace.get("rows_out", (size, hidden), x.dtype, x.device)
    gemm(prepared, p, "down", act, act_scale, w.down, w.down_scale, values, rows.ends)
    yield
    unpermute(values, w.down_bias, batch, rows, out)
    yield


def gemm(
    prepared: PreparedDeepGEMM,
    params: dict[str, Any],
    which: str,
    a: Tensor,
    a_scale: Tensor | None,
    b: Tensor,
    b_scale: Tensor | None,
    out: Tensor,
    ends: Tensor,
) -> None:
    """Write out `[capacity, N]`: each expert's rows of a `[capacity, K]`, times its b `[N, K]` transposed.

    which: `up` or `down`, whose settings are taken. ends: each expert's end among the rows.
    """
    psum = {"use_psum_layout": True, "expected_m_for_psum_layout": params[f"{which}_expected_m"]}
    dg = prepared.library
    settings = _settings(dg, params["block_m"], params["num_sms"], params[f"{which}_multiple"])
    with settings, torch.cuda.device(a.get_device()):  # it takes the current device's stream
        if a_scale is not None:
            dg.m_grouped_fp8_gemm_nt_contiguous((a, a_scale.T), (b, b_scale), out, ends, **psum)
        else:
            dg.m_grouped_bf16_gemm_nt_contiguous(a, b, out, ends, **psum)


@contextlib.contextmanager
def _settings(dg: Any, block_m: int, num_sms: int, multiple: int) -> Iterator[None]:
    with _lock:
        before = dg.get_mk_alignment_for_contiguous_layout(), dg.get_num_sms(), dg.get_pdl()
        try:
            dg.set_mk_alignment_for_contiguous_layout(block_m)
            dg.set_num_sms(num_sms)
            # DeepGEMM's kernels wait for their inputs themselves, as ours do. So their prologues overlap our ends.
            dg.set_pdl(True)
            if multiple > 1:
                getattr(dg, MULTIPLE)((1, multiple))
            yield
        finally:
            dg.set_mk_alignment_for_contiguous_layout(before[0])
            dg.set_num_sms(before[1])
            dg.set_pdl(before[2])
            if multiple > 1:
                getattr(dg, MULTIPLE)((1, 1))
