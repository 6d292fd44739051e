"""Performance regions: which optimisation of a MoE kernel should pay, from the shape, the histogram and the hardware.

Four numbers describe where a launch stands (after RaMP, arXiv 2604.26039), for a CTA that covers ttn weight rows and
steps through the reduction by tile_k:

    lambda = ceil(N / ttn)          CTAs side by side over the weight rows: pressure on L2
    kappa  = K / tile_k             steps of the reduction: depth
    rho    = N K / (ttn tile_k)     weight tiles of one expert (lambda * kappa but for rounding)
    omega  = CTAs / SMs             waves of work

A fifth, `busy`, is the omega at which memory is: fewer CTAs than that have too few bytes in flight to draw HBM's
bandwidth (Little's law). Split-K is for launches below it, the wide tile for those above.

Every threshold is derived in the functions below, and printed with its derivation. Data sheets do not give these
constants:

    PIPELINE_STAGES                    as in the Triton path
    LOADED_LATENCY_S, NOOP_LAUNCH_S    orders of magnitude on Hopper, used for every GPU
    L2_OVER_HBM, ACHIEVED_PEAK         chosen on the shipped Alpha-MoE sweeps

`profiles/studies/regions` compares the advice with measurements, and shows what a fifth more or less of each constant
would change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import RoutingError
from ..spec.geometry import GridGeometry, m_tiles
from ..spec.hardware import Hardware
from ..spec.routing import FloatArray, IntArray, active_experts
from ..spec.shapes import MoEShape

MIB = 1024**2

L2_SHARE_FOR_WEIGHTS = 0.9
"""Share of L2 that weights can keep beside activations and outputs. With it, 50 MiB and 32 KiB tiles give 1440, RaMP's
threshold of lambda * kappa on Hopper. It decides why a swizzle pays, not whether."""

LOADED_LATENCY_S = 0.8e-6
"""Seconds from a weight load's issue to its arrival while HBM is busy; order of magnitude on Hopper."""

NOOP_LAUNCH_S = 2.0e-6
"""Seconds of a dependent kernel launch that does nothing, inside a CUDA graph; order of magnitude on Hopper."""

PIPELINE_STAGES = 3
"""Buffers of a CTA's pipeline, by default as many as in the Triton path. While it computes on one, loads are under way
to the others."""

TILE_ROWS, TILE_K_BYTES = 256, 128
"""The tile for which the regions are stated. It has 256 weight rows, the widest tile of the Triton path in fp8; a
narrow one has half. A step along the reduction is one 128-byte swizzled row: 128 fp8, 64 bf16 or 256 4-bit weights."""

L2_OVER_HBM = 1.3
"""Bytes that L2 hands to the SMs, HBM's among them, while HBM delivers one. Among the rates from 1 to 3, the blocks
advised with this one lose least on the shipped Alpha-MoE sweeps: 4.8% over the best block on average. It is up to 5.4%
for rates to 1.6, and from 7% on outside."""

ACHIEVED_PEAK = 0.2
"""Share of peak arithmetic that block-scaled MoE tiles reach. Alpha-MoE's best reaches 0.22 on an H200 (olmoe-1b-7b,
8,192 tokens: 824 GFLOP in 1.9 ms)."""

TOKEN_BLOCKS = np.arange(8, 129, 8)
SMALL_BLOCK, LARGE_BLOCK = 16, 32
"""Token blocks up to the first are small, and from the second on large."""


@dataclass(frozen=True, slots=True)
class Advice:
    """Advice on one optimisation: the number looked at, the threshold from which on it pays, the threshold's origin,
    and why."""

    optimisation: str
    pays: bool
    metric: str
    value: float
    threshold: float
    derivation: str
    reason: str


@dataclass(frozen=True, slots=True)
class Regions:
    """Where a batch stands, and the advice that follows. `token_block` is the advised block."""

    metrics: Mapping[str, float]
    token_block: int
    advice: tuple[Advice, ...]


def analyse(shape: MoEShape, hardware: Hardware, histogram: IntArray) -> Regions:
    """Place one batch (its checked expert histogram, int64 `[num_experts]`, at least one token) on `hardware`.

    The regions are stated for the up-projection, N = 2 x intermediate_size rows by K = hidden_size, the larger of the
    two GEMMs. Raises RoutingError for a batch without tokens, or several batches.
    """
    if histogram.ndim != 1:
        raise RoutingError(f"regions are stated for one expert histogram, not a batch of shape {histogram.shape}")
    active = int(active_experts(histogram))
    if active == 0:
        raise RoutingError("the batch has no tokens: no region applies")
    mean, hottest = float(histogram.sum()) / active, int(histogram.max())
    times = _block_times(shape, hardware, histogram)
    token_block = int(TOKEN_BLOCKS[times.argmin()])
    tile_k = TILE_K_BYTES * 8 // shape.format.bits
    grid = GridGeometry.gate_up(shape, block_m=token_block, block_n=TILE_ROWS, block_k=tile_k)
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
        _group_m(hardware, metrics, token_block),
        _split_k(hardware, metrics),
        _wide_tile(hardware, metrics),
        *_blocks(hardware, shape, metrics, times),
    )
    return Regions(metrics, token_block, advice)


