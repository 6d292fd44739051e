"""Quantisation against the reference, bit for bit; combine against a sum in the same order."""

from __future__ import annotations

import pytest
import torch
from each_target import compile_for_each_target
from ramp_moe.errors import KernelError, ShapeError
from ramp_moe_kernels import reference
from ramp_moe_kernels.triton.combine import combine
from ramp_moe_kernels.triton.quantise import quantise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP8 = torch.float8_e4m3fn
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def quantised(x: torch.Tensor, group: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.full(x.shape, torch.nan, device=DEVICE).to(FP8)
    scale = torch.full((x.shape[0], x.shape[1] // group), torch.nan, device=DEVICE)
    quantise(x, out, scale)
    return out, scale


def same_bits(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal, with every NaN equal to every other."""
    assert torch.equal(a.float().isnan(), b.float().isnan())
    known = ~a.float().isnan()
    integer = {1: torch.uint8, 4: torch.int32}[a.element_size()]
    assert torch.equal(a.view(integer)[known], b.view(integer)[known])


def check_quantise(x: torch.Tensor, group: int = 128) -> None:
    for got, expected in zip(quantised(x, group), reference.quantise_activations(x, group), strict=True):
        same_bits(got, expected)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 128), (3, 384), (17, 2048)])
def test_quantise(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    check_quantise(normal(*shape, dtype=dtype))
    # spread over the exponents of e4m3, its subnormal numbers and what rounds to zero included
    check_quantise((normal(*shape, seed=1) * 2.0 ** (8 * normal(*shape, seed=2).abs()).neg()).to(dtype))


@pytest.mark.parametrize("group", [64, 32])
def test_smaller_groups(group: int) -> None:
    check_quantise(normal(17, 384) * 2.0 ** normal(17, 384, seed=1), group)


def test_every_tie_goes_to_even() -> None:
    """All e4m3 numbers, all middles between neighbours and what lies next to those; 448 makes the scale 1."""
    numbers = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    values = torch.cat([numbers, middles, middles.nextafter(torch.tensor(0.0)), middles.nextafter(torch.tensor(1e9))])
    values = torch.cat([values, -values])
    values = torch.cat([values, values.new_zeros(-len(values) % 127)]).view(-1, 127)
    x = torch.cat([values, torch.full((len(values), 1), 448.0)], 1).to(DEVICE)
    check_quantise(x)


def test_extremes() -> None:
    x = normal(12, 256)
    x[0] = 0
    x[1, :128] = -0.0
    x[2] *= 1e-12
    x[3] *= 1e-38  # zero, after the smallest scale
    x[4, :] = 3e38
    x[5, 7] = torch.finfo(torch.float32).max
    x[6, 200] = torch.nan
    x[7, 3] = torch.inf
    x[8, 3] = -torch.inf
    x[9] = torch.nan
    check_quantise(x)
    out, scale = quantised(x)
    assert not bool(out[6, :128].float().isnan().any() | scale[6, 0].isnan()), "a NaN left its group"
    assert bool(scale[6, 1].isnan())
    assert not bool(out[10:].float().isnan().any())


def test_quantise_past_a_program_s_groups() -> None:
    check_quantise(normal(131, 4096, dtype=torch.bfloat16))


def test_quantise_nothing() -> None:
    quantise(normal(0, 256), normal(0, 256).to(FP8), normal(0, 2))
    quantise(normal(3, 0), normal(3, 0).to(FP8), normal(3, 0))


def test_bad_quantise() -> None:
    x, out, scale = normal(4, 256), normal(4, 256).to(FP8), normal(4, 2)
    for args, error, message in (
        ((normal(4, 200), out, scale), ShapeError, "multiple of 128"),
        ((x[0], out, scale), ShapeError, r"\[T, C\]"),
        ((x, out[:3], scale), ShapeError, r"quantised activations must be \[4, 256\]"),
        ((x, out, scale[:, :1]), ShapeError, r"scale must be \[4, 2\]"),
        ((x.double(), out, scale), KernelError, "bfloat16 or float16 or float32, not float64"),
        ((x, x, scale), KernelError, "float8_e4m3fn, not float32"),
        ((x, out, scale.half()), KernelError, "float32, not float16"),
        ((normal(256, 4).T, out, scale), KernelError, "contiguous"),
    ):
        with pytest.raises(error, match=message):
            quantise(*args)


def summed(partial: torch.Tensor, live: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """partial [S, T, k, H], live [T, k]: added one by one, as the kernel does."""
    total = torch.zeros(partial.shape[1], partial.shape[3], device=partial.device)
    for slot in range(partial.shape[2]):
        for split in range(partial.shape[0]):
            total += torch.where(live[:, slot, None], partial[split, :, slot].float(), 0.0)
    return total.to(dtype)


def check_combine(
    tokens: int, top_k: int, hidden: int, dtypes: tuple[torch.dtype, torch.dtype], skip: bool, splits: int | None = None
) -> None:
    experts = 5
    partial = normal(splits or 1, tokens, top_k, hidden, dtype=dtypes[0])
    ids = torch.randint(-2, experts + 2, (tokens, top_k), generator=torch.Generator().manual_seed(3)).int().to(DEVICE)
    live = (ids >= 0) & (ids < experts) if skip else torch.ones_like(ids, dtype=torch.bool)
    partial[:, ~live] = torch.nan  # unwritten memory
    out = torch.full((tokens, hidden), torch.nan, dtype=dtypes[1], device=DEVICE)
    flat = partial.view(-1, tokens * top_k, hidden)
    combine(flat if splits else flat[0], ids if skip else None, out, num_experts=experts)
    expected = summed(partial, live, dtypes[1])
    if DEVICE == "cuda" or dtypes[1] == torch.float32:
        assert torch.equal(out, expected)
    else:  # the interpreter casts in its own way
        torch.testing.assert_close(out, expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("dtypes", [(p, o) for p in DTYPES for o in DTYPES])
def test_combine(skip: bool, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check_combine(9, 4, 320, dtypes, skip)


def test_combine_shapes() -> None:
    for tokens, top_k, hidden in ((1, 1, 1), (1, 16, 2880), (33, 3, 129)):
        check_combine(tokens, top_k, hidden, (torch.float32, torch.float32), True)
    check_combine(5, 2, 384, (torch.float32, torch.float32), True, splits=4)
    check_combine(130, 1, 2064, (torch.bfloat16, torch.float32), True)  # wide programs


def test_combine_int64_ids() -> None:
    ids = torch.tensor([[0, 2**32], [2**32 + 1, 1]], device=DEVICE)
    partial = torch.tensor([[1.0], [torch.nan], [torch.nan], [2.0]], device=DEVICE)
    out = torch.full((2, 1), torch.nan, device=DEVICE)
    combine(partial, ids, out, num_experts=2)
    assert out.tolist() == [[1.0], [2.0]]


@pytest.mark.parametrize("num_valid", [0, 3, 6, -1])
def test_combine_past_num_valid_is_zero(num_valid: int) -> None:
    partial = normal(6, 2, 40)
    partial[max(num_valid, 0) :] = torch.nan
    valid = torch.tensor([num_valid], dtype=torch.int32, device=DEVICE)
    for ids in (None, torch.zeros(6, 2, dtype=torch.int32, device=DEVICE)):
        out = torch.full((6, 40), torch.nan, device=DEVICE)
        combine(partial.view(12, 40), ids, out, num_experts=1, num_valid=valid)
        assert torch.equal(out, partial.nan_to_num(0).sum(1))


def test_combine_nothing() -> None:
    combine(normal(0, 64), None, normal(0, 64))
    combine(normal(0, 64), torch.empty(0, 4, dtype=torch.int32, device=DEVICE), normal(0, 64), num_experts=3)


def test_bad_combine() -> None:
    partial, out, ids = normal(8, 64), normal(4, 64), torch.zeros(4, 2, dtype=torch.int32, device=DEVICE)
    for args, kwargs, error, message in (
        ((partial[0], ids, out), {}, ShapeError, "sums"),
        ((normal(7, 64), ids, out), {}, ShapeError, "7 partial rows do not divide among 4 tokens"),
        ((normal(7, 64), None, out[:0]), {}, ShapeError, "7 partial rows do not divide among 0 tokens"),
        ((normal(8, 65), ids, out), {}, ShapeError, r"partial sums must be \[8, 64\]"),
        ((partial, ids[:3], out), {}, ShapeError, r"topk_ids must be \[4, 2\]"),
        ((partial, ids.float(), out), {}, KernelError, "topk_ids must be int32 or int64"),
        ((partial, ids, out), {"num_experts": None}, KernelError, "num_experts"),
        ((partial, ids, out), {"num_valid": ids[0]}, ShapeError, r"num_valid must be \[1\]"),
        ((partial.double(), ids, out), {}, KernelError, "float64"),
        ((partial, ids, normal(64, 4).T), {}, KernelError, "contiguous"),
    ):
        with pytest.raises(error, match=message):
            combine(*args, **({"num_experts": 2} | kwargs))


COMPILE = """
    import sys
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from ramp_moe_kernels.triton.combine import combine_kernel
    from ramp_moe_kernels.triton.quantise import quantise_kernel

    backend, arch, lanes = sys.argv[1:]
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(lanes))

    def compile(kernel, warps, **known):
        types = {name: known.get(name, "i32") for name in kernel.arg_names}
        signature = {name: t if isinstance(t, str) else "constexpr" for name, t in types.items()}
        constants = {name: t for name, t in types.items() if not isinstance(t, str)}
        triton.compile(ASTSource(kernel, signature, constants), target=target, options={"num_warps": warps})

    for ids, valid in ((None, None), ("*i32", "*i32"), ("*i64", None)):
        for block, warps, splits in ((256, 1, 1), (1024, 4, 2)):
            known = {"TOP_K": 8, "SPLIT_K": splits, "BLOCK": block, "PDL": target.arch == 90}
            compile(combine_kernel, warps, partial="*fp32", topk_ids=ids, num_valid=valid, out="*bf16", **known)
    # What is 1 becomes a constant.
    ones = {n: 1 for n in ("num_ids", "hidden", "num_experts", "TOP_K", "SPLIT_K")}
    ones |= {"BLOCK": 256, "PDL": False}
    compile(combine_kernel, 1, partial="*bf16", topk_ids="*i32", num_valid="*i32", out="*fp16", **ones)
    if target.arch != 80:  # no fp8
        for dtype in ("*bf16", "*fp16", "*fp32"):
            for groups in (16, 64):
                pointers = {"x": dtype, "x_fp8": "*fp8e4nv", "x_scale": "*fp32"}
                compile(quantise_kernel, 4, GROUPS=groups, GROUP=128, EMULATE_FP8=False, **pointers)
"""


@pytest.mark.slow
def test_they_compile() -> None:
    compile_for_each_target(COMPILE)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 8, 512, 8192])
def test_large_quantise(dtype: torch.dtype, tokens: int) -> None:
    for seed, columns in enumerate((2048, 7168)):
        check_quantise(normal(tokens, columns, dtype=dtype, seed=seed))


@pytest.mark.gpu
def test_combine_past_2_to_the_31_elements() -> None:
    tokens, top_k, hidden = 40_000, 8, 7168
    partial = torch.randn(tokens * top_k, hidden, device=DEVICE, dtype=torch.bfloat16)
    out = torch.full((tokens, hidden), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    combine(partial, None, out)
    last = partial.view(tokens, top_k, hidden)[-100:]
    assert torch.equal(
        out[-100:], summed(last[None], torch.ones(100, top_k, dtype=torch.bool, device=DEVICE), out.dtype)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [None, 4])
@pytest.mark.parametrize("tokens", [1, 64, 1024])
def test_large_combine(tokens: int, splits: int | None) -> None:
    check_combine(tokens, 8, 2048, (torch.bfloat16, torch.bfloat16), True, splits)
    check_combine(tokens, 8, 7168, (torch.float32, torch.bfloat16), False, splits)


@pytest.mark.gpu
def test_graph_replays_with_other_values() -> None:
    tokens, top_k, hidden, experts = 64, 8, 2048, 5
    x, x_fp8 = normal(tokens, hidden, dtype=torch.bfloat16), torch.empty(tokens, hidden, dtype=FP8, device=DEVICE)
    x_scale = torch.empty(tokens, hidden // 128, device=DEVICE)
    partial, out = normal(tokens * top_k, hidden, dtype=torch.bfloat16), normal(tokens, hidden, dtype=torch.bfloat16)
    ids = torch.zeros(tokens, top_k, dtype=torch.int32, device=DEVICE)

    def step() -> None:
        quantise(x, x_fp8, x_scale)
        combine(partial, ids, out, num_experts=experts)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(3):
        x.normal_()
        partial.normal_()
        ids.random_(-1, experts + 1)
        live = (ids >= 0) & (ids < experts)
        partial.view(tokens, top_k, hidden)[~live] = torch.nan
        graph.replay()
        for got, expected in zip((x_fp8, x_scale), reference.quantise_activations(x), strict=True):
            same_bits(got, expected)
        assert torch.equal(out, summed(partial.view(1, tokens, top_k, hidden), live, out.dtype))
