"""The configurations of Humming's GEMMs: which tiles are worth compiling, and which can run.

Humming's own tables choose from 4,400 to 5,300 legal tiles a GEMM by the number of rows alone. `tiles` lists at most 80
of them, of the families that won measurements on an H200. The predicates follow `utils/smem.py` and `config/mma.py` of
version 0.1.20. A test holds them to the package where it is installed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ramp_moe.plugin import GridGeometry, Hardware, MoEShape
from ramp_moe_kernels.limits import MAX_ELEMENTS, MAX_IDS

from .formats import KINDS, Kind, Sizes, Which, sizes

SMEM_BYTES = 232_448
SMEM_OF_SM, SMEM_OF_CTA = 233_472, 1024
"""Shared memory of one Hopper SM, and what the system reserves of it per CTA."""
REGISTERS, MIN_REGISTERS = 65_536, 56
MAX_THREADS = 2048
TOKEN_BLOCKS = (8, 16, 24, 32, 40, 48, 64, 80, 96)
STEP_BYTES = 128


@dataclass(frozen=True, slots=True)
class WarpTile:
    """The launch of one GEMM. A CTA computes `block_m` sorted ids by `block_n` weight rows.

    block_k: columns of a step. warp_n, warp_k: what one warp takes of it; it takes all of block_m.
    stages: steps in flight. ctas: CTAs per SM.
    wgmma: False for the older mma instructions.
    stream_k: the CTAs share the tiles of the last wave along k.
    specialised: a warp group loads by TMA, the others multiply. reuse_smem: the output overwrites the stages.
    unroll: of the loading loop; 0 is as many as the stages.
    split_wait: WGMMAs are issued and awaited apart. late_scale: scales of activations are applied last.
    raster: M-tiles whose CTAs run side by side.
    """

    block_m: int
    block_n: int
    block_k: int
    warp_n: int
    warp_k: int
    stages: int = 4
    ctas: int = 1
    wgmma: bool = True
    stream_k: bool = False
    specialised: bool = False
    reuse_smem: bool = True
    unroll: int = 0
    split_wait: bool = False
    late_scale: bool = False
    raster: int = 1

    @property
    def name(self) -> str:
        flags = {"mma": not self.wgmma, "sk": self.stream_k, "ws": self.specialised,
                 "reuse": self.reuse_smem == self.specialised, f"u{self.unroll}": bool(self.unroll),
                 "split": self.split_wait, "late": self.late_scale, f"r{self.raster}": self.raster > 1}  # fmt: skip
        return "-".join((
            f"bm{self.block_m}-bn{self.block_n}-bk{self.block_k}-w{self.warp_n}x{self.warp_k}-st{self.stages}"
            f"-cta{self.ctas}", *(flag for flag, is_set in flags.items() if is_set),
        ))  # fmt: skip

    @property
    def threads(self) -> int:
        return 32 * self._warps + 128 * self.specialised

    @property
    def _warps(self) -> int:
        return (self.block_n // self.warp_n) * (self.block_k // self.warp_k)

    def tuning(self) -> dict[str, Any]:
        """The values of Humming's TuningConfig."""
        return {
            "mma_type": "wgmma" if self.wgmma else "mma",
            "block_shape": (self.block_m, self.block_n, self.block_k),
            "warp_shape": (self.block_m, self.warp_n, self.warp_k),
            "num_stages": self.stages,
            "num_ctas_per_sm": self.ctas,
            "use_stream_k": self.stream_k,
            "use_warp_spec": self.specialised,
            "use_tma": self.specialised,
            # Rows of an indexed GEMM lie apart.
            **dict.fromkeys(("use_tma_a", "use_tma_c", "use_tma_as", "use_tma_as2"), False),
            "smem_reuse_mode": "all_stages" if self.reuse_smem else "none",
            "producer_stage_unroll": self.unroll or None,
            "wgmma_split_issue_wait": self.split_wait,
            "wgmma_use_late_as": self.late_scale,
            "raster_group_m": self.raster,
        }

    @classmethod
    def of(cls, tuning: Mapping[str, Any]) -> WarpTile | None:
        """The tile of one of Humming's own tuning configs; None if it sets something that a WarpTile does not have."""
        given = {key: getattr(value, "value", value) for key, value in tuning.items()}
        (m, n, k), (warp_m, warp_n, warp_k) = given["block_shape"], given["warp_shape"]
        made = cls(
            m, n, k, warp_n, warp_k, given.get("num_stages", 2), given.get("num_ctas_per_sm", 1),
            given.get("mma_type") == "wgmma", given.get("use_stream_k", True), bool(given.get("use_warp_spec")),
            given.get("smem_reuse_mode", "all_stages") == "all_stages", given.get("producer_stage_unroll") or 0,
            bool(given.get("wgmma_split_issue_wait")), bool(given.get("wgmma_use_late_as")),
            given.get("raster_group_m") or 1,
        )  # fmt: skip
        if made.unroll == made.stages:
            made = replace(made, unroll=0)
        ours = made.tuning() | {"use_f16_accum": False}
        same = warp_m == m and all(
            ours.get(key) == (tuple(value) if isinstance(value, list) else value)
            for key, value in given.items()
            if key != "producer_stage_unroll"
        )
        return made if same else None