def _group_m(hardware: Hardware, m: Mapping[str, float], token_block: int) -> Advice:
    """Compare walking several M-tiles side by side, before the next weight rows, with one M-tile after the other.

    One after the other, CTAs that start together share activations and read different weights. Those that share a
    weight tile start lambda CTAs apart. An expert's first M-tile waits for HBM while L2 could hand out more. Its second
    reads L2 while HBM idles, or HBM again if the expert is larger than L2.

    Side by side, those that share a weight tile start together: one load from HBM serves them all. Their reads are
    close enough for Hopper to merge before L2 (the L2 request coalescer of Nsight Compute's documentation). HBM and L2
    work at the same time. The weight tile is the operand to share, being the larger: 256 rows against at most 128
    tokens.

    The CTAs are the same in either order, so the swizzle costs nothing, and it pays as soon as any weight is read
    twice. It gains most if an expert does not fit L2. It gains little if the few CTAs between M-tiles (lambda far below
    the number of SMs) run together in any order.
    """
    tiles = -(-int(m["hottest_expert_tokens"]) // token_block)
    tile_bytes = TILE_ROWS * TILE_K_BYTES
    weight_tiles, fit = m["lambda"] * m["kappa"], L2_SHARE_FOR_WEIGHTS * hardware.l2_bytes / tile_bytes
    size = f"{weight_tiles * tile_bytes / MIB:.0f} MiB"
    if tiles < 2:
        reason = f"no expert has a second M-tile at a token block of {token_block}: no weight is read twice"
    elif weight_tiles <= fit:
        reason = (
            f"one expert's up-projection ({size}) stays in L2, but its M-tiles read it one after the other unless they "
            "run side by side: then one load from HBM serves them all, and HBM and L2 work at the same time"
        )
    else:
        reason = f"one expert's up-projection ({size}) falls out of L2 before its next M-tile reads it again"
    return Advice(
        "GROUP_M swizzle",
        tiles >= 2,
        "M-tiles of an expert",
        float(tiles),
        2.0,
        "the second reads the same weights again, and the order costs nothing; of an expert's lambda*kappa = "
        f"{weight_tiles:.0f} weight tiles L2 keeps {fit:.0f} = {L2_SHARE_FOR_WEIGHTS:g} x L2 "
        f"({hardware.l2_bytes / MIB:g} MiB) / tile of {tile_bytes // 1024} KiB",
        reason,
    )


def _loads(hardware: Hardware) -> int:
    """Steps that a CTA has under way while it computes on another one: the pipeline's other buffers, if shared memory
    has room for them."""
    return max(1, min(PIPELINE_STAGES, hardware.smem_per_sm_bytes // (TILE_ROWS * TILE_K_BYTES)) - 1)


def _busy(hardware: Hardware) -> float:
    """Waves of CTAs that keep HBM busy, by Little's law: CTAs * bytes in flight = bandwidth * latency."""
    in_flight = _loads(hardware) * TILE_ROWS * TILE_K_BYTES
    return hardware.hbm_bytes_per_s * LOADED_LATENCY_S / (hardware.num_sms * in_flight)


def _busy_derivation(hardware: Hardware) -> str:
    in_flight = _loads(hardware) * TILE_ROWS * TILE_K_BYTES
    return f"HBM x {LOADED_LATENCY_S * 1e6:g} us / (SMs x {in_flight // 1024} KiB in flight)"


def _split_k(hardware: Hardware, m: Mapping[str, float]) -> Advice:
    """Compare several CTAs for one output tile, each with a part of the reduction, with a single CTA.

    A CTA that waits for latency, not for bandwidth, makes a step each latency / loads under way. Parts shorten that
    until memory is busy: of kappa steps a share omega / busy remains, however many parts. What is saved must exceed one
    more launch and a round trip of the partial sums.
    """
    busy, step = _busy(hardware), LOADED_LATENCY_S / _loads(hardware)
    saved = m["kappa"] * max(0.0, 1 - m["omega"] / busy)
    cost = (NOOP_LAUNCH_S + 2 * LOADED_LATENCY_S) / step
    pays = saved >= cost
    if m["omega"] >= busy:
        reason = f"{m['omega']:.3g} waves of CTAs already keep memory busy"
    elif not pays:
        reason = f"SMs idle, but the {saved:.1f} steps that they can take do not pay for adding up the parts"
    else:
        reason = f"only {m['omega']:.3g} waves: idle SMs can take {saved:.0f} of {m['kappa']:.0f} steps"
    return Advice(
        "split-K",
        pays,
        "steps saved",
        saved,
        cost,
        f"(launch + 2 latencies) / step of {step * 1e6:.2g} us; saved are kappa x (1 - omega / busy), "
        f"busy {busy:.2f} = {_busy_derivation(hardware)}",
        reason,
    )


def _wide_tile(hardware: Hardware, m: Mapping[str, float]) -> Advice:
    """Compare CTAs of 256 weight rows with twice as many of 128.

    Each wide CTA has twice the bytes in flight, so that half as many keep memory as busy. SMs without a CTA are no loss
    while memory is busy. Then the wide tile wins, since activations are read, and tiles set up, half as often.

    With fewer CTAs a step takes one latency, and then what its SM needs to load the tile and multiply. For half of each
    tile the idle SMs would need half of that. Bytes in flight, and so the advice, are the same for 512 rows against
    256, if shared memory holds as many stages.
    """
    busy = _busy(hardware)
    pays = m["omega"] >= busy
    reason = (
        f"{m['omega']:.3g} waves keep memory busy with half the CTAs: each reads its activations for twice the rows"
        if pays
        else f"{m['omega']:.3g} waves leave memory waiting: idle SMs would take half of each tile"
    )
    return Advice(
        "wide weight tile",
        pays,
        "omega",
        m["omega"],
        busy,
        f"half as many CTAs, twice the bytes each: {_busy_derivation(hardware)}",
        reason,
    )


def _balance(shape: MoEShape, hardware: Hardware) -> float:
    """Tokens in a block at which its arithmetic takes as long as its weights' load from HBM: 2 FLOP for each token and
    weight element."""
    peak = ACHIEVED_PEAK * (hardware.peak_flops(shape.dtype) or hardware.bf16_flops)
    return peak / hardware.hbm_bytes_per_s * shape.format.bits / 8 / 2


def _block_times(shape: MoEShape, hardware: Hardware, histogram: IntArray) -> FloatArray:
    """The roofline of each of TOKEN_BLOCKS, in units of one expert's weights from HBM.

    It is the longest of three times: every active expert's weights once from HBM, all M-tiles' weights from L2, and the
    arithmetic of all M-tiles with their padding. HBM and L2 work at the same time: M-tiles of one expert run side by
    side, or beside other experts' that still wait for HBM. So a few re-reads cost nothing. A tie goes to the smaller
    block (`argmin`), which pads less.
    """
    tiles, active = m_tiles(histogram, TOKEN_BLOCKS), active_experts(histogram)
    arithmetic = tiles * TOKEN_BLOCKS / _balance(shape, hardware)
    times: FloatArray = np.maximum(np.maximum(active, tiles / L2_OVER_HBM), arithmetic)
    return times


def _blocks(hardware: Hardware, shape: MoEShape, m: Mapping[str, float], times: FloatArray) -> tuple[Advice, Advice]:
    """Advise small or large token blocks: the best of either against the best of the other, whatever lies between.

    A tie goes to the small one, which pads less.
    """
    mean = m["mean_tokens_per_active_expert"]
    small, large = float(times[TOKEN_BLOCKS <= SMALL_BLOCK].min()), float(times[TOKEN_BLOCKS >= LARGE_BLOCK].min())
    pays = large < small
    reason = (
        f"with {mean:.1f} tokens an active expert, blocks up to {SMALL_BLOCK} would read its weights too often"
        if pays
        else f"with {mean:.1f} tokens an active expert, blocks over {SMALL_BLOCK} save no time and compute padding"
    )
    derivation = (
        "lowest of max(weights from HBM, all reads from L2, arithmetic) over blocks of 8 to 128; L2 at "
        f"{L2_OVER_HBM:g} x HBM, {ACHIEVED_PEAK:g} x peak: a block of {_balance(shape, hardware):.0f} tokens computes "
        "as long as its weights load"
    )
    return (
        Advice("small token block", not pays, "time large / small", large / small, 1.0, derivation, reason),
        Advice("large token block", pays, "time small / large", small / large, 1.0, derivation, reason),
    )
