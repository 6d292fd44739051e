"""Performance regions: which optimisation of a MoE kernel should pay, from the shape, the histogram and the hardware.

Four numbers describe where a launch stands (after RaMP, arXiv 2604.26039), for a CTA that covers ttn weight rows and
steps through the reduction by tile_k:

    lambda = ceil(N / ttn)          CTAs side by side over the weight rows: pressure on L2
    kappa  = K / tile_k             steps of the reduction: depth
    rho    = N K / (ttn tile_k)     weight tiles of one expert (lambda * kappa but for rounding)
    omega  = CTAs / SMs             waves of work

Every threshold is derived from hardware constants, in the functions below, and printed with its derivation. What data
sheets do not give is named here: LOADED_LATENCY_S and NOOP_LAUNCH_S (orders of magnitude on Hopper, used for every
GPU), L2_OVER_HBM and ACHIEVED_PEAK (chosen on the shipped Alpha-MoE sweeps).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .errors import RoutingError
from .geometry import GridGeometry, m_tiles
from .hardware import Hardware
from .routing import IntArray, active_experts
from .shapes import DTYPE_BYTES, MoEShape

MIB = 1024**2

L2_SHARE_FOR_WEIGHTS = 0.9
"""Of L2, the part that weights can keep beside activations and outputs. With it, 50 MiB and 32 KiB tiles give 1440,
the threshold that RaMP states for lambda * kappa on Hopper."""

LOADED_LATENCY_S = 0.8e-6
"""From a weight load's issue to its arrival when HBM is busy, order of magnitude on Hopper."""

NOOP_LAUNCH_S = 2.0e-6
"""A dependent kernel launch that does nothing, inside a CUDA graph, order of magnitude on Hopper."""

PIPELINE_STAGES = 4
TILE_ROWS, TILE_K_BYTES = 256, 128
"""The tile against which the regions are stated: 256 weight rows (a wide tile has twice as many), and a step along
the reduction of one 128-byte swizzled row, which is 128 fp8 or 64 bf16 elements."""

L2_OVER_HBM = 1.5
"""Rate at which an expert's second M-tile reads its weights again from L2, over that of the first from HBM."""

ACHIEVED_PEAK = 0.2
"""Share of peak arithmetic that block-scaled MoE tiles reach. Alpha-MoE's best reaches 0.22 on an H200 (olmoe-1b-7b,
8,192 tokens: 824 GFLOP in 1.9 ms)."""

TOKEN_BLOCKS = np.arange(8, 129, 8)
SMALL_BLOCK, LARGE_BLOCK = 16, 32


@dataclass(frozen=True, slots=True)
class Advice:
    """Whether one optimisation should pay: the number looked at, its threshold with where it comes from, and why."""

    optimisation: str
    pays: bool
    metric: str
    value: float
    threshold: float
    derivation: str
    reason: str


@dataclass(frozen=True, slots=True)
class Regions:
    """Where a batch stands, and the advice that follows. `token_block` is the block advised."""

    metrics: Mapping[str, float]
    token_block: int
    advice: tuple[Advice, ...]


def analyse(shape: MoEShape, hardware: Hardware, histogram: IntArray) -> Regions:
    """Place one batch (its checked expert histogram, int64 `[num_experts]`, at least one token) on `hardware`.

    Stated for the up-projection, N = 2 x intermediate_size rows by K = hidden_size, the larger of the two GEMMs.
    Raises RoutingError for a batch without tokens, or several batches.
    """
    if histogram.ndim != 1:
        raise RoutingError(f"regions are stated for one expert histogram, not a batch of shape {histogram.shape}")
    active = int(active_experts(histogram))
    if active == 0:
        raise RoutingError("the batch has no tokens: no region applies")
    mean, hottest = float(histogram.sum()) / active, int(histogram.max())
    balance = _balance(shape, hardware)
    token_block = _token_block(histogram, balance)
    tile_k = TILE_K_BYTES // DTYPE_BYTES[shape.dtype]
    grid = GridGeometry(
        block_tokens=token_block,
        block_weights=TILE_ROWS,
        block_k=tile_k,
        weight_rows=shape.gate_up_rows,
        reduction=shape.hidden_size,
        expert_bytes=shape.gate_up_bytes,
    )
    metrics = {
        "rho": shape.gate_up_rows * shape.hidden_size / (TILE_ROWS * tile_k),
        "lambda": float(grid.tiles_n),
        "kappa": shape.hidden_size / tile_k,
        "omega": float(grid.logical(histogram)) / hardware.num_sms,
        "active_experts": float(active),
        "mean_tokens_per_active_expert": mean,
        "hottest_expert_tokens": float(hottest),
    }
    advice = (
        _group_m(hardware, metrics, grid, hottest),
        _split_k(hardware, metrics),
        _wide_tile(metrics),
        _small_block(metrics, token_block, balance),
        _large_block(metrics, token_block, balance),
    )
    return Regions(metrics, token_block, advice)


