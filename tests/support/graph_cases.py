"""Layers that dispatch in graphs, over invented cost models by which configurations of different token blocks win."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from ramp_moe import Candidate, CostModel, Hardware, MoEShape, expert_histogram, fit_sweep, generate
from ramp_moe.cost_model.model import join
from ramp_moe.measurements.sweep import (
    FORMAT,
    PATH,
    VERSION,
    Column,
    MeasuredBatch,
    Run,
    ShapeRecord,
    SweepRecord,
    make_sweep,
    path_key,
)
from ramp_moe_kernels.triton.config import GemmConfig, Path
from ramp_moe_kernels.triton.kernel import TritonMoE

KINDS = ("uniform", "zipf1.2", "zipf2.0", "active0.25", "one-hot")
"""Kinds of routing. Each token block of PRICES wins on at least one."""
SHAPE = MoEShape(32, 4, 256, 128, "bf16")
"""A small shape that Triton's kernels take."""
PRICES = {16: 100.0, 32: 157.0, 64: 213.0, 128: 261.0}
"""Microseconds per tile, by token block. They far exceed the cost of a switch, and their sums are hardly ever equal."""


def triton_of(blocks: Mapping[int, float] = PRICES, kernel: TritonMoE | None = None) -> dict[Candidate, float]:
    """One configuration of the Triton path for each token block. All of them add in a fixed order."""
    kernel = kernel or TritonMoE()
    gemms = {block: GemmConfig(block, 64, 64, 4, 3, 1, 1, False) for block in blocks}
    paths = {block: Path(gemm, gemm) for block, gemm in gemms.items()}
    return {Candidate(kernel.name, kernel.describe(path, SHAPE)): blocks[block] for block, path in paths.items()}


def priced(hardware: Hardware, us_a_tile: Mapping[Candidate, float], shape: MoEShape = SHAPE) -> CostModel:
    """A cost model in which each candidate costs 20 us, plus the given microseconds per tile."""
    models = []
    for name in dict.fromkeys(c.kernel for c in us_a_tile):
        mine = {c: price for c, price in us_a_tile.items() if c.kernel == name}
        rows = []
        for tokens, kind in itertools.product((1, 4, 16, 64, 256, 1024), KINDS):
            h = expert_histogram(generate(kind, tokens, shape.num_experts, shape.top_k, tokens), shape.num_experts)
            us = [20 + price * sum(-(-n // _block(c)) for n in h.tolist()) for c, price in mine.items()]
            rows.append(MeasuredBatch(tokens, kind, h.tolist(), [us]))
        record = SweepRecord(
            format=FORMAT, version=VERSION, device=hardware.name, kernel=name, kernel_version="1",
            shape=ShapeRecord.of(shape), runs=[Run("2026-01-01", hardware.device_names[0], "", {}, "made up")],
            columns=[Column(PATH, path_key(name, c.config.name)) for c in mine], left_out=[], batches=rows,
        )  # fmt: skip
        models.append(fit_sweep(make_sweep(record), list(mine), hardware))
    return join(models)


def _block(candidate: Candidate) -> int:
    return candidate.config.gemms[0].block_m
