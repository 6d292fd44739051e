"""A kernel in plain torch, with layers and cost models over it. Tests of the layer share them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from ramp_moe import (
    Candidate,
    CostModel,
    GridGeometry,
    Hardware,
    KernelConfig,
    KernelError,
    MoEShape,
    Stage,
    WeightLayout,
    expert_histogram,
    fit_sweep,
    generate,
)
from ramp_moe.cost_model.model import join
from ramp_moe.measurements.sweep import (
    FORMAT,
    VERSION,
    Column,
    MeasuredBatch,
    Run,
    ShapeRecord,
    SweepRecord,
    make_sweep,
)
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.runtime.relayout import relayout
from ramp_moe.spec.launchable import Batch, LaunchableKernel, MoEWeights, Workspace

E, K, H, I = 16, 2, 32, 16  # noqa: E741
SHAPE = MoEShape(E, K, H, I, "bf16")
BLOCKS = (8, 32, 128)


def weights(dtype: torch.dtype = torch.bfloat16) -> MoEWeights:
    generator = torch.Generator().manual_seed(1)
    gate_up, down = (torch.randn(shape, generator=generator) * 0.2 for shape in ((E, 2 * I, H), (E, H, I)))
    return MoEWeights(gate_up.to(dtype), down.to(dtype))


class FakeKernel(LaunchableKernel):
    """A kernel that computes a layer token by token in float32. Its three configurations differ only in their token
    blocks. `launched` lists the configurations that were run."""

    def __init__(
        self,
        name: str = "fake",
        reason: str | None = None,
        refuses: str | None = None,
        layouts: tuple[str, ...] = ("gate-first",),
    ) -> None:
        self.name, self.reason, self.refuses, self.layouts = name, reason, refuses, layouts
        self.launched: list[tuple[str, int]] = []
        self.missing: str | None = None
        self.prepared = 0

    def unsupported(self, shape: MoEShape, hardware: Hardware) -> str | None:
        return self.reason

    def unavailable(self) -> str | None:
        return self.missing

    def config(self, block: int) -> KernelConfig:
        grid = GridGeometry(block_m=block, block_n=2 * I, block_k=H, n=2 * I, k=H, expert_bytes=1)
        return KernelConfig(f"bm{block}", (Stage("gemm", f"{self.name}/bm{block}", grid),), (("block", block),))

    def configs(self, shape: MoEShape, hardware: Hardware) -> Sequence[KernelConfig]:
        return [self.config(block) for block in BLOCKS]

    def weight_layout(self, shape: MoEShape) -> WeightLayout:
        return WeightLayout(self.layouts[0], shape.num_experts * shape.expert_bytes)

    def readable_layouts(self, shape: MoEShape) -> tuple[str, ...]:
        return self.layouts

    def prepare(self, weights: MoEWeights) -> Any:
        if self.refuses is not None:
            raise KernelError(self.refuses)
        self.prepared += 1
        self.given = weights
        weights = relayout(weights, "gate-first")
        return weights.gate_up.float(), weights.down.float()

    def default_config(self, shape: MoEShape, hardware: Hardware, num_tokens: int) -> KernelConfig:
        return self.config(8 if num_tokens < 64 else 128)

    def run(self, config: KernelConfig, prepared: Any, batch: Batch, out: torch.Tensor, workspace: Workspace) -> None:
        assert batch.num_tokens > 0
        self.launched.append((config.name, batch.num_tokens))
        gate_up, down = prepared
        total = workspace.get("total", (batch.num_tokens, H), torch.float32, out.device).zero_()
        for t, k in np.ndindex(batch.num_tokens, batch.top_k):
            expert = int(batch.topk_ids[t, k])
            if 0 <= expert < E:
                gate, up = (gate_up[expert] @ batch.hidden_states[t].float()).chunk(2)
                total[t] += batch.topk_weights[t, k] * (down[expert] @ (gate * gate.sigmoid() * up))
        out.copy_(total)


def inputs(tokens: int, kind: str = "uniform", seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.from_numpy(generate(kind, tokens, E, K, seed)).int()
    x = torch.randn(tokens, H, generator=generator).bfloat16()
    return x, ids, torch.rand(tokens, K, generator=generator)


def by_hand(x: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """The output computed as every expert for every token, summed over the experts that each token names."""
    w = weights()
    gate, up = torch.einsum("eih,th->tei", w.gate_up.float(), x.float()).chunk(2, -1)
    of_all = torch.einsum("ehi,tei->teh", w.down.float(), torch.nn.functional.silu(gate) * up)
    asked = torch.zeros(len(x), E + 2)
    asked.scatter_add_(1, torch.where((ids < 0) | (ids > E), E, ids).long(), scores)
    return torch.einsum("te,teh->th", asked[:, :E], of_all)


def layer(hardware: Hardware, *kernels: FakeKernel, **options: Any) -> LayerRuntime:
    return LayerRuntime(weights(), K, hardware, kernels or [FakeKernel()], **options)


def model_of(hardware: Hardware, kernel: FakeKernel, us_a_tile: dict[int, float], shape: MoEShape = SHAPE) -> CostModel:
    """A cost model in which each configuration costs exactly 1 us, plus the given microseconds per tile."""
    found = []
    for block, price in us_a_tile.items():
        config = kernel.config(block)
        rows = []
        for tokens in (1, 4, 16, 64, 256, 1024):
            for kind in ("uniform", "zipf1.2", "active0.25", "one-hot"):
                h = expert_histogram(
                    generate(kind, tokens, shape.num_experts, shape.top_k, seed=tokens), shape.num_experts
                )
                tiles = sum(-(-n // block) for n in h.tolist())
                rows.append(MeasuredBatch(tokens, kind, h.tolist(), [[1 + price * tiles]]))
        record = SweepRecord(
            format=FORMAT, version=VERSION, device=hardware.name, kernel=kernel.name, kernel_version="1",
            shape=ShapeRecord.of(shape), runs=[Run("2026-01-01", hardware.device_names[0], "", {}, "made up")],
            columns=[Column("gemm", config.stages[0].key)], left_out=[], batches=rows,
        )  # fmt: skip
        found.append(fit_sweep(make_sweep(record), [Candidate(kernel.name, config)], hardware))
    return join(found)


PRICES = {8: 0.1, 32: 0.2, 128: 0.4}