def _group_m(hardware: Hardware, m: Mapping[str, float], grid: GridGeometry, hottest: int) -> Advice:
    value = m["lambda"] * m["kappa"]
    tile_bytes = TILE_ROWS * TILE_K_BYTES
    threshold = L2_SHARE_FOR_WEIGHTS * hardware.l2_bytes / tile_bytes
    tiles = -(-hottest // grid.block_tokens)
    size = f"{value * tile_bytes / MIB:.0f} MiB"
    if tiles < 2:
        reason = f"no expert has a second M-tile at a token block of {grid.block_tokens}: no weight is read twice"
    elif value <= threshold:
        reason = f"one expert's up-projection ({size}) stays in L2 from one M-tile to the next in any order"
    else:
        reason = f"one expert's up-projection ({size}) falls out of L2 before its next M-tile reads it again"
    return Advice(
        "GROUP_M swizzle",
        tiles >= 2 and value > threshold,
        "lambda*kappa",
        value,
        threshold,
        f"{L2_SHARE_FOR_WEIGHTS:g} x L2 ({hardware.l2_bytes / MIB:g} MiB) / tile of {tile_bytes // 1024} KiB",
        reason,
    )


def _split_k(hardware: Hardware, m: Mapping[str, float]) -> Advice:
    stages = max(1, min(PIPELINE_STAGES, hardware.smem_per_sm_bytes // (TILE_ROWS * TILE_K_BYTES)))
    in_flight = stages * TILE_ROWS * TILE_K_BYTES
    # Little's law: HBM stays busy while CTAs * bytes in flight >= bandwidth * latency.
    busy = hardware.hbm_bytes_per_s * LOADED_LATENCY_S / (hardware.num_sms * in_flight)
    # A CTA alone streams a tile every latency / stages. Splitting in two halves that time and costs one more launch
    # and a round trip of the partial sums.
    step = LOADED_LATENCY_S / stages
    depth = 2 * (NOOP_LAUNCH_S + 2 * LOADED_LATENCY_S) / step
    deep, idle = m["kappa"] >= depth, m["omega"] < busy
    if not idle:
        reason = f"{m['omega']:.2f} waves of CTAs already keep memory busy"
    elif not deep:
        reason = f"SMs idle, but {m['kappa']:.0f} steps are too few to pay for adding up the parts (from {depth:.0f})"
    else:
        reason = f"only {m['omega']:.2f} waves: idle SMs can share {m['kappa']:.0f} steps of the reduction"
    return Advice(
        "split-K",
        deep and idle,
        "omega",
        m["omega"],
        busy,
        f"HBM x {LOADED_LATENCY_S * 1e6:g} us / (SMs x {in_flight // 1024} KiB in flight); and kappa >= {depth:.0f} = "
        f"2 x (launch + 2 latencies) / step of {step * 1e6:.2g} us",
        reason,
    )


def _wide_tile(m: Mapping[str, float]) -> Advice:
    pays = m["omega"] >= 2
    reason = (
        "two waves or more: half the CTAs still fill the SMs, and each reads its activations for twice the rows"
        if pays
        else "less than two waves: half as many CTAs would leave SMs idle"
    )
    derivation = "half the CTAs still make one full wave (RaMP states omega > 1, without the histogram)"
    return Advice("wide weight tile", pays, "omega", m["omega"], 2.0, derivation, reason)


def _balance(shape: MoEShape, hardware: Hardware) -> float:
    """Tokens in a block at which its arithmetic takes as long as its weights' load from HBM: 2 FLOP for each token and
    weight element."""
    peak = ACHIEVED_PEAK * (hardware.peak_flops(shape.dtype) or hardware.bf16_flops)
    return peak / hardware.hbm_bytes_per_s * DTYPE_BYTES[shape.dtype] / 2


def _token_block(histogram: IntArray, balance: float) -> int:
    """The block with the lowest roofline: every active expert's weights once from HBM and again from L2 for each
    further M-tile, or the arithmetic of all M-tiles with their padding, whichever takes longer.

    Times are in units of one expert's weights from HBM. A tie goes to the smaller block, which pads less.
    """
    tiles, active = m_tiles(histogram, TOKEN_BLOCKS), active_experts(histogram)
    load = active + (tiles - active) / L2_OVER_HBM
    arithmetic = tiles * TOKEN_BLOCKS / balance
    return int(TOKEN_BLOCKS[np.maximum(load, arithmetic).argmin()])


_BLOCK_DERIVATION = (
    f"lowest of max(weights' load, arithmetic) over blocks of 8 to 128; re-reads at {L2_OVER_HBM:g} x HBM, "
    f"{ACHIEVED_PEAK:g} x peak: a block of {{balance:.0f}} tokens computes as long as its weights load"
)


def _small_block(m: Mapping[str, float], token_block: int, balance: float) -> Advice:
    mean = m["mean_tokens_per_active_expert"]
    reason = (
        f"an active expert has {mean:.1f} tokens on average: blocks over {SMALL_BLOCK} mostly compute padding"
        if token_block <= SMALL_BLOCK
        else f"an active expert has {mean:.1f} tokens on average: small blocks would read its weights again and again"
    )
    derivation = _BLOCK_DERIVATION.format(balance=balance)
    return Advice(
        "small token block", token_block <= SMALL_BLOCK, "block advised", token_block, SMALL_BLOCK, derivation, reason
    )


def _large_block(m: Mapping[str, float], token_block: int, balance: float) -> Advice:
    mean = m["mean_tokens_per_active_expert"]
    reason = (
        f"with {mean:.0f} tokens an active expert, smaller blocks would read its weights several times"
        if token_block >= LARGE_BLOCK
        else f"with {mean:.1f} tokens an active expert, a large block would mostly compute padding"
    )
    derivation = _BLOCK_DERIVATION.format(balance=balance)
    return Advice(
        "large token block", token_block >= LARGE_BLOCK, "block advised", token_block, LARGE_BLOCK, derivation, reason
    )