def params(up: WarpTile, down: WarpTile) -> tuple[tuple[str, int | bool], ...]:
    """Both tiles as parameters of a KernelConfig."""
    return tuple(
        (f"{which}_{key}", value) for which, t in (("up", up), ("down", down)) for key, value in asdict(t).items()
    )


@functools.lru_cache(maxsize=4096)
def tiles_of(given: tuple[tuple[str, Any], ...]) -> tuple[WarpTile, WarpTile]:
    """The tiles of a KernelConfig's parameters, the inverse of `params`."""
    p = dict(given)
    up, down = (WarpTile(**{f.name: p[f"{which}_{f.name}"] for f in fields(WarpTile)}) for which in ("up", "down"))
    return up, down


def geometry(tile: WarpTile, shape: MoEShape, which: Which, hardware: Hardware) -> GridGeometry:
    """The grid of a tile's launch: persistent, with `ctas` CTAs on each SM."""
    return sizes(shape, which).grid(
        block_m=tile.block_m,
        block_n=tile.block_n,
        block_k=tile.block_k,
        persistent_ctas=hardware.num_sms * tile.ctas,
        ctas_per_sm=tile.ctas,
        stream_k=tile.stream_k,
    )


@functools.lru_cache(maxsize=256)
def tiles(shape: MoEShape, which: Which) -> tuple[WarpTile, ...]:
    """The tiles of a GEMM that are worth measuring and can run."""
    kind, of = KINDS[shape.dtype], sizes(shape, which)
    every = _widened(kind) if kind.a_bits == 16 else _flat(of) if kind.flat else _narrow(kind, of)
    return tuple(dict.fromkeys(tile for tile in every if invalid(tile, kind, of) is None))


def _widened(kind: Kind) -> Iterator[WarpTile]:
    """4-bit weights that become bf16."""
    yield from (WarpTile(m, 128, 64, 64, 32, ctas=4, wgmma=False, stream_k=True) for m in (8, 16))
    yield WarpTile(8, 128, 256, 32, 64, stream_k=True)
    for m in TOKEN_BLOCKS:
        loading: dict[str, Any] = {"specialised": True, "reuse_smem": False, "unroll": 1, "split_wait": True}
        for stream_k in (False, True):
            yield WarpTile(m, 256, 64, 32, 64, stream_k=stream_k, **loading)
            yield WarpTile(m, 512, 64, 32, 64, stream_k=stream_k, **loading)
            if m <= 32:
                yield WarpTile(m, 256, 64, 32, 64, ctas=2, stream_k=stream_k, **loading)
        yield WarpTile(m, 256, 64, 32, 64, ctas=2)
        if m >= 64:
            yield WarpTile(m, 256, 64, 32, 64, ctas=2, stream_k=True)
        if m <= 32:
            yield WarpTile(m, 512, 64, 64, 64, ctas=2)
            yield WarpTile(m, 256, 128, 64, 64, ctas=2)
    yield WarpTile(8, 512, 64, 64, 64, ctas=3)
    yield from (WarpTile(m, 512, 64, 64, 64) for m in (8, 40))


