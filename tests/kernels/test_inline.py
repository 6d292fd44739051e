"""One launch that is any of several configurations of the Triton path: the same, bit for bit, as each of them alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from moe_cases import ROUTINGS, batch, weights
from ramp_moe import Candidate, CostModel, Hardware, KernelError, MoEShape, Registry
from ramp_moe.cost_model.model import PartFit, parts_of
from ramp_moe.measurements.sweep import PATH
from ramp_moe.runtime.layer import MoELayer
from ramp_moe.spec.launchable import Batch, MoEWeights, Workspace
from ramp_moe_kernels.triton.config import GemmConfig, Path, quantises_itself
from ramp_moe_kernels.triton.kernel import TritonMoE, _path

KERNEL = TritonMoE()
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# The interpreter truncates where a GPU rounds to bf16.
HALF, HALF_DTYPE = ("bf16", torch.bfloat16) if GPU else ("fp16", torch.float16)
# Token blocks, weight rows, steps, stages, orders of tiles and of operands.
PATHS = [
    Path(GemmConfig(16, 64, 128, swap=True), GemmConfig(16, 128, 64, stages=4)),
    Path(GemmConfig(64, 32, 64, stages=4, group_m=8), GemmConfig(64, 64, 64, swap=True)),
    Path(GemmConfig(32, 128, 64, stages=2), GemmConfig(32, 64, 128, group_m=8)),
]
SPLIT = [
    Path(GemmConfig(16, 64, 64, split_k=4), GemmConfig(16, 64, 64, split_k=4)),
    Path(GemmConfig(32, 32, 64, split_k=4), GemmConfig(32, 128, 64, split_k=4, group_m=8)),
]
ATOMIC = [
    Path(GemmConfig(16, 64, 64), GemmConfig(16, 64, 64), atomic=True),
    Path(GemmConfig(64, 32, 64), GemmConfig(64, 128, 64), atomic=True),
]
FP8 = [
    Path(GemmConfig(16, 128, 128, swap=True), GemmConfig(16, 64, 128, stages=4)),
    Path(GemmConfig(64, 128, 128, group_m=8), GemmConfig(64, 128, 128, swap=True)),
]
FP8_LATER = [
    Path(GemmConfig(16, 32, 128), GemmConfig(16, 64, 128, swap=True)),
    Path(GemmConfig(32, 64, 128, swap=True, stages=4), GemmConfig(32, 128, 128)),
]
GROUPS = {"sum": PATHS, "split": SPLIT, "atomic": ATOMIC, "fp8": FP8, "fp8-later": FP8_LATER}


def check(paths: list[Path], layer: MoEWeights, given: Batch) -> None:
    """Each choice against the launch of that configuration; one workspace, so that each finds what another left."""
    configs = [KERNEL.describe(path, layer.shape(given.top_k)) for path in paths]
    assert len({KERNEL.inline_key(c, layer.shape(given.top_k)) for c in configs}) == 1
    workspace = Workspace()
    for i, config in enumerate(configs):
        alone, out = (torch.full_like(given.hidden_states, float("nan")) for _ in range(2))
        KERNEL.launch(config, layer, given, alone, Workspace())
        choice = torch.tensor([i], dtype=torch.int32, device=DEVICE)
        KERNEL.launch_inline(configs, choice, layer, given, out, workspace)
        assert not alone.isnan().any()
        if paths[0].atomic:
            torch.testing.assert_close(out, alone)  # sums of a token's rows have no order
        else:
            assert torch.equal(out, alone), config.name


@pytest.mark.parametrize("group", GROUPS)
def test_it_is_each_of_them(group: str) -> None:
    inter = 256 if group == "split" else 128  # enough steps to split
    layer = weights(4, 256, inter, "fp8" if "fp8" in group else HALF, DEVICE)
    check(GROUPS[group], layer, batch(20, 2, 4, 256, "skewed", DEVICE, HALF_DTYPE))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_routing(routing: str) -> None:
    layer = weights(4, 128, 64, HALF, DEVICE)
    check(PATHS, layer, batch(9, 3, 4, 128, routing, DEVICE, HALF_DTYPE))


def test_without_an_id_in_range() -> None:
    layer, given = weights(4, 128, 64, HALF, DEVICE), batch(3, 3, 4, 128, "uniform", DEVICE, HALF_DTYPE)
    given.topk_ids.fill_(-1)
    check(PATHS, layer, given)


def test_sizes_off_every_tile() -> None:
    layer = weights(6, 160, 96, HALF, DEVICE, "swiglu_oai", bias=True)
    check(PATHS, layer, batch(9, 2, 6, 160, "uniform", DEVICE, HALF_DTYPE))


def test_what_one_launch_can_be(registry: Registry, h200: Hardware) -> None:
    for dtype in ("bf16", "fp8"):
        shape = registry.shape("olmoe-1b-7b", dtype)
        groups: dict[object, list[Path]] = {}
        for config in KERNEL.configs(shape, h200):
            key, path = KERNEL.inline_key(config, shape), _path(config)
            assert (key is None) == path.direct
            groups.setdefault(key, []).append(path)
        del groups[None]
        assert {p.up.block_m for p in max(groups.values(), key=len)} == {16, 32, 64}
        for paths in groups.values():
            for a, b in itertools.pairwise(paths):
                assert (a.up.warps, a.down.warps, a.atomic) == (b.up.warps, b.down.warps, b.atomic)
                assert (a.up.split_k, a.down.split_k) == (b.up.split_k, b.down.split_k)
                assert dtype == "bf16" or quantises_itself(a.up) == quantises_itself(b.up)


def test_a_kernel_need_not_offer_it(h200: Hardware) -> None:
    from layer_cases import SHAPE, FakeKernel, inputs, layer

    kernel, moe = FakeKernel(), layer(h200)
    given = Batch(*inputs(3))
    candidates = [Candidate("fake", c) for c in kernel.configs(SHAPE, h200)]
    assert {moe.inline_key(c) for c in candidates} == {None}
    with pytest.raises(KernelError, match="fake cannot be several configurations in one launch"):
        moe.launch_inline(candidates, torch.zeros(1).int(), given, torch.empty_like(given.hidden_states))


def model_of(shape: MoEShape, paths: list[Path], us_a_cta: list[float], hardware: Hardware) -> CostModel:
    """Each path costs so many microseconds for each of its CTAs."""
    candidates = [Candidate(KERNEL.name, KERNEL.describe(path, shape)) for path in paths]
    fits = {}
    for candidate, us in zip(candidates, us_a_cta, strict=True):
        (part,) = parts_of(candidate, [PATH])
        fits[part.key] = PartFit(part, (1.0, 0.0, us, 0.0), 1, 0.0, 0.0, (0.0, 1e9), (0, shape.num_experts), 0.0)
    return CostModel(shape, hardware, "active", candidates, fits, [PATH], ["made up"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_in_a_graph_every_replay_is_what_it_chose(dtype: str, h200: Hardware) -> None:
    layer = weights(16, 512, 256, dtype, "cuda")
    k = 128 if dtype == "fp8" else 64  # 128 bytes, whatever the dtype: three stages of the widest fit in shared memory
    gemms = [GemmConfig(16, 128, k, swap=True), GemmConfig(32, 128, k, stages=2), GemmConfig(64, 128, k)]
    # The fuller an expert's tiles, the larger the block that wins.
    paths = [Path(gemm, gemm) for gemm in gemms]
    model = model_of(layer.shape(4), paths, [10.0, 15.0, 22.0], h200)
    moe = MoELayer(layer, 4, h200, [KERNEL], model, mode="inline")
    given = batch(64, 4, 16, 512, "uniform", "cuda", torch.bfloat16)
    out, graph, side = torch.empty_like(given.hidden_states), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(side):
        plan = moe.warm_up(64, torch.bfloat16)
        side.synchronize()
        with torch.cuda.graph(graph, stream=side):
            moe(given.hidden_states, given.topk_ids, given.topk_weights, out)
    assert plan is not None
    assert plan.selector is not None
    assert (plan.mode, len(plan.bodies) > 1) == ("inline", True)
    chosen = set()
    for seed in range(200):
        new = batch(64, 4, 16, 512, ROUTINGS[seed % len(ROUTINGS)], "cuda", torch.bfloat16, seed)
        for old, fresh in (
            (given.hidden_states, new.hidden_states),
            (given.topk_ids, new.topk_ids),
            (given.topk_weights, new.topk_weights),
        ):
            old.copy_(fresh)
        out.fill_(float("nan"))
        graph.replay()
        choice = int(plan.selector.choice)
        chosen.add(choice)
        alone = torch.empty_like(out)
        moe.launch(plan.bodies[choice], new, alone)
        assert torch.equal(out, alone), (seed, plan.bodies[choice].name)
    assert chosen == set(range(len(plan.bodies)))
