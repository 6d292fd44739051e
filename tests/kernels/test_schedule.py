"""The schedule kernel against a sort in plain Python; interpreted where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from each_target import compile_for_each_target
from ramp_moe import GridGeometry
from ramp_moe.errors import KernelError, ShapeError
from ramp_moe_kernels import reference
from ramp_moe_kernels.triton.schedule import MAX_CHUNK, MAX_IDS, Schedule, allocate, buffer_sizes, max_tiles, schedule
from tiers import slow_except

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POISON = -77


def poisoned(max_ids: int, num_experts: int, block: int) -> Schedule:
    out = allocate(max_ids, num_experts, block, DEVICE)
    for buffer in (out.sorted_token_ids, out.expert_ids, out.num_tokens_post_padded, out.histogram, out.partial):
        assert buffer is not None
        buffer.fill_(POISON)
    return out


def sort(topk_ids: torch.Tensor, num_experts: int, block: int, num_valid: int | None = None):
    """(slots in use, experts of the tiles in use, histogram), as lists."""
    flat = topk_ids.flatten().tolist()
    if num_valid is not None:
        flat = flat[: max(num_valid, 0) * topk_ids.shape[1]]
    of_expert: list[list[int]] = [[] for _ in range(num_experts)]
    for i, expert in enumerate(flat):
        if 0 <= expert < num_experts:
            of_expert[expert].append(i)
    sorted_token_ids: list[int] = []
    experts: list[int] = []
    for expert, ids in enumerate(of_expert):
        tiles = -(-len(ids) // block)
        sorted_token_ids += ids + [topk_ids.numel()] * (tiles * block - len(ids))
        experts += [expert] * tiles
    return sorted_token_ids, experts, [len(ids) for ids in of_expert]


def check(out: Schedule, topk_ids: torch.Tensor, num_experts: int, block: int, num_valid: int | None = None) -> None:
    sorted_token_ids, experts, histogram = sort(topk_ids.cpu(), num_experts, block, num_valid)
    assert out.num_tokens_post_padded.tolist() == [len(sorted_token_ids)]
    assert out.sorted_token_ids[: len(sorted_token_ids)].tolist() == sorted_token_ids
    assert bool((out.sorted_token_ids[len(sorted_token_ids) :] == POISON).all()), "written past num_tokens_post_padded"
    assert out.expert_ids[: len(experts)].tolist() == experts
    assert bool((out.expert_ids[len(experts) :] == -1).all())
    assert out.histogram[:num_experts].tolist() == histogram
    assert bool((out.histogram[num_experts:] == POISON).all()), "written past the experts"


def run(topk_ids: torch.Tensor, num_experts: int, block: int, num_valid: int | None = None) -> None:
    out = poisoned(topk_ids.numel(), num_experts, block)
    valid = None if num_valid is None else torch.tensor([num_valid], dtype=torch.int32, device=DEVICE)
    schedule(topk_ids, num_experts, block, out, num_valid=valid)
    check(out, topk_ids, num_experts, block, num_valid)


def routed(kind: str, tokens: int, top_k: int, num_experts: int, seed: int = 0) -> torch.Tensor:
    """topk_ids int32 [tokens, top_k] of one of KINDS; an expert may occur twice in a token."""
    g = torch.Generator().manual_seed(seed)
    shape = (tokens, top_k)
    ids = torch.randint(0, num_experts, shape, generator=g)
    if kind == "skewed":
        ids = (torch.rand(shape, generator=g) ** 4 * num_experts).long()
    elif kind == "one":
        ids[:] = num_experts - 1
    elif kind == "every third":
        ids -= ids % 3
    elif kind == "padded":
        ids[torch.rand(shape, generator=g) < 0.3] = -1
        ids[torch.rand(shape, generator=g) < 0.3] = num_experts
    elif kind == "all skipped":
        ids[:] = -1
    elif kind == "garbage":
        wild = torch.tensor([2**31 - 1, -(2**31), 10**6, -2, num_experts + 1])
        ids = torch.where(torch.rand(shape, generator=g) < 0.5, wild[torch.randint(0, 5, shape, generator=g)], ids)
    return ids.to(torch.int32).to(DEVICE)


KINDS = ("random", "skewed", "one", "every third", "padded", "all skipped", "garbage")
SMALL = [(1, 1), (1, 8), (3, 2), (37, 8), (75, 4)]  # tokens, top_k


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_experts", slow_except([3, 8], [1, 3, 8, 60, 257]))
def test_small(kind: str, num_experts: int) -> None:
    sizes = SMALL if num_experts < 60 or DEVICE == "cuda" else SMALL[1::3]  # the interpreter takes its time
    for seed, (tokens, top_k) in enumerate(sizes):
        run(routed(kind, tokens, top_k, num_experts, seed), num_experts, 16)


@pytest.mark.parametrize("block", slow_except([7, 64], [1, 2, 7, 64, 128, 255, 256]))
def test_any_block(block: int) -> None:
    for kind in ("random", "one", "padded"):
        run(routed(kind, 75, 4, 8), 8, block)


@pytest.mark.slow
def test_most_experts() -> None:
    run(routed("random", 20, 8, 1024), 1024, 16)


def test_a_token_that_names_an_expert_twice() -> None:
    run(torch.tensor([[2, 2, 0], [2, 0, 0]], dtype=torch.int32, device=DEVICE), 3, 4)


@pytest.mark.parametrize("num_valid", [0, 1, 30, 37, 38, 2**31 - 1, -1, -(2**30), -(2**31)])
def test_tokens_past_num_valid_are_skipped(num_valid: int) -> None:
    run(routed("padded", 37, 3, 8), 8, 16, num_valid)


def test_int64_ids_do_not_wrap_into_range() -> None:
    ids = torch.tensor([[0, 2**32], [2**32 + 1, 1], [-(2**63), 2**63 - 1]], device=DEVICE)
    run(ids, 3, 4)


@pytest.mark.parametrize("tokens", [75, MAX_CHUNK // 4 + 7])  # the second takes two launches
def test_the_block_can_be_chosen_on_the_device(tokens: int) -> None:
    blocks, experts = (16, 1, 64), 8
    ids = routed("padded", tokens, 4, experts)
    sizes = [buffer_sizes(ids.numel(), experts, block) for block in blocks]
    largest = {name: max(size[name] for size in sizes) for name in sizes[0]}
    for i, block in enumerate(blocks):
        buffers = {name: torch.full((n,), POISON, dtype=torch.int32, device=DEVICE) for name, n in largest.items()}
        out = Schedule(**buffers)
        schedule(ids, experts, blocks, out, choice=torch.tensor([i], dtype=torch.int32, device=DEVICE))
        check(out, ids, experts, block)


def test_two_launches() -> None:
    for kind in ("random", "garbage"):
        run(routed(kind, MAX_CHUNK // 2 + 77, 2, 3), 3, 64, MAX_CHUNK // 2 + 70)


def test_more_chunks_than_are_loaded_at_a_time() -> None:
    run(routed("padded", 17 * MAX_CHUNK + 5, 1, 2), 2, 256)


def test_no_tokens() -> None:
    run(torch.empty(0, 8, dtype=torch.int32, device=DEVICE), 4, 16)
    out = poisoned(32, 4, 16)
    schedule(torch.empty(0, 8, dtype=torch.int32, device=DEVICE), 4, 16, out)
    check(out, torch.empty(0, 8), 4, 16)


def test_larger_buffers_serve_again() -> None:
    out = poisoned(2 * MAX_CHUNK, 60, 16)
    for tokens, experts, block in ((75, 60, 16), (1, 60, 16), (20, 8, 64), (40, 3, 1)):
        out.sorted_token_ids.fill_(POISON)
        out.histogram.fill_(POISON)
        ids = routed("random", tokens, 4, experts)
        schedule(ids, experts, block, out)
        check(out, ids, experts, block)


@pytest.mark.parametrize("tokens", slow_except([40], [1, 40, 2100]))  # the last takes two launches
def test_work_beside(tokens: int) -> None:
    ids = routed("random", tokens, 2, 3)
    hidden = 256
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(1)).bfloat16().to(DEVICE)
    x_fp8 = torch.full((tokens, hidden), 3.0, device=DEVICE).to(torch.float8_e4m3fn)
    x_scale = torch.full((tokens, hidden // 128), torch.nan, device=DEVICE)
    zero = torch.full((tokens, hidden), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    expected, expected_scale = reference.quantise_activations(x)
    for quantise, zeroed in (((x, x_fp8, x_scale), zero), (None, zero), ((x, x_fp8, x_scale), None)):
        out = poisoned(ids.numel(), 3, 16)
        zero.fill_(torch.nan)
        x_scale.fill_(torch.nan)
        schedule(ids, 3, 16, out, quantise=quantise, zero=zeroed)
        check(out, ids, 3, 16)
        if quantise:
            assert torch.equal(x_fp8.view(torch.uint8), expected.view(torch.uint8))
            assert torch.equal(x_scale, expected_scale)
        assert bool((zero == 0).all()) if zeroed is not None else bool(zero.isnan().all())


def test_zeroing_stays_inside() -> None:
    around = torch.ones(5000, device=DEVICE)
    schedule(routed("random", 4, 2, 3), 3, 16, poisoned(8, 3, 16), zero=around[16:4817])
    assert around.nonzero().flatten().tolist() == [*range(16), *range(4817, 5000)]


@pytest.mark.parametrize("num_ids", [0, 1, 7, 8, 9, 300, 4096])
def test_max_tiles_is_the_geometry_s_bound(num_ids: int) -> None:
    for experts in (1, 8, 257):
        for block in (1, 16, 200):
            geometry = GridGeometry(block_m=block, block_n=1, block_k=1, n=1, k=1, expert_bytes=1)
            assert max_tiles(num_ids, experts, block) == geometry.max_m_tiles(num_ids, experts)


def test_bad_input() -> None:
    ids = routed("random", 8, 2, 4)
    out = allocate(16, 4, 16, DEVICE)
    for kwargs, message in (
        ({"num_experts": 0}, "1 to 1024 experts"),
        ({"num_experts": 1025}, "1 to 1024 experts"),
        ({"block": 0}, "blocks of 1 to 256"),
        ({"block": 257}, "blocks of 1 to 256"),
        ({"block": (16, 16)}, r"a choice among them belong together; blocks are \[16, 16\]"),
        ({"choice": torch.tensor([0], device=DEVICE).int()}, "a choice among them belong together"),
        ({"block": (16, 16), "choice": torch.tensor([0], device=DEVICE)}, "the choice must be int32"),
        ({"block": (16, 257)}, "blocks of 1 to 256"),
        ({"num_experts": 5}, "sorted_token_ids holds 64 of the 80"),
        ({"topk_ids": ids.float()}, "topk_ids must be int32 or int64, not float32"),
        ({"topk_ids": ids.T}, "contiguous"),
        ({"num_valid": torch.tensor([1], device=DEVICE)}, "num_valid must be int32"),
        ({"zero": torch.ones(8, 4, device=DEVICE).T}, "contiguous"),
    ):
        with pytest.raises(KernelError, match=message):
            schedule(**({"topk_ids": ids, "num_experts": 4, "block": 16, "out": out} | kwargs))
    with pytest.raises(ShapeError, match=r"topk_ids must be \[T, k\]"):
        schedule(ids[0], 4, 16, out)
    with pytest.raises(ShapeError, match="multiple of 128"):
        schedule(ids, 4, 16, out, quantise=(torch.ones(8, 64), torch.ones(8, 64), torch.ones(8, 1)))
    with pytest.raises(KernelError, match=f"up to {MAX_IDS} routed ids"):
        allocate(MAX_IDS + 1, 4, 16, DEVICE)
    four = Schedule(*(torch.empty(10_000, dtype=torch.int32, device=DEVICE) for _ in range(4)))
    with pytest.raises(KernelError, match="partial holds 0"):
        schedule(routed("random", MAX_CHUNK + 1, 1, 4), 4, 16, four)


COMPILE = """
    import sys
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from ramp_moe_kernels.triton.schedule import histogram_kernel, schedule_kernel

    backend, arch, lanes = sys.argv[1:]
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(lanes))
    fp8 = target.arch != 80
    names = ("sorted_token_ids", "expert_ids", "num_tokens_post_padded", "histogram", "num_valid")
    pointers = dict.fromkeys(names, "*i32")
    activations = {"x": "*bf16", "x_fp8": "*fp8e4nv", "x_scale": "*fp32", "zero": "*bf16"}

    def compile(kernel, warps, **changed):
        known = pointers | changed
        known = {"choice": None, "BLOCKS": None} | known
        known |= {"BINS": 256, "GROUPS": 16, "GROUP": 128, "ZERO": 4096, "EMULATE_FP8": False, "PDL": target.arch == 90}
        types = {name: known.get(name, "i32") for name in kernel.arg_names}
        signature = {name: t if isinstance(t, str) else "constexpr" for name, t in types.items()}
        constants = {name: t for name, t in types.items() if not isinstance(t, str)}
        triton.compile(ASTSource(kernel, signature, constants), target=target, options={"num_warps": warps})

    alone = dict.fromkeys(activations)
    for beside in (alone, activations) if fp8 else (alone,):
        compile(schedule_kernel, 4, topk_ids="*i32", partial=None, CHUNK=512, **beside)
        compile(schedule_kernel, 8, topk_ids="*i64", partial=None, CHUNK=4096, **beside)
        compile(histogram_kernel, 8, topk_ids="*i32", partial="*i32", CHUNK=4096, **beside)
    compile(schedule_kernel, 8, topk_ids="*i32", partial="*i32", CHUNK=4096, **alone)
    compile(schedule_kernel, 4, topk_ids="*i32", partial=None, CHUNK=512, choice="*i32", BLOCKS=(16, 64), **alone)
    # What is 1 becomes a constant.
    ones = {n: 1 for n in ("num_ids", "num_tokens", "top_k", "num_experts", "block", "capacity", "chunks", "parts")}
    ones |= {"experts_each": 1, "num_groups": 1, "x_programs": 1, "zero_size": 1, "num_valid": None}
    compile(schedule_kernel, 4, topk_ids="*i32", partial=None, CHUNK=512, **ones, **(activations if fp8 else alone))
