"""The router kernel against the reference: in Triton's interpreter without a GPU, compiled with one."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from each_target import compile_for_each_target
from ramp_moe import KernelError, ShapeError, UnknownNameError
from tiers import slow_except

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
reference = pytest.importorskip("ramp_moe_kernels.reference")
router = pytest.importorskip("ramp_moe_kernels.triton.router")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCORINGS = ["softmax", "sigmoid"]
CLOSE = {"rtol": 1e-5 if DEVICE == "cuda" else 2e-6, "atol": 1e-30}  # a GPU's exp and division are approximate
# The interpreter computes with numpy, which warns where a GPU does not: of padding's inf - inf, of a NaN input.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero):RuntimeWarning")


def random_logits(tokens: int, num_experts: int, dtype=torch.float32, seed: int = 0):
    return (torch.randn(tokens, num_experts, generator=torch.Generator().manual_seed(seed)) * 2).to(dtype)


def random_bias(num_experts: int, seed: int = 1):
    return torch.randn(num_experts, generator=torch.Generator().manual_seed(seed)) / 4


def on_device(logits, top_k, bias=None, **how):
    ids, weights = router.route(logits.to(DEVICE), top_k, bias=None if bias is None else bias.to(DEVICE), **how)
    assert (ids.dtype, weights.dtype) == (torch.int32, torch.float32)
    return ids.cpu(), weights.cpu()


def check(logits, top_k, **how) -> None:
    """Equal ids, in order; equal weights up to rounding, NaN for NaN."""
    ids, weights = on_device(logits, top_k, **how)
    expected_ids, expected = reference.route(logits, top_k, **how)
    torch.testing.assert_close(ids, expected_ids, rtol=0, atol=0)
    torch.testing.assert_close(weights, expected, equal_nan=True, **CLOSE)


# --- Small cases: everywhere -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", range(1, 17))
def test_every_top_k(top_k) -> None:
    check(random_logits(5, 16), top_k, scoring=SCORINGS[top_k % 2], renormalise=top_k % 3 > 0, scale=1.5)


@pytest.mark.parametrize("num_experts", slow_except([3, 60, 64], [1, 2, 3, 8, 60, 64, 257, 1000, 1024]))
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("biased", [False, True])
def test_every_number_of_experts(num_experts, scoring, biased) -> None:
    bias = random_bias(num_experts) if biased else None
    tokens = 70 if num_experts <= 8 else 5
    check(random_logits(tokens, num_experts), min(8, num_experts), scoring=scoring, bias=bias)


@pytest.mark.parametrize("dtype", router.DTYPES, ids=str)
@pytest.mark.parametrize("scoring", SCORINGS)
def test_every_dtype(dtype, scoring) -> None:
    check(random_logits(6, 64, dtype), 6, scoring=scoring)
    check(random_logits(6, 64, dtype), 6, scoring=scoring, bias=random_bias(64).to(dtype), renormalise=False)


@pytest.mark.parametrize(
    ("num_experts", "num_groups", "topk_groups", "top_k"),
    [(256, 8, 4, 8), (160, 8, 3, 6), (16, 2, 1, 8), (12, 6, 2, 3), (12, 12, 5, 5), (60, 3, 2, 4), (8, 4, 4, 2)],
)
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("biased", [False, True])
def test_groups(num_experts, num_groups, topk_groups, top_k, scoring, biased) -> None:
    groups = {"num_groups": num_groups, "topk_groups": topk_groups}
    bias = random_bias(num_experts) if biased else None
    check(random_logits(5, num_experts), top_k, scoring=scoring, bias=bias, scale=2.5, **groups)


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("groups", slow_except([(4, 2)], [(1, 1), (4, 2), (6, 4)]))
def test_ties_go_to_the_lowest_index(scoring, biased, groups) -> None:
    how = {"scoring": scoring, "num_groups": groups[0], "topk_groups": groups[1]}
    how["bias"] = torch.arange(24) % 2 / 4 if biased else None
    check(torch.zeros(3, 24), 8, **how)
    check(torch.tensor([0.0, -0.0]).repeat(3, 12), 8, **how)
    few = torch.randint(0, 3, (40, 24), generator=torch.Generator().manual_seed(2))
    check(few.float(), 8, **how)


@pytest.mark.parametrize("biased", [False, True])
def test_sigmoid_scores_that_round_to_one_number_tie(biased) -> None:
    """As in the models' own code, which gives rounded scores to `torch.topk`: the order of the logits is lost."""
    logits = torch.tensor([[20.0, 30.0, 0.0, 25.0], [5.0, 18.0, 40.0, 17.5]])
    bias = torch.zeros(4) if biased else None
    check(logits, 2, scoring="sigmoid", bias=bias)
    ids, _ = on_device(logits, 3, scoring="sigmoid", bias=bias)
    assert ids.tolist() == [[0, 1, 3], [1, 2, 3]]
    values, _ = logits.sigmoid().topk(3)
    assert torch.equal(values, logits.sigmoid().gather(1, ids.long()))


