"""Chooses a candidate on the device, in Triton: top-k ids -> histogram -> cost of every candidate -> the cheapest.

The cost is that of `ramp_moe.cost_model.formula`, whose steps are named below.

There is one program, since a second launch costs more than what is computed here. Code that runs once per layer is
fetched from memory each time. Many warps, tiles of at most 4096 elements and loops that are not unrolled keep it short.

    count       int32   [BINS]        ids of each expert
    tiles       float32 [BLOCKS]      M-tiles of each token block (step 1): routed ids for the first, active experts for
                                      the last
    part_us     float32 [PARTS]       (steps 2 to 4)
    us          float32 [CANDIDATES]  sums of parts; infinite past the last (step 5)
    corrected   float32 [STEP]        STEP at a time in their order (step 6)
"""
# Triton is untyped, and so is every function that it compiles.
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import KernelError, ShapeError
from ...spec.launchable import kernel_ids as as_kernels_take
from .cost_table import CostTable
from .recorder import Recorder

MAX_IDS, MAX_EXPERTS = 65_536, 1024

_CHUNK = tl.constexpr(1024)  # ids that are counted at a time; more would take more code
_WARPS = 16
_TILE = 4096


@triton.jit
def _load_ids(topk_ids, first, num_ids):
    at = first + tl.arange(0, _CHUNK)
    return tl.load(topk_ids + at, mask=at < num_ids, other=-1)


@triton.jit
def _count(topk_ids, num_valid, num_ids, num_tokens, top_k, num_experts, BINS: tl.constexpr):
    """Returns (count, tokens): ids of each expert, int32 [BINS], and tokens before `num_valid`. Only those count."""
    count = tl.zeros((BINS,), tl.int32)
    tokens = num_tokens
    ids = _load_ids(topk_ids, 0, num_ids)
    if num_valid is not None:
        # Any value is safe: it is clamped before the product, which then cannot overflow.
        tokens = tl.minimum(tl.maximum(tl.load(num_valid), 0), num_tokens)
    for first in range(0, num_ids, _CHUNK):
        following = _load_ids(topk_ids, first + _CHUNK, num_ids)
        live = (ids >= 0) & (ids < num_experts) & (first + tl.arange(0, _CHUNK) < tokens * top_k)
        # Compared before the cast: an int64 id must not wrap into range.
        count += tl.histogram(tl.where(live, ids, 0).to(tl.int32), BINS, mask=live)
        ids = following
    return count, tokens


@triton.jit
def _tiles(count, blocks, num_blocks, BINS: tl.constexpr, BLOCKS: tl.constexpr, STEP: tl.constexpr):
    """float32 [BLOCKS]: the sum over experts of ceil(count / block), STEP blocks at a time."""
    at = tl.arange(0, BLOCKS)
    tiles = tl.zeros((BLOCKS,), tl.float32)
    for first in range(0, num_blocks, STEP):
        step = first + tl.arange(0, STEP)
        block = tl.load(blocks + step, mask=step < num_blocks, other=1).to(tl.float32)
        # The quotient rounded up, exact while count + block < 2^21: the half keeps quotients off whole numbers by more
        # than the reciprocal's error. An integer division takes ten times as long.
        up = tl.floor((count.to(tl.float32)[None, :] + (block - 0.5)[:, None]) * (1.0 / block)[:, None])
        # The last block holds any number of tokens, too many for that.
        up = tl.where((step == num_blocks - 1)[:, None], tl.minimum(count, 1).to(tl.float32)[None, :], up)
        own = (at >= first) & (at < first + STEP)
        tiles = tl.where(own, tl.gather(tl.sum(up, 1), at & (STEP - 1), 0), tiles)
    return tiles


@triton.jit
def _log(count):
    return tl.log(tl.maximum(count, 1.0))


@triton.jit
def _square_away(log, axis, set_, points, unit, num_rows, ROWS: tl.constexpr):
    """Squared distances along one axis, float32 [STEP, ROWS].

    They are from a batch at log [STEP], or a scalar, to the points of the sets set_ [STEP].
    """
    row = tl.arange(0, ROWS)
    of_axis = set_ * 3 + axis
    at = tl.load(points + of_axis[:, None] * num_rows + row[None, :], mask=row[None, :] < num_rows, other=0.0)
    away = (log * tl.load(unit + of_axis))[:, None] - at
    return away * away