def _flat(of: Sizes) -> Iterator[WarpTile]:
    """fp8 weights."""
    stages = _stages(of)
    two: dict[str, Any] = {"unroll": 2}
    one: dict[str, Any] = {"unroll": 1, "split_wait": True}
    for m in (*TOKEN_BLOCKS[:-1], 72):
        for stream_k in (False, True):
            shared: dict[str, Any] = {"specialised": True, "reuse_smem": False, "stream_k": stream_k}
            for loading in (two, one):
                yield WarpTile(m, 256, 128, 32, 128, stages, **shared, **loading)
                if m <= 16:
                    yield WarpTile(m, 256, 128, 32, 128, 3, ctas=2, **shared, **loading)
            if m == 64:
                yield WarpTile(m, 256, 128, 32, 128, stages, raster=8, **shared, **one)
        if m <= 16:
            shared |= two
            yield from (WarpTile(m, 128, 128, 16, 128, stages, ctas, **shared) for ctas in (1, 2))


def _narrow(kind: Kind, of: Sizes) -> Iterator[WarpTile]:
    """4-bit weights that become fp8."""
    stages = _stages(of)
    for m in TOKEN_BLOCKS[:-1]:
        for stream_k in (False, True):
            shared: dict[str, Any] = {
                "specialised": True,
                "reuse_smem": False,
                "split_wait": True,
                "stream_k": stream_k,
            }
            for late in (False, True)[: 2 if kind.a_group else 1]:
                yield WarpTile(m, 256, 128, 32, 128, stages, 2 if m <= 32 else 1, unroll=1, late_scale=late, **shared)
            if m <= 16:
                yield WarpTile(m, 256, 128, 32, 128, stages, unroll=1, **shared)
                yield WarpTile(m, 256, 128, 32, 128, stages, 2, unroll=2, late_scale=kind.a_group > 0, **shared)
        if m in (24, 40, 80):
            yield WarpTile(m, 128, 128, 16, 128, stages, 2 if m <= 40 else 1, unroll=1, **shared)
    yield WarpTile(8, 128, 128, 32, 128, stages, stream_k=True, specialised=True, reuse_smem=False, unroll=2)


