"""The problems of TritonMoE's test suite (bassrehab/triton-kernels, tests/test_moe_dispatch.py), through our layer.

Its 162 tests look at one part each: 48 at the router, 4 at the reference, 74 at permuting tokens, 8 at one grouped
GEMM, 28 at an expert's MLP or all of the layer. Here every one of them gives a problem (experts, top_k, hidden and
intermediate size, tokens, kind of routing), and a problem runs through the whole layer whatever part was meant: output
against the float32 reference, in three configurations. Many of the 162 differ in what they assert alone, so that fewer
problems are distinct: `test_every_case_is_here` counts both. Tests without an intermediate size get the 512 that
theirs of the whole layer use. Not covered, since it says nothing of a layer's output: that their router returns its
logits, dtypes of their intermediate results, and that two calls agree to the bit (ours: test_moe.py and others).
Their inputs are fp16 and pass at 1e-2 to 5e-2 an element; ours are fp16 and bf16, at 5e-3 of the norm.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import pytest
import torch
from moe_cases import error, expected
from ramp_moe import Candidate, Hardware
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.spec.launchable import Batch, MoEWeights
from ramp_moe_kernels import reference
from ramp_moe_kernels.triton.kernel import TritonMoE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 5e-3
LOGIT_SCALE = {"large-logits": 1e4, "small-logits": 1e-8}


class Problem(NamedTuple):
    """softmax, sigmoid: the best of random logits, as they are and renormalised. large-logits, small-logits: softmax of
    those. drawn: independent draws, so that a token may name an expert twice. quarter: drawn of a quarter of them."""

    experts: int
    top_k: int
    hidden: int
    inter: int
    tokens: int
    routing: str

    @property
    def work(self) -> int:
        return min(self.experts, self.tokens * self.top_k) * self.hidden * self.inter * self.tokens


SMALL, MEDIUM, LARGE, SIXTEEN = (8, 2), (64, 4), (256, 8), (16, 4)
MIXTRAL, MIXTRAL_22B, QWEN2, DEEPSEEK = (*SMALL, 4096), (*SMALL, 6144), (*MEDIUM, 3584), (*LARGE, 7168)
TOKENS = (1, 32, 128, 512)


def grid(routing: str, layers: list[tuple[int, int]], hidden: list[int], tokens: tuple[int, ...]) -> list[Problem]:
    return [Problem(*layer, h, 512, t, routing) for layer, h, t in product(layers, hidden, tokens)]


def models(routing: str, *sizes: tuple[tuple[int, int, int], int]) -> list[Problem]:
    return [Problem(*model, 512, t, routing) for model, t in sizes]


PIPELINE = grid("softmax", [SMALL, SIXTEEN], [256], (32, 128))
MODEL_PIPELINE = models("softmax", (MIXTRAL, 64), (QWEN2, 64))
PERMUTED = grid("drawn", [SMALL, MEDIUM], [128, 1024, 4096], TOKENS)
DRAWN_MLP = grid("drawn", [SMALL, SIXTEEN], [256], (32, 128, 512))
SHAPE_ONLY = grid("drawn", [SMALL], [256], (64,))
WIDE = [Problem(*SMALL, 512, 1024, 128, "drawn")]

SUITE: dict[str, list[Problem]] = {
    "router softmax": [
        *grid("softmax", [SMALL, MEDIUM, LARGE], [256], TOKENS),
        *grid("softmax", [SMALL, MEDIUM], [256], TOKENS),
        *grid("softmax", [SMALL], [128], (1, 64, 256)),
        *grid("softmax", [SMALL], [256], (128,)),
    ],
    "router sigmoid": [
        *grid("sigmoid", [SMALL, MEDIUM], [256], (1, 32, 128)),
        *grid("sigmoid", [SMALL], [128], (1, 64)),
    ],
    "router of models": [
        *models("softmax", *product((MIXTRAL, MIXTRAL_22B), (1, 128, 1024))),
        *models("softmax", (QWEN2, 1), (QWEN2, 128), (DEEPSEEK, 1), (DEEPSEEK, 32)),
    ],
    "router edges": [
        *grid("softmax", [SMALL], [256], (1, 64)),
        *grid("softmax", [(4, 4)], [128], (16,)),
        *grid("large-logits", [SMALL], [128], (32,)),
        *grid("small-logits", [SMALL], [128], (32,)),
        *grid("softmax", [SMALL], [128], (16,)),
    ],
    "reference": [
        *grid("softmax", [SMALL], [256], (32, 64)),
        *grid("drawn", [SMALL], [128], (64,)),
        *grid("sigmoid", [SMALL], [256], (32,)),
    ],
    "permute": [
        *PERMUTED,
        *grid("drawn", [SMALL], [512], (1, 64, 256)),
        *grid("drawn", [SMALL], [256], (64, 64)),
        *grid("drawn", [SMALL], [64], (128,)),
    ],
    "unpermute": [*PERMUTED, *grid("drawn", [SMALL], [512], (64,))],
    "roundtrip": [
        *grid("drawn", [SMALL, MEDIUM, LARGE], [256], TOKENS),
        *grid("drawn", [SMALL], [512], (32, 128)),
        *grid("drawn", [MEDIUM], [1024], (256,)),
        *models("drawn", (MIXTRAL, 128), (MIXTRAL, 1024), (QWEN2, 128), (DEEPSEEK, 32)),
    ],
    "grouped gemm": [*DRAWN_MLP, *SHAPE_ONLY, Problem(16, 2, 128, 256, 32, "quarter")],
    "expert mlp": [*DRAWN_MLP, *SHAPE_ONLY, *WIDE],
    "pipeline": [*PIPELINE, *MODEL_PIPELINE],
    "fused mlp": [*grid("drawn", [SMALL, SIXTEEN], [256], (32, 128)), *SHAPE_ONLY, *WIDE],
    "fused layer": [
        *PIPELINE,
        *MODEL_PIPELINE,
        *grid("softmax", [SMALL], [256], (1,)),
        *grid("sigmoid", [SMALL], [256], (32,)),
    ],
}
COUNT = Counter(problem for problems in SUITE.values() for problem in problems)
# Neighbours share their weights.
PROBLEMS = sorted(COUNT)
SMALLEST = sorted(COUNT, key=lambda p: p.work)[:5]


def test_every_case_is_here() -> None:
    assert {name: len(problems) for name, problems in SUITE.items()} == {
        "router softmax": 24, "router sigmoid": 8, "router of models": 10, "router edges": 6, "reference": 4,
        "permute": 30, "unpermute": 25, "roundtrip": 19, "grouped gemm": 8, "expert mlp": 8, "pipeline": 6,
        "fused mlp": 6, "fused layer": 8,
    }  # fmt: skip
    assert COUNT.total() == 162
    assert len(PROBLEMS) == 95


@lru_cache(maxsize=1)
def layer_weights(experts: int, hidden: int, inter: int, dtype: torch.dtype) -> MoEWeights:
    """Drawn where they are used: the largest have 2.8 billion elements."""
    generator = torch.Generator(DEVICE).manual_seed(experts + hidden)
    gate_up = torch.empty(experts, 2 * inter, hidden, dtype=dtype, device=DEVICE)
    down = torch.empty(experts, hidden, inter, dtype=dtype, device=DEVICE)
    for tensor in (gate_up, down):
        tensor.normal_(0, 0.02, generator=generator)
    return MoEWeights(gate_up, down)


def problem_batch(p: Problem, dtype: torch.dtype) -> Batch:
    generator = torch.Generator().manual_seed(p.tokens)
    x = torch.randn(p.tokens, p.hidden, generator=generator).to(dtype)
    if p.routing in ("drawn", "quarter"):
        among = p.experts // 4 if p.routing == "quarter" else p.experts
        ids = torch.randint(0, among, (p.tokens, p.top_k), generator=generator).int()
        weights = torch.randn(p.tokens, p.top_k, generator=generator).softmax(-1)
    else:
        # x times a random matrix; only the logits are scaled, as their size is the router's affair.
        logits = torch.randn(p.tokens, p.experts, generator=generator) * p.hidden**0.5
        sigmoid = p.routing == "sigmoid"
        ids, weights = reference.route(
            logits * LOGIT_SCALE.get(p.routing, 1),
            p.top_k,
            scoring="sigmoid" if sigmoid else "softmax",
            renormalise=sigmoid,
        )
    return Batch(x.to(DEVICE), ids.to(DEVICE), weights.to(DEVICE))


def check(p: Problem, dtype: torch.dtype, hardware: Hardware) -> None:
    """The static default, the last swapped configuration, and the last with atomics: its up projection is split
    where the reduction is long enough."""
    given, kernel = problem_batch(p, dtype), TritonMoE()
    weights = layer_weights(p.experts, p.hidden, p.inter, dtype)
    layer = LayerRuntime(weights, p.top_k, hardware, [kernel])
    wanted = expected(weights, given, quantise=False)
    assert wanted.norm() > 0
    # The kernel lists no path where a reduction takes less than two steps; what it lists for 128 runs there as well.
    paths = kernel.paths(replace(layer.shape, hidden_size=max(p.hidden, 128)), hardware)
    swapped = [path for path in paths if path.up.swap and not (path.atomic or path.direct)][-1]
    # Too short a reduction of the down projection cannot be split.
    atomic = [path for path in paths if path.atomic][-1:]

    out = layer(given.hidden_states, given.topk_ids, given.topk_weights)
    assert out.dtype == dtype
    assert error(out, wanted) < TOLERANCE, "default"
    for path in (swapped, *atomic):
        out = torch.full_like(given.hidden_states, float("nan"))
        layer.launch(Candidate(kernel.name, kernel.describe(path, layer.shape)), given, out)
        assert error(out, wanted) < TOLERANCE, path.name


def name_of(p: Problem) -> str:
    return f"E{p.experts}-k{p.top_k}-h{p.hidden}-i{p.inter}-t{p.tokens}-{p.routing}"


@pytest.mark.gpu
@pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_their_problems(problem: Problem, dtype: torch.dtype, h200: Hardware) -> None:
    check(problem, dtype, h200)


@pytest.mark.slow
@pytest.mark.parametrize("problem", SMALLEST, ids=name_of)
def test_the_smallest_of_their_problems(problem: Problem, h200: Hardware) -> None:
    check(problem, torch.float16, h200)