# Values that change with the batch or the table must not compile a kernel each.
_SIZES = [
    "num_ids", "num_tokens", "top_k", "num_experts", "num_blocks", "num_launches", "num_grids", "num_parts",
    "num_candidates", "num_rows", "parts_each", "ring_slots",
]  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def select_kernel(
    topk_ids,  # int32 or int64 [num_tokens, top_k]
    num_valid,  # int32 [1], or None
    choice,
    histogram,
    cost_us,  # float32 [num_candidates], or None
    ring,  # of a Recorder, or None
    counter,  # likewise
    # A CostTable's
    blocks,
    grid_block,
    grid_ctas,
    grid_cluster,
    grid_slots,
    grid_work,
    launch_of,
    coefficients,
    floor,
    first,
    parts,
    unit,
    points,
    set_block,
    set_of,
    constant,
    weights,
    label,
    num_ids,
    num_tokens,
    top_k,
    num_experts,
    num_blocks,
    num_launches,
    num_grids,
    num_parts,
    num_candidates,
    num_rows,
    parts_each,  # parts of the candidate that has most
    ring_slots,
    # Powers of two
    BINS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_STEP: tl.constexpr,
    GRIDS: tl.constexpr,
    PARTS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    ONE_PART_EACH: tl.constexpr,  # candidate i is part i
    CORRECTED: tl.constexpr,  # there are sets of points
):
    if ring is not None:
        recorded = tl.load(counter)  # long before it is written: every thread reads it for itself
    # The table's loads are issued first, and complete while ids are counted.
    part = tl.arange(0, PARTS)
    of_part = part < num_parts
    launch = tl.load(launch_of + part, mask=of_part, other=0)
    at = tl.arange(0, GRIDS)[:, None] * num_launches + launch[None, :]
    of_grid = (tl.arange(0, GRIDS)[:, None] < num_grids) & of_part[None, :]
    block = tl.load(grid_block + at, mask=of_grid, other=0)
    per_tile = tl.load(grid_ctas + at, mask=of_grid, other=0.0)
    cluster = tl.load(grid_cluster + at, mask=of_grid, other=1)
    per_wave = tl.load(grid_slots + at, mask=of_grid, other=1.0)
    work = tl.load(grid_work + at, mask=of_grid, other=0.0)
    part_us = tl.load(coefficients + part, mask=of_part, other=0.0)
    us_wave = tl.load(coefficients + num_parts + part, mask=of_part, other=0.0)
    us_whole_wave = tl.load(coefficients + 2 * num_parts + part, mask=of_part, other=0.0)
    us_cta = tl.load(coefficients + 3 * num_parts + part, mask=of_part, other=0.0)
    us_log_cta = tl.load(coefficients + 4 * num_parts + part, mask=of_part, other=0.0)
    us_active = tl.load(coefficients + 5 * num_parts + part, mask=of_part, other=0.0)
    least_us = tl.load(floor + part, mask=of_part, other=0.0)

    expert = tl.arange(0, BINS)
    count, tokens = _count(topk_ids, num_valid, num_ids, num_tokens, top_k, num_experts, BINS)
    tl.store(histogram + expert, count, mask=expert < num_experts)
    tiles = _tiles(count, blocks, num_blocks, BINS, BLOCKS, BLOCK_STEP)
    active = tl.sum(tl.where(tl.arange(0, BLOCKS) == num_blocks - 1, tiles, 0.0))

    of_block = tl.reshape(tl.gather(tiles, tl.reshape(block, (GRIDS * PARTS,)), 0), (GRIDS, PARTS)).to(tl.int32)
    ctas = ((of_block + cluster - 1) & -cluster).to(tl.float32) * per_tile
    waves = tl.div_rn(ctas, per_wave)  # rounded as by IEEE: a full wave must not become two
    all_ctas = tl.sum(ctas * work, 0)
    part_us += us_wave * tl.sum(waves * work, 0) + us_whole_wave * tl.sum(tl.ceil(waves) * work, 0)
    part_us += us_cta * all_ctas + us_log_cta * tl.log(1.0 + all_ctas) + us_active * active
    part_us = tl.maximum(part_us, least_us)

    candidate = tl.arange(0, CANDIDATES)
    exists = candidate < num_candidates
    if ONE_PART_EACH:
        us = part_us
    else:
        us = tl.zeros((CANDIDATES,), tl.float32)
        begin = tl.load(first + candidate, mask=exists, other=0)
        end = tl.load(first + 1 + candidate, mask=exists, other=0)
        for i in range(parts_each):
            more = begin + i < end
            us += tl.where(more, tl.gather(part_us, tl.load(parts + begin + i, mask=more, other=0), 0), 0.0)
    us = tl.where(exists & (us == us), us, float("inf"))
    best_us, best = us, candidate
    if CORRECTED:
        best_us = tl.full((STEP,), float("inf"), tl.float32)
        best = tl.zeros((STEP,), tl.int32)
        log_ids, log_active = _log(tl.sum(count).to(tl.float32)), _log(active)
        row = tl.arange(0, ROWS)[None, :]
        for begin_step in range(0, num_candidates, STEP):
            index = begin_step + tl.arange(0, STEP)
            within = index < num_candidates
            set_ = tl.load(set_of + index, mask=within, other=0)
            log_tiles = _log(tl.gather(tiles, tl.load(set_block + set_), 0))
            square = _square_away(log_ids, 0, set_, points, unit, num_rows, ROWS)
            square += _square_away(log_active, 1, set_, points, unit, num_rows, ROWS)
            square += _square_away(log_tiles, 2, set_, points, unit, num_rows, ROWS)
            of_row = (row < num_rows) & within[:, None]
            weight = tl.load(weights + row * num_candidates + index[:, None], mask=of_row, other=0.0)
            logarithm = tl.sum(weight * tl.sqrt(square), 1) + tl.load(constant + index, mask=within, other=0.0)
            corrected = tl.gather(us, tl.minimum(index, num_candidates - 1), 0) * tl.exp(logarithm)
            corrected = tl.where(within & (corrected == corrected), corrected, float("inf"))  # not where it is NaN
            if cost_us is not None:
                tl.store(cost_us + index, corrected, mask=within)
            best = tl.where(corrected < best_us, index, best)
            best_us = tl.minimum(corrected, best_us)
    elif cost_us is not None:
        tl.store(cost_us + candidate, us, mask=exists)
    # The first of equal candidates; an existing one even if every cost is NaN.
    chosen = tl.min(tl.where(best_us == tl.min(best_us), best, num_candidates - 1))
    tl.store(choice, chosen)

    if ring is not None:
        entry = ring + recorded % ring_slots * (2 + num_experts)
        tl.store(entry, tokens)
        tl.store(entry + 1, tl.load(label + chosen))
        tl.store(entry + 2 + expert, count, mask=expert < num_experts)
        tl.store(counter, recorded + 1)


