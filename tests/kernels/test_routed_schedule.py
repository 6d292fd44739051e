"""Routing and sorting in one launch, against vLLM's router in plain torch, and the schedule's own sort."""

from __future__ import annotations

import pytest
import torch
from ramp_moe.plugin import RouterLogits
from ramp_moe_kernels import reference
from ramp_moe_kernels.triton.routed_schedule import MAX_SCORES, launch_routed_schedule, takes
from test_schedule import check, poisoned
from tiers import slow_except

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ("random", "equal", "skewed", "huge", "nan", "infinite", "padded", "all padded")
SHAPES = (
    *((5, 64, 8, 8), (3, 60, 6, 32), (1, 64, 8, 16), (16, 64, 8, 64), (8, 128, 8, 16), (4, 256, 8, 16)),
    *((16, 8, 2, 128), (64, 8, 2, 16), (4, 10, 1, 8), (1, 8, 1, 16)),
)
"""Tokens, experts, top_k and block."""


def logits_of(kind: str, tokens: int, experts: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    found = torch.randn(tokens, experts, generator=g)
    if kind == "equal":
        found = found.mul(2).round()
    elif kind == "skewed":
        found[:, experts // 2 :] += 6
    elif kind == "huge":
        found *= 1e4
    elif kind == "nan":
        found[0, 1] = float("nan")
    elif kind == "infinite":
        found[0, experts - 1], found[-1, 0] = float("inf"), -float("inf")
    return found.to(dtype).to(DEVICE)


def padding_of(kind: str, tokens: int) -> torch.Tensor | None:
    if "padded" not in kind:
        return None
    rows = torch.arange(tokens, device=DEVICE)
    return rows >= 0 if kind == "all padded" else rows >= (tokens + 1) // 2


def by_vllm(router: RouterLogits, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights as vLLM 0.33 defines them."""
    given = router.logits.cpu().float()
    scores = given.sigmoid() if router.sigmoid else (given - given.amax(1, True)).exp()
    scores = scores if router.sigmoid else scores / scores.sum(1, keepdim=True)
    scores = scores.masked_fill(~scores.isfinite(), 0.0)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    weights = scores.gather(1, order)
    if router.renormalise:
        total = weights.sum(1, keepdim=True)
        weights = weights / total.where(total > 0, 1.0)
    if router.padding is not None:
        order = order.masked_fill(router.padding.cpu()[:, None], -1)
    return order.int(), weights


def route_and_check(
    router: RouterLogits, top_k: int, block: int, x: torch.Tensor | None = None, zero: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    tokens, experts = router.logits.shape
    ids = torch.full((tokens, top_k), -77, dtype=torch.int32, device=DEVICE)
    weights = torch.full((tokens, top_k), float("nan"), dtype=torch.float32, device=DEVICE)
    out, quantised = poisoned(tokens * top_k, experts, block), None
    if x is not None:
        groups = tokens, x.shape[1] // reference.GROUP
        quantised = (
            torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=DEVICE),
            torch.empty(groups, dtype=torch.float32, device=DEVICE),
        )
    launch_routed_schedule(
        router, ids, weights, block, out, None if x is None or quantised is None else (x, *quantised), zero
    )
    expected, scores = by_vllm(router, top_k)
    assert ids.cpu().tolist() == expected.tolist()
    live = expected >= 0
    torch.testing.assert_close(weights.cpu()[live], scores[live], rtol=2e-5, atol=1e-30)
    check(out, ids, experts, block)
    return quantised


def check_both_scorings(shape: tuple[int, int, int, int], kind: str) -> None:
    tokens, experts, top_k, block = shape
    for sigmoid, renormalise, dtype in ((False, True, torch.bfloat16), (True, False, torch.float32)):
        router = RouterLogits(logits_of(kind, tokens, experts, dtype), sigmoid, renormalise, padding_of(kind, tokens))
        route_and_check(router, top_k, block)


SMALL = {
    (5, 32, 4, 8): ("random", "infinite", "all padded"),
    (3, 12, 6, 32): ("nan", "equal"),
    (4, 8, 2, 16): ("padded", "huge"),
}
CASES = [(shape, kind) for shape, kinds in SMALL.items() for kind in kinds]


@pytest.mark.parametrize("case", slow_except([(s, kinds[0]) for s, kinds in SMALL.items()], CASES), ids=str)
def test_ids_weights_and_order(case: tuple[tuple[int, int, int, int], str]) -> None:
    check_both_scorings(*case)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gpu_ids_weights_and_order(shape: tuple[int, int, int, int], kind: str) -> None:
    check_both_scorings(shape, kind)


def test_rows_may_lie_apart() -> None:
    wide = logits_of("random", 4, 96, torch.bfloat16)
    route_and_check(RouterLogits(wide[:, :64]), 8, 16)


def test_activations_are_quantised_and_an_output_is_zeroed_beside() -> None:
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1)).to(torch.float16).to(DEVICE)
    zero = torch.full((5, 8192), 3.0, dtype=torch.float16, device=DEVICE)
    found = route_and_check(RouterLogits(logits_of("random", 5, 64, torch.float32)), 8, 16, x, zero)
    assert found is not None
    expected, scale = reference.quantise_activations(x)
    torch.testing.assert_close(found[1], scale)
    torch.testing.assert_close(found[0].float(), expected.float(), rtol=0.07, atol=0)
    assert bool((zero == 0).all())


def test_large_batches_are_left_to_two_launches() -> None:
    assert takes(MAX_SCORES // 64, 64, 8)
    assert not takes(MAX_SCORES // 64 + 1, 64, 8)
    assert takes(MAX_SCORES // 128, 100, 8)
    assert not takes(0, 64, 8)
    assert not takes(1, 64, 17)
    assert not takes(1, 4, 8)
