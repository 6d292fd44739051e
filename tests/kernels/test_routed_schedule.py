"""Routing and scheduling in one launch, against vLLM's rules in torch and against `schedule` of the ids chosen."""

from __future__ import annotations

import itertools
from dataclasses import fields

import pytest
import torch
from each_target import compile_for_each_target
from moe_cases import H200
from moe_cases import weights as layer_weights
from ramp_moe.plugin import Batch, RouterLogits, Workspace
from ramp_moe_kernels import reference
from ramp_moe_kernels.triton.kernel import TritonMoE
from ramp_moe_kernels.triton.routed_schedule import launch_routed_schedule, takes
from ramp_moe_kernels.triton.schedule import Schedule, allocate, schedule
from tiers import slow_except

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POISON = -77
RULES = [(sigmoid, renormalise) for sigmoid in (False, True) for renormalise in (False, True)]
"""Whether scores are sigmoids, and weights are divided by their sum."""
KINDS = ("random", "ties", "equal", "tiny", "wide", "nan", "inf", "-inf", "nothing", "underflow")
# The interpreter computes with numpy, which warns where a GPU does not: of padding's inf - inf, of a NaN input.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero):RuntimeWarning")


def vllms(router: RouterLogits, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What vLLM 0.33's operators topk_softmax and topk_sigmoid give: ids int32 and weights float32, `[T, k]`."""
    given = router.logits.float()
    scores = given.sigmoid() if router.sigmoid else given.softmax(-1)
    scores = torch.where(scores.isfinite(), scores, 0.0)
    weights, ids = torch.sort(scores, dim=-1, descending=True, stable=True)
    weights, ids = weights[:, :top_k], ids[:, :top_k].int()
    if router.renormalise:
        total = weights.sum(-1, keepdim=True)
        weights = weights / torch.where(total > 0, total, 1.0)
    return ids if router.padding is None else ids.masked_fill(router.padding[:, None], -1), weights


def logits_of(kind: str, tokens: int, experts: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x, chance = torch.randn(tokens, experts, generator=g) * 2, torch.rand(tokens, experts, generator=g)
    changed = {
        "ties": x.round(),
        "equal": torch.zeros_like(x),
        "tiny": x * 1e-9,
        "wide": x * 40,
        "nan": x.masked_fill(chance < 0.1, torch.nan),
        "inf": x.masked_fill(chance < 0.1, torch.inf),
        "-inf": x.masked_fill(chance < 0.7, -torch.inf),
        "nothing": torch.full_like(x, -torch.inf),
        "underflow": x.index_fill(1, torch.tensor([experts // 2]), 300.0),
    }
    return changed.get(kind, x).to(dtype).to(DEVICE)


def poisoned(num_ids: int, experts: int, block: int) -> Schedule:
    out = allocate(num_ids, experts, block, DEVICE)
    for buffer in (out.sorted_token_ids, out.expert_ids, out.num_tokens_post_padded, out.histogram):
        buffer.fill_(POISON)
    return out


def check(
    logits: torch.Tensor, top_k: int, rules: tuple[bool, bool] = (False, True), block: int = 16, padded: bool = False
) -> None:
    """Equal ids in vLLM's order, equal weights up to rounding, and the schedule of these ids to the bit."""
    tokens, experts = logits.shape
    router = RouterLogits(logits, *rules, torch.arange(tokens, device=DEVICE) % 3 == 1 if padded else None)
    out = poisoned(tokens * top_k, experts, block)
    weights = torch.full((tokens, top_k), torch.nan, dtype=torch.float32, device=DEVICE)
    ids = torch.full((tokens, top_k), POISON, dtype=torch.int32, device=DEVICE)
    launch_routed_schedule(router, ids, weights, block, out)
    expected_ids, expected = vllms(router, top_k)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-30)
    check_schedule(out, ids, experts, block)


def check_schedule(out: Schedule, ids: torch.Tensor, experts: int, block: int) -> None:
    expected = poisoned(ids.numel(), experts, block)
    schedule(ids, experts, block, expected)
    for field in fields(Schedule):
        if field.name != "partial":
            assert torch.equal(getattr(out, field.name), getattr(expected, field.name)), field.name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_what_vllm_chooses(kind: str, rules: tuple[bool, bool]) -> None:
    for seed, (tokens, padded) in enumerate(((1, False), (5, True))):
        check(logits_of(kind, tokens, 12, seed=seed), 2, rules, padded=padded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_logits(dtype: torch.dtype) -> None:
    for kind in ("random", "ties"):
        check(logits_of(kind, 7, 64, dtype), 8)


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (3, 3), (60, 4), (128, 8), (72, 22)])
def test_any_experts_and_top_k(experts: int, top_k: int) -> None:
    check(logits_of("random", 3, experts), top_k)


def test_rows_may_lie_apart() -> None:
    check(logits_of("random", 4, 24)[:, 3:15], 2)


@pytest.mark.parametrize("block", slow_except([7], [1, 7, 8, 64, 128, 256]))
def test_any_block(block: int) -> None:
    for kind in ("random", "equal"):  # equal logits give all tokens to the first experts: several tiles, whole ones
        check(logits_of(kind, 40, 8), 2, block=block, padded=kind == "random")


def test_every_row_is_padding() -> None:
    out = poisoned(8, 8, 16)
    weights, ids = torch.empty(4, 2, device=DEVICE), torch.empty(4, 2, dtype=torch.int32, device=DEVICE)
    router = RouterLogits(logits_of("random", 4, 8), padding=torch.ones(4, dtype=torch.bool, device=DEVICE))
    launch_routed_schedule(router, ids, weights, 16, out)
    assert bool((ids == -1).all())
    assert out.num_tokens_post_padded.tolist() == [0]
    assert bool((out.expert_ids == -1).all())
    assert not out.histogram.any()


def test_work_beside() -> None:
    tokens, hidden = 5, 256
    router = RouterLogits(logits_of("random", tokens, 8))
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(1)).half().to(DEVICE)
    x_fp8 = torch.full((tokens, hidden), 3.0, device=DEVICE).to(torch.float8_e4m3fn)
    x_scale = torch.full((tokens, hidden // 128), torch.nan, device=DEVICE)
    zero = torch.full((2 * tokens, hidden), torch.nan, dtype=torch.float16, device=DEVICE)
    weights, ids = torch.empty(tokens, 2, device=DEVICE), torch.empty(tokens, 2, dtype=torch.int32, device=DEVICE)
    out = poisoned(2 * tokens, 8, 16)
    launch_routed_schedule(router, ids, weights, 16, out, (x, x_fp8, x_scale), zero[:tokens])
    expected, expected_scale = reference.quantise_activations(x)
    assert torch.equal(x_fp8.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(x_scale, expected_scale)
    assert bool((zero[:tokens] == 0).all())
    assert bool(zero[tokens:].isnan().all())
    assert torch.equal(ids, vllms(router, 2)[0])
    check_schedule(out, ids, 8, 16)


def test_ids_alone() -> None:
    router = RouterLogits(logits_of("ties", 3, 12))
    weights, ids = torch.empty(3, 2, device=DEVICE), torch.empty(3, 2, dtype=torch.int32, device=DEVICE)
    launch_routed_schedule(router, ids, weights)
    expected_ids, expected = vllms(router, 2)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("path", ["direct", "scheduled", "atomic"])
def test_a_layer_from_logits(path: str) -> None:
    """It computes what it computes from the ids that vLLM's rules give."""
    of, kernel = layer_weights(8, 128, 512, "fp16", DEVICE), TritonMoE()
    shape, prepared = of.shape(2), kernel.prepare(of)
    wanted = {"direct": path == "direct", "atomic": path == "atomic"}.items()
    config = next(c for c in kernel.configs(shape, H200) if wanted <= dict(c.params).items())
    assert kernel.routes(config, shape, 3)
    router = RouterLogits(logits_of("random", 3, 8))
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(2)).half().to(DEVICE)
    ids, weights = vllms(router, 2)
    out, expected, workspace = torch.empty_like(x), torch.empty_like(x), Workspace()
    kernel.launch(config, prepared, Batch(x, ids.contiguous(), weights.contiguous()), expected, workspace)
    chosen = Batch(x, torch.full_like(ids, -1).contiguous(), torch.zeros_like(weights).contiguous())
    kernel.launch_routed(config, prepared, router, chosen, out, workspace)
    assert torch.equal(chosen.topk_ids, ids)
    assert float(expected.float().norm()) > 0
    assert float((out.float() - expected.float()).norm() / expected.float().norm()) < 1e-3


def test_what_one_launch_takes() -> None:
    assert takes(1, 256, 8)
    assert takes(64, 128, 8)
    for tokens, experts, top_k in ((0, 64, 8), (65, 8, 2), (33, 256, 8), (1, 16_384, 8), (1, 8, 9), (1, 8, 0)):
        assert not takes(tokens, experts, top_k)


COMPILE = """
    import sys
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from ramp_moe_kernels.triton import routed_schedule

    backend, arch, lanes = sys.argv[1:]
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(lanes))
    kernel = routed_schedule.routed_schedule_kernel
    names = ("topk_ids", "sorted_token_ids", "expert_ids", "num_tokens_post_padded", "histogram")
    pointers = dict.fromkeys(names, "*i32") | {"topk_weights": "*fp32"}
    activations = {"x": "*bf16", "x_fp8": "*fp8e4nv", "x_scale": "*fp32", "zero": "*bf16"}
    for tokens, experts, top_k, sigmoid, logits, padding, beside, scheduled in (
        (1, 64, 8, False, "*bf16", "*i1", True, True), (64, 128, 8, False, "*bf16", "*i1", False, True),
        (8, 256, 22, True, "*fp32", None, False, True), (32, 8, 2, False, "*fp16", None, True, True),
        (2, 128, 8, False, "*bf16", None, False, False),
    ):
        beside = beside and target.arch != 80
        rows = triton.next_power_of_2(tokens)
        known = pointers | (activations if beside else dict.fromkeys(activations))
        known |= {"logits": logits, "padding": padding, "E": experts, "K": top_k, "ROWS": rows, "P": experts}
        known |= {"SLOTS": triton.next_power_of_2(top_k), "SIGMOID": sigmoid, "RENORMALISE": True, "UNROLL": top_k < 17}
        known |= {"GROUPS": 4, "GROUP": 128, "ZERO": 1024, "EMULATE_FP8": False, "PDL": target.arch == 90}
        known |= {} if scheduled else dict.fromkeys(names[1:])
        types = {name: known.get(name, "i32") for name in kernel.arg_names}
        signature = {name: t if isinstance(t, str) else "constexpr" for name, t in types.items()}
        constants = {name: t for name, t in types.items() if not isinstance(t, str)}
        warps = routed_schedule._warps(rows * experts)
        triton.compile(ASTSource(kernel, signature, constants), target=target, options={"num_warps": warps})
"""


@pytest.mark.slow
def test_it_compiles() -> None:
    compile_for_each_target(COMPILE)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 3, 8, 32, 64])
def test_gpu(kind: str, tokens: int) -> None:
    for (experts, top_k), sigmoid in itertools.product(((8, 2), (60, 4), (64, 8), (128, 8), (256, 8)), (False, True)):
        if takes(tokens, experts, top_k):
            rules = sigmoid, tokens % 2 == 0
            check(logits_of(kind, tokens, experts, torch.bfloat16, tokens), top_k, rules, 64, padded=tokens == 8)


@pytest.mark.gpu
def test_graph_replays_with_other_logits() -> None:
    logits, out = logits_of("random", 16, 64), poisoned(128, 64, 16)
    weights, ids = torch.empty(16, 8, device=DEVICE), torch.empty(16, 8, dtype=torch.int32, device=DEVICE)
    given, twice, router = logits.clone(), 2 * torch.eye(64, device=DEVICE), RouterLogits(logits)

    def step() -> None:
        torch.mm(given, twice, out=logits)  # which the launch must wait for
        launch_routed_schedule(router, ids, weights, 16, out)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for seed, kind in enumerate(KINDS[:5]):
        given.copy_(logits_of(kind, 16, 64, seed=seed))
        for buffer in (out.sorted_token_ids, out.expert_ids, out.num_tokens_post_padded, out.histogram):
            buffer.fill_(POISON)
        graph.replay()
        assert torch.equal(ids, vllms(router, 8)[0])
        check_schedule(out, ids, 64, 16)