class TritonSelector:
    """Chooses among a table's candidates by the top-k ids on the device, in one launch. The host does not wait.

    choice: int32 `[1]`, the candidate's index.
    histogram: int32 `[num_experts]`.

    Both are allocated once, and hold the results of the latest call in the order of the stream. A captured graph fills
    them again at each replay. Raises KernelError for more than 1024 experts, and without a GPU.
    """

    def __init__(self, table: CostTable, num_experts: int, device: torch.device | str) -> None:
        if not 1 <= num_experts <= MAX_EXPERTS:
            raise KernelError(
                f"choosing on the device takes 1 to {MAX_EXPERTS} experts, not {num_experts}; choose on the host"
            )
        self.choice = torch.zeros(1, dtype=torch.int32, device=device)
        self.histogram = torch.zeros(num_experts, dtype=torch.int32, device=device)
        self._device = self.choice.device
        if self._device.type != "cuda" and isinstance(select_kernel, triton.JITFunction):
            raise KernelError(f"choosing on the device needs a GPU, not {self._device}; choose on the host")
        self._table = table.to(self._device)
        num_parts, num_rows = len(table.floor), len(table.weights)
        self._sizes = {
            "num_experts": num_experts,
            "num_blocks": len(table.blocks),
            "num_launches": table.grid_block.shape[1],
            "num_grids": len(table.grid_block),
            "num_parts": num_parts,
            "num_candidates": table.num_candidates,
            "num_rows": num_rows,
            "parts_each": int(np.diff(table.first).max()),
        }
        bins = _at_least(64, num_experts)  # one for each lane of the widest wave
        blocks = _at_least(16, len(table.blocks))
        candidates, rows = _at_least(64, table.num_candidates), _at_least(64, num_rows)
        self._constants = {
            "BINS": bins,
            "BLOCKS": blocks,
            "BLOCK_STEP": min(blocks, _TILE // bins),
            "GRIDS": _at_least(1, len(table.grid_block)),
            "PARTS": _at_least(64, num_parts),
            "CANDIDATES": candidates,
            "ROWS": rows,
            "STEP": min(16, _TILE // 2 // rows, _TILE // candidates),
            "ONE_PART_EACH": np.array_equal(table.parts, np.arange(table.num_candidates)),
            "CORRECTED": len(table.unit) > 0,
        }

    def launch(
        self,
        topk_ids: Tensor,
        num_valid: Tensor | None = None,
        kernel_ids: Tensor | None = None,
        recorder: Recorder | None = None,
        cost_us: Tensor | None = None,
    ) -> None:
        """Choose a candidate for a batch as `Selector.launch` describes it. Also fills `histogram`. Deterministic.

        cost_us: float32 `[candidates]`, which becomes microseconds; None: not wanted. Raises KernelError for more than
        65,536 ids, for wrong dtypes, strides or devices, and for a recorder of other sizes. Raises ShapeError for wrong
        shapes.
        """
        self._check("topk_ids", topk_ids, None, torch.int32, torch.int64)
        num_tokens, top_k = topk_ids.shape
        if topk_ids.numel() > MAX_IDS:
            raise KernelError(
                f"choosing on the device takes {MAX_IDS} ids at most, not {topk_ids.numel()}; choose on the host"
            )
        if num_valid is not None:
            self._check("num_valid", num_valid, (1,), torch.int32)
        if cost_us is not None:
            self._check("cost_us", cost_us, (self._sizes["num_candidates"],), torch.float32)
        ring = counter = None
        if recorder is not None:
            recorder.check(len(self.histogram), top_k, self._device)
            ring, counter = recorder.ring, recorder.counter
        with torch.cuda.device_of(topk_ids):
            select_kernel[(1,)](
                topk_ids,
                num_valid,
                self.choice,
                self.histogram,
                cost_us,
                ring,
                counter,
                **self._table,
                num_ids=topk_ids.numel(),
                num_tokens=num_tokens,
                top_k=top_k,
                ring_slots=1 if recorder is None else recorder.slots,
                **self._sizes,
                **self._constants,
                num_warps=_WARPS,
            )
            if kernel_ids is not None:
                kernel_ids.copy_(as_kernels_take(topk_ids, len(self.histogram), num_valid))

    def _check(self, what: str, tensor: Tensor, shape: tuple[int, ...] | None, *dtypes: torch.dtype) -> None:
        if tensor.ndim != 2 if shape is None else tensor.shape != shape:
            raise ShapeError(f"{what} must be {'[T, k]' if shape is None else list(shape)}, not {list(tensor.shape)}")
        if tensor.dtype not in dtypes:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise KernelError(f"{what} must be {names}, not {str(tensor.dtype).removeprefix('torch.')}; convert it")
        if tensor.device != self._device:
            raise KernelError(f"{what} must be on {self._device}, not on {tensor.device}; move it there")
        if not tensor.is_contiguous():
            raise KernelError(f"{what} must be contiguous, its strides are {tensor.stride()}; call .contiguous()")


def _at_least(least: int, size: int) -> int:
    return int(max(least, triton.next_power_of_2(size)))