def test_softmax_scores_that_underflow_keep_the_order_of_their_logits() -> None:
    ids, _ = on_device(torch.tensor([[200.0, -30.0, -40.0, -35.0]]), 4)
    assert ids.tolist() == [[0, 1, 3, 2]]


@pytest.mark.slow
@pytest.mark.parametrize(("num_experts", "top_k"), [(22, 22), (64, 17), (72, 22), (128, 32), (512, 100)])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_many_experts_a_token(num_experts, top_k, scoring) -> None:
    check(random_logits(4, num_experts), top_k, scoring=scoring, bias=random_bias(num_experts))
    check(random_logits(4, num_experts, torch.bfloat16), top_k, scoring=scoring)


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
def test_nan_and_infinity_stay_in_their_tokens(scoring, biased, groups) -> None:
    how = {"scoring": scoring, "num_groups": groups[0], "topk_groups": groups[1]}
    how["bias"] = random_bias(20) if biased else None
    logits = random_logits(9, 20)
    logits[1, 7] = logits[2, 3:9] = logits[3] = torch.nan
    logits[4, 5], logits[5, 6], logits[6] = torch.inf, -torch.inf, -torch.inf
    logits[7, 2], logits[7, 11] = torch.nan, torch.inf
    check(logits, 5, **how)
    ids, weights = on_device(logits, 5, **how)
    assert all(len(set(row)) == 5 and 0 <= min(row) <= max(row) < 20 for row in ids.tolist())
    assert not weights[[0, 5, 8]].isnan().any()
    assert weights[[1, 2, 3, 7]].isnan().any(-1).all()


def test_minus_infinity_in_the_bias_stays_behind_the_groups() -> None:
    bias = torch.zeros(12)
    bias[[1, 2, 4, 5, 6, 7]] = -torch.inf
    check(random_logits(6, 12), 6, bias=bias, num_groups=4, topk_groups=2, scoring="sigmoid")
    check(random_logits(6, 12), 12, bias=bias, num_groups=4, topk_groups=4)
    bias[3] = torch.nan
    check(random_logits(6, 12), 6, bias=bias, num_groups=4, topk_groups=2)


def test_scores_that_underflow_are_zero_and_not_nan() -> None:
    check(torch.full((3, 10), -200.0), 4, scoring="sigmoid")
    check(torch.tensor([[0.0, -200.0, -300.0]]), 3)


def test_no_tokens_no_launch(monkeypatch) -> None:
    monkeypatch.setattr(router, "router_kernel", None)
    ids, weights = router.route(torch.empty(0, 64, device=DEVICE), 8)
    assert (ids.shape, weights.shape) == ((0, 8), (0, 8))
    assert (ids.dtype, weights.dtype) == (torch.int32, torch.float32)