def _stages(of: Sizes) -> int:
    """Steps in flight: no more than there are, but three at least, which WGMMA needs."""
    return max(3, min(4, of.padded_k // STEP_BYTES))


def invalid(tile: WarpTile, kind: Kind, of: Sizes) -> str | None:
    """Why a tile cannot run for a GEMM; None if it can."""
    if of.padded_n % tile.block_n or of.padded_k % tile.block_k:
        return "whole tiles do not fill the weights"
    if any(g and max(g, tile.block_k) % min(g, tile.block_k) for g in (kind.group, kind.a_group)):
        return "a step has a part of a group"
    if tile.wgmma and (tile.block_n // tile.warp_n % 4 or tile.stages < 3):
        return "WGMMA needs whole groups of four warps along n, and three stages"
    if tile.late_scale and not kind.a_group:
        return "only scales of groups of activations can be applied late"
    if kind.packed_k and not (tile.wgmma and tile.warp_k == PACKED_WARP_K):
        return f"the packed-K layout needs WGMMA and warps of {PACKED_WARP_K} columns"
    if kind.a_bits == 8 and not tile.wgmma and tile.block_n < 64:
        return "mma needs 64 rows"
    used = smem(tile, kind)
    if used > SMEM_BYTES or tile.ctas * (used + SMEM_OF_CTA) > SMEM_OF_SM:
        return f"{used} bytes of shared memory a CTA exceed the SM's"
    if tile.threads * tile.ctas > MAX_THREADS or tile.threads > MAX_THREADS // 2:
        return "more threads than an SM has"
    return _registers(tile, kind)


PACKED_WARP_K = 128


def smem(tile: WarpTile, kind: Kind) -> int:
    """Bytes of shared memory of a CTA."""
    m, n, k = tile.block_m, tile.block_n, tile.block_k
    parts = [(m * k * kind.a_bits // 8, 1024), (n * k * kind.bits // 8, 1024 if kind.flat else 128)]
    if kind.a_group:
        parts.append((-(-k // kind.a_group) * m * 4, 128))
    if kind.group:
        parts.append((-(-k // kind.group) * n * kind.scale_bits // 8, 128))
    stage = _struct(parts)
    row_scales = [(n * kind.scale_bits // 8, 128)] if kind.scales == "channel" else []
    if kind.fused_exponents:
        row_scales.append((n * 2, 128))  # of the weights whose exponents differ much
    token_scales = [(m * 4, 128)] if kind.a_bits == 8 and not kind.a_group else []
    warps_k = k // tile.warp_k
    buffers = warps_k - 1 if warps_k <= 4 else warps_k // 2
    reduced = max(16 * n * 32 // 128 * buffers, m * n // 8) * 16
    staged = tile.stages * stage
    used = _struct(row_scales + token_scales) + _up(max(staged, reduced + (0 if tile.reuse_smem else staged)), 1024)
    used = _up(used, 4) + m * 4 * (4 if tile.specialised else 2)
    if tile.specialised:
        used = _up(_up(used, 128) + (tile.stages + 2) * 8, 8) + (tile.stages + 1) * 8
    return _up(used, 1024)


def _struct(parts: list[tuple[int, int]]) -> int:
    """Size of a structure of parts, each of which has a size and an alignment, rounded up to 1024."""
    end = 0
    for size, align in parts:
        end = _up(end, align) + size
    return _up(end, 1024)


def _up(size: int, to: int) -> int:
    return -(-size // to) * to


def _registers(tile: WarpTile, kind: Kind) -> str | None:
    """Why a thread has too few registers; None if it has enough."""
    budget = REGISTERS // (tile.threads * tile.ctas) // 8 * 8
    needed = MIN_REGISTERS
    if tile.wgmma:
        needed = max(needed, tile.block_m // 2 + (26 if kind.flat else 32))
        if kind.packed_k and tile.split_wait:
            needed += tile.warp_k * kind.a_bits // 64 - 4
    consumer = min(255, budget)
    math_threads = 32 * tile._warps
    if tile.specialised:
        more = (tile.ctas == 1 and kind.a_bits != 16) or math_threads > 256
        producer = 40 if more else 24
        consumer = min(248, (budget * tile.threads - producer * 128) // math_threads // 8 * 8)
        if producer > budget or consumer < producer:
            return "too few registers for the threads that load"
    if not tile.wgmma:
        sums = tile.block_m * tile.warp_n / 32
        if kind.a_bits < 16 and (kind.a_group or (kind.group and not kind.fused_exponents)):
            sums *= 1.5
        if sums + (tile.block_m + tile.warp_n) / 4 >= consumer - 8:
            return "accumulators take too many registers"
    if needed > budget or consumer < MIN_REGISTERS:
        return f"{needed} registers a thread exceed the {budget} there are"
    return None


def most_tokens(shape: MoEShape, top_k: int) -> int:
    """The most tokens of one launch, bounded by the schedule's ids and by 32-bit offsets into rows of routed ids."""
    return min(MAX_IDS, MAX_ELEMENTS // max(shape.hidden_size, shape.gate_up_rows)) // top_k