"""


@pytest.mark.slow
def test_it_compiles() -> None:
    compile_for_each_target(COMPILE)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_experts", [8, 60, 257, 1024])
@pytest.mark.parametrize("num_ids", [8, 512, 4096, 4100, 65_536, 200_000])
def test_large(kind: str, num_experts: int, num_ids: int) -> None:
    for top_k, block in ((1, 64), (4, 16), (4, 128)):
        run(routed(kind, num_ids // top_k, top_k, num_experts, num_ids), num_experts, block)
    run(routed(kind, num_ids // 4, 4, num_experts), num_experts, 16, num_ids // 5)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 512, 2048])
def test_graph_replays_with_other_ids(tokens: int) -> None:
    num_experts, block, hidden = 64, 16, 2048
    ids = routed("random", tokens, 8, num_experts)
    valid = torch.tensor([tokens], dtype=torch.int32, device=DEVICE)
    x = torch.randn(tokens, hidden, device=DEVICE, dtype=torch.bfloat16)
    x_fp8 = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    x_scale = torch.empty(tokens, hidden // 128, device=DEVICE)
    zero = torch.empty_like(x)
    out = poisoned(ids.numel(), num_experts, block)

    def step() -> None:
        schedule(ids, num_experts, block, out, num_valid=valid, quantise=(x, x_fp8, x_scale), zero=zero)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for seed, kind in enumerate(KINDS):
        ids.copy_(routed(kind, tokens, 8, num_experts, seed))
        num_valid = tokens if seed % 2 else max(1, tokens // 2)
        valid.fill_(num_valid)
        x.normal_()
        zero.fill_(torch.nan)
        for buffer in (out.sorted_token_ids, out.expert_ids, out.num_tokens_post_padded, out.histogram):
            buffer.fill_(POISON)
        graph.replay()
        check(out, ids, num_experts, block, num_valid)
        expected, expected_scale = reference.quantise_activations(x)
        assert torch.equal(x_fp8.view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(x_scale, expected_scale)
        assert bool((zero == 0).all())