@pytest.mark.parametrize(("num_experts", "tokens"), [(8, 33), (60, 7)])
def test_out_is_filled_and_nothing_beyond_it(num_experts, tokens) -> None:
    logits = random_logits(tokens, 2 * num_experts)
    ids = torch.full((tokens + 40, 3), -7, dtype=torch.int32, device=DEVICE)
    weights = torch.full((tokens + 40, 3), -7.0, device=DEVICE)
    out = ids[:tokens], weights[:tokens]
    rows = logits[:, :num_experts].to(DEVICE)  # rows of a wider tensor
    filled = router.route(rows, 3, out=out)
    assert all(a is b for a, b in zip(filled, out, strict=True))
    expected_ids, expected = reference.route(logits[:, :num_experts], 3)
    assert torch.equal(out[0].cpu(), expected_ids)
    torch.testing.assert_close(out[1].cpu(), expected, **CLOSE)
    assert (ids[tokens:] == -7).all()
    assert (weights[tokens:] == -7).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"top_k": 65}, ShapeError, r"top_k must lie in \[1, 64\]"),
        ({"top_k": 0}, ShapeError, r"top_k must lie in \[1, 64\]"),
        ({"logits": (4, 1025)}, KernelError, "up to 1024 experts, not 1025"),
        ({"logits": (4,)}, ShapeError, r"\[tokens, experts\]"),
        ({"num_groups": 7}, ShapeError, "do not divide into 7 groups"),
        ({"num_groups": 32, "topk_groups": 3}, ShapeError, "exceeds the 6 experts of 3 groups"),
        ({"scoring": "softmin"}, UnknownNameError, "softmax"),
        ({"dtype": torch.float64}, KernelError, "router logits must be float32 or bfloat16 or float16, not float64"),
        ({"dtype": torch.int32}, KernelError, "not int32"),
        ({"bias": (63,)}, ShapeError, r"must be \[64\]"),
        ({"bias": (64,), "bias_dtype": torch.float64}, KernelError, "the router's bias must be float32"),
        ({"transposed": True}, KernelError, "contiguous"),
        ({"out": (4, 7)}, ShapeError, r"ids must be \[4, 8\]"),
        ({"out": (4, 8), "out_dtype": torch.int64}, KernelError, "router's ids must be int32, not int64"),
    ],
)
def test_refuses(change, error, message) -> None:
    how = {"top_k": 8} | change
    logits = torch.zeros(how.pop("logits", (4, 64)), dtype=how.pop("dtype", torch.float32), device=DEVICE)
    if how.pop("transposed", False):
        logits = logits.T.contiguous().T
    if "bias" in how:
        how["bias"] = torch.zeros(how["bias"], dtype=how.pop("bias_dtype", torch.float32), device=DEVICE)
    if "out" in how:
        ids = torch.zeros(how["out"], dtype=how.pop("out_dtype", torch.int32), device=DEVICE)
        how["out"] = ids, torch.zeros(how["out"], device=DEVICE)
    with pytest.raises(error, match=message):
        router.route(logits, **how)


# --- Compilation for GPUs that need not be there ---------------------------------------------------------------------

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ramp_moe_kernels.triton import router

backend, arch, lanes = sys.argv[1:]
target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(lanes))
names = router.router_kernel.arg_names
for experts, k, groups, topk_groups, sigmoid, biased, dtype in [
    (64, 8, 1, 1, False, False, "*bf16"),
    (160, 6, 8, 3, False, False, "*fp32"),
    (256, 8, 8, 4, True, True, "*fp32"),
    (1024, 16, 1, 1, True, True, "*fp16"),
    (1000, 4, 200, 50, False, True, "*fp32"),
    (512, 32, 1, 1, True, False, "*bf16"),
]:
    rows, warps = router._launch_shape(experts, groups)
    constants = dict(E=experts, K=k, G=groups, TOPK_GROUPS=topk_groups, SIGMOID=sigmoid, RENORMALISE=True, ROWS=rows)
    types = dict(logits_ptr=dtype, ids_ptr="*i32", weights_ptr="*fp32", num_tokens="i32", stride="i32", scale="fp32")
    if biased:
        types["bias_ptr"] = "*fp32"
    else:
        constants["bias_ptr"] = None
    signature = {name: types.get(name, "constexpr") for name in names}
    source = ASTSource(router.router_kernel, signature, constants)
    compiled = triton.compile(source, target=target, options={"num_warps": warps})
    assert compiled.asm["cubin" if backend == "cuda" else "hsaco"]
