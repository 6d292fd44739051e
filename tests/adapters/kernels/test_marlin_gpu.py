"""Marlin on a Hopper GPU: every code exactly, every format over the hard routings, and graph replays."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from moe_cases import H200, ROUTINGS, batch, error
from ramp_moe import KernelConfig, MoEShape
from ramp_moe.profiler.bench import random_weights
from ramp_moe.runtime import formats
from ramp_moe.runtime.reference import reference
from ramp_moe.spec.launchable import Batch, MoEWeights, Workspace
from ramp_moe.testing import KernelConformance
from ramp_moe_adapters.kernels.marlin.config import TYPES, sizes, tiles
from ramp_moe_adapters.kernels.marlin.kernel import Marlin
from ramp_moe_adapters.kernels.marlin.launch import PreparedMarlin, gemm, prepare
from ramp_moe_kernels.triton.schedule import allocate, launch_schedule

KERNEL = Marlin()
EXPERTS, TOP_K, HIDDEN, INTER = 32, 4, 512, 256
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(KERNEL.unavailable() is not None, reason=str(KERNEL.unavailable())),
]


def layer(name: str) -> MoEWeights:
    return random_weights(MoEShape(EXPERTS, 1, HIDDEN, INTER, name), torch.device("cuda"), 0)


def given(tokens: int, routing: str, seed: int = 0) -> Batch:
    return batch(tokens, TOP_K, EXPERTS, HIDDEN, routing, "cuda", torch.bfloat16, seed)


def run(c: KernelConfig, p: PreparedMarlin, b: Batch) -> torch.Tensor:
    out = torch.full_like(b.hidden_states, float("nan"))
    KERNEL.launch(c, p, b, out, Workspace())
    return out


@pytest.mark.parametrize("name", TYPES)
def test_every_code_under_every_scale(name: str) -> None:
    w = random_weights(MoEShape(2, 1, HIDDEN, INTER, name), torch.device("cuda"), 3)
    made = {}
    for key in ("gate_up", "down"):
        t = getattr(w, key)
        made[key] = torch.arange(t.numel(), device="cuda").to(torch.uint8).view_as(t)
        if name == "mxfp4":
            scale = getattr(w, f"{key}_scale")
            made[f"{key}_scale"] = (
                (110 + torch.arange(scale.numel(), device="cuda") % 31).to(torch.uint8).view_as(scale)
            )
    w = replace(w, **made)
    p = prepare(w)
    for which, weight, scale, matrices in (("up", w.gate_up, w.gate_up_scale, 2), ("down", w.down, w.down_scale, 1)):
        n, k = sizes(p.shape, which)
        ids = torch.arange(2, dtype=torch.int32, device="cuda").repeat(k)[:, None]
        ones = torch.eye(k, device="cuda").repeat_interleave(2, 0).bfloat16()
        dense = torch.stack([formats.plain(m, s, w.stored, matrices) for m, s in zip(weight, scale, strict=True)])
        expected = dense.transpose(1, 2).transpose(0, 1).reshape(2 * k, n)
        for block in (8, 16, 64):
            schedule = allocate(len(ids), 2, block, "cuda")
            launch_schedule(ids, 2, (block,), schedule)
            for tile in tiles(p.shape, which, block):
                out = torch.full((len(ids), n), float("nan"), dtype=torch.bfloat16, device="cuda")
                locks = torch.zeros(1 << 12, dtype=torch.int32, device="cuda")
                gemm(p, which, block, tile, ones, out, schedule, locks, torch.ones_like(ids, dtype=torch.float32), 1)
                torch.testing.assert_close(out.float(), expected, rtol=2**-7, atol=1e-30)


@pytest.mark.parametrize("name", TYPES)
def test_hard_routings(name: str) -> None:
    w = layer(name)
    p, shape = prepare(w), w.shape(TOP_K)
    for tokens in (1, 2, 33, 300):
        for routing in ROUTINGS:
            b = given(tokens, routing)
            assert error(run(KERNEL.default_config(shape, H200, tokens), p, b), reference(w, b)) < 0.012
    b = given(150, "skewed")
    for c in KERNEL.configs(shape, H200):
        assert error(run(c, p, b), reference(w, b)) < 0.012, c.name


@pytest.mark.parametrize("name", TYPES)
def test_captured_in_a_graph_it_follows_new_routings(name: str) -> None:
    w = layer(name)
    p, b, workspace = prepare(w), given(20, "uniform"), Workspace()
    c = KERNEL.default_config(w.shape(TOP_K), H200, 20)
    out, side = torch.empty_like(b.hidden_states), torch.cuda.Stream()
    with torch.cuda.stream(side):
        KERNEL.launch(c, p, b, out, workspace)
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            KERNEL.launch(c, p, b, out, workspace)
    for seed, routing in enumerate(ROUTINGS):
        new = given(20, routing, seed=seed)
        for old in ("hidden_states", "topk_ids", "topk_weights"):
            getattr(b, old).copy_(getattr(new, old))
        graph.replay()
        torch.cuda.synchronize()
        assert error(out, reference(w, b)) < 0.012, routing


class TestConformance(KernelConformance):
    kernel = KERNEL
    shapes = (MoEShape(64, 8, 2048, 1024, "mxfp4"),)
    launch_shape = MoEShape(EXPERTS, TOP_K, HIDDEN, INTER, "int4-g32")
    configs = 6