"""


@pytest.mark.slow
def test_compiles(tmp_path: Path) -> None:
    compile_for_each_target(COMPILE, TRITON_CACHE_DIR=str(tmp_path))


# --- Large cases: with a GPU -----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 131, 8192])
@pytest.mark.parametrize(
    ("num_experts", "top_k"), [(8, 2), (60, 4), (64, 8), (128, 8), (257, 16), (512, 10), (1024, 16)]
)
@pytest.mark.parametrize(
    ("scoring", "dtype"), [(s, d) for s in SCORINGS for d in router.DTYPES if (s, d) != ("sigmoid", torch.float32)]
)
def test_gpu_unbiased_ids_are_those_of_the_reference(tokens, num_experts, top_k, scoring, dtype) -> None:
    # bf16 and fp16 logits tie all the time
    check(random_logits(tokens, num_experts, dtype), top_k, scoring=scoring)


@pytest.mark.gpu
@pytest.mark.parametrize(("num_experts", "top_k"), [(72, 22), (128, 32), (1024, 40)])
def test_gpu_many_experts_a_token(num_experts, top_k) -> None:
    check(random_logits(131, num_experts, torch.bfloat16), top_k, scoring="sigmoid")
    check(random_logits(131, num_experts), top_k)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 131, 8192])
@pytest.mark.parametrize(("num_experts", "num_groups", "topk_groups"), [(160, 8, 3), (256, 8, 4), (1000, 200, 50)])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_gpu_unbiased_groups(tokens, num_experts, num_groups, topk_groups, scoring) -> None:
    groups = {"num_groups": num_groups, "topk_groups": topk_groups}
    dtype = torch.bfloat16 if scoring == "sigmoid" else torch.float32  # whose sigmoids differ by more than a GPU's exp
    check(random_logits(tokens, num_experts, dtype), 8, scoring=scoring, scale=2.5, **groups)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 131, 8192])
@pytest.mark.parametrize(
    ("num_experts", "num_groups", "topk_groups", "top_k"), [(256, 8, 4, 8), (384, 1, 1, 8), (1000, 200, 50, 16)]
)
@pytest.mark.parametrize("scoring", SCORINGS)
def test_gpu_biased(tokens, num_experts, num_groups, topk_groups, top_k, scoring) -> None:
    """A GPU's exp rounds otherwise than torch's on the CPU: where scores all but tie, their order may differ."""
    logits, bias = random_logits(tokens, num_experts), random_bias(num_experts)
    how = {"scoring": scoring, "bias": bias, "num_groups": num_groups, "topk_groups": topk_groups}
    ids, weights = on_device(logits, top_k, **how)
    expected_ids, expected = reference.route(logits, top_k, **how)
    same = (ids == expected_ids).all(-1)
    assert int((~same).sum()) <= tokens // 200 + (tokens > 1)
    torch.testing.assert_close(weights[same], expected[same], **CLOSE)
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    merit = (scores + bias).gather(1, ids.long())
    expected_merit = (scores + bias).gather(1, expected_ids.long())
    assert (ids.sort(-1).values.diff(dim=-1) > 0).all()
    if num_groups == 1:
        torch.testing.assert_close(merit, expected_merit, rtol=0, atol=1e-6)


@pytest.mark.gpu
def test_gpu_many_rows() -> None:
    check(random_logits(65_537, 8, torch.bfloat16), 2)
    check(random_logits(65_537, 128, torch.bfloat16), 8)


@pytest.mark.gpu
def test_gpu_graph_replay_follows_its_inputs() -> None:
    logits = torch.zeros(96, 128, device=DEVICE)
    out = torch.empty(96, 8, dtype=torch.int32, device=DEVICE), torch.empty(96, 8, device=DEVICE)
    router.route(logits, 8, out=out)  # compile
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        router.route(logits, 8, out=out)
    for seed in range(3):
        fresh = random_logits(96, 128, seed=seed)
        logits.copy_(fresh)
        graph.replay()
        expected_ids, expected = reference.route(fresh, 8)
        assert torch.equal(out[0].cpu(), expected_ids)
        torch.testing.assert_close(out[1].cpu(), expected, **CLOSE)


@pytest.mark.gpu
def test_gpu_refuses_tensors_of_another_device() -> None:
    for logits, bias in itertools.permutations(("cpu", "cuda")):
        with pytest.raises(KernelError, match="must"):
            router.route(torch.zeros(4, 8, device=logits), 2, bias=torch.zeros(8, device=bias))
