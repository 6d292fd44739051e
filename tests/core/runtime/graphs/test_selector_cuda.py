"""The CUDA selection kernel against what the table costs by hand, and against the Triton one."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from conftest import RECORDED
from ramp_moe import CostModel, Hardware, ProfileStore, Registry
from ramp_moe.errors import KernelError
from ramp_moe.evaluation.replay import load_replay
from ramp_moe.runtime.graphs import nvrtc
from ramp_moe.runtime.graphs import selector_cuda as select
from ramp_moe.runtime.graphs.cost_table import CostTable
from ramp_moe.runtime.graphs.recorder import Recorder
from ramp_moe.runtime.graphs.selector_cuda import MAX_IDS, CudaSelector, packed
from ramp_moe.runtime.graphs.selector_triton import TritonSelector
from select_cases import ROUTINGS, by_hand, counted, largest_table, routed

KERNELS = ("alpha_moe", "deep_gemm", "triton")


def model_of(registry: Registry, shipped: ProfileStore, h200: Hardware, name: str, form: str = "smooth") -> CostModel:
    return load_replay(registry, shipped, registry.shape(name, "fp8"), h200, KERNELS).fit(form=form)


@pytest.fixture
def table(registry: Registry, shipped: ProfileStore, h200: Hardware) -> CostTable:
    model = model_of(registry, shipped, h200, "olmoe-1b-7b")
    return CostTable.of(model, model.contenders.tolist())


def test_the_table_is_packed_as_the_kernel_reads_it(table: CostTable) -> None:
    words, at = packed(table)
    assert words.dtype == np.int32
    assert all(start % 4 == 0 for start in at), "copied by 16 bytes"
    struct = re.search(r"struct Table \{\s*int (.*?);", select.SOURCE.read_text(), re.DOTALL)
    assert struct is not None
    names = [name.strip().removesuffix("_us") for name in struct[1].split(",")]
    assert len(names) == len(at)
    for name, start in zip(names, at, strict=True):
        array = getattr(table, name).ravel()
        assert words[start : start + array.size].view(array.dtype).tolist() == array.tolist()


def test_parameters_are_laid_out_as_the_kernel_has_them() -> None:
    source = select.SOURCE.read_text()
    body = source[source.index("struct Params {") : source.index("};", source.index("struct Params {"))]
    lines = [re.sub(r"//.*", "", line) for line in body.splitlines()[1:]]
    declared = [part.split("[")[0].split()[-1].strip("*") for line in " ".join(lines).split(";") if line.strip()
                for part in line.split(",")]  # fmt: skip
    assert [name.removesuffix("_us") for name in declared] == [name for name, _ in select.Params._fields_]


@pytest.mark.skipif(nvrtc.unavailable() is not None, reason=str(nvrtc.unavailable()))
def test_it_compiles_without_a_gpu() -> None:
    assert len(nvrtc.compile_cubin(select.SOURCE.read_text(), "select.cu", "sm_90")) > 10_000
    with pytest.raises(KernelError, match=r"broken.cu does not compile for sm_90: broken.cu\(1\): error"):
        nvrtc.compile_cubin("int f( {", "broken.cu", "sm_90")


def check(
    selector: CudaSelector, table: CostTable, ids: torch.Tensor, num_valid: int | None = None, **more: object
) -> int:
    """Run, compare with the table by hand; the choice."""
    valid = None if num_valid is None else torch.tensor([num_valid], dtype=torch.int32, device="cuda")
    kernel_ids = torch.full(ids.shape, -77, dtype=torch.int32, device="cuda")
    selector.choice.fill_(-77)
    selector.launch(ids.cuda(), valid, kernel_ids, **more)  # type: ignore[arg-type]
    experts = len(selector.histogram)
    histogram = counted(ids, experts, num_valid)
    assert selector.histogram.tolist() == histogram.tolist()
    kept = ids.masked_fill((ids < 0) | (ids >= experts), -1)
    if num_valid is not None:
        kept[max(num_valid, 0) :] = -1
    assert torch.equal(kernel_ids.cpu(), kept.int())
    assert selector.cost is not None
    cost = selector.cost.cpu().numpy()
    assert cost == pytest.approx(by_hand(table, histogram), rel=1e-3)
    assert selector.choice.item() == cost.argmin()
    return int(selector.choice)


def made(table: CostTable, num_experts: int) -> CudaSelector:
    return CudaSelector(table, num_experts, torch.device("cuda"), with_cost=True)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["paper", "ceil", "active", "smooth"])
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_models(registry: Registry, shipped: ProfileStore, h200: Hardware, name: str, form: str) -> None:
    model = model_of(registry, shipped, h200, name, form)
    table = CostTable.of(model, model.contenders.tolist())
    selector = made(table, model.num_experts)
    choices = set()
    for seed, routing in enumerate(ROUTINGS):
        for tokens in (1, 37, 512, 3000):
            ids = routed(routing, tokens, model.num_experts, 2, seed)
            choices.add(check(selector, table, ids if seed % 2 else ids.long(), tokens // 2 if tokens == 37 else None))
    assert len(choices) > 1


@pytest.mark.gpu
@pytest.mark.parametrize("num_valid", [0, 1, 36, 37, 38, 2**31 - 1, -1, -(2**31)])
def test_tokens_past_num_valid_are_skipped(table: CostTable, num_valid: int) -> None:
    check(made(table, 64), table, routed("padded", 37, 64, 8), num_valid)


@pytest.mark.gpu
@pytest.mark.parametrize("num_experts", [1, 3, 1024])
def test_as_much_as_a_table_may_have(num_experts: int) -> None:
    """More than fits into shared memory: the weights stay where they are."""
    table = largest_table()
    for seed, routing in enumerate(("uniform", "garbage", "empty")):
        check(made(table, num_experts), table, routed(routing, 300, num_experts, min(8, num_experts), seed))


@pytest.mark.gpu
def test_most_ids_and_wide_ones(table: CostTable) -> None:
    check(made(table, 64), table, routed("zipf1.2", 65_536 // 8, 64, 8), 8000)
    check(made(table, 64), table, torch.tensor([[0, 2**32], [2**32 + 1, 1], [-(2**63), 2**63 - 1]]))
    with pytest.raises(KernelError, match=f"takes {MAX_IDS} routed ids at most"):
        made(table, 64).launch(torch.zeros(MAX_IDS // 8 + 1, 8, dtype=torch.int32, device="cuda"))


@pytest.mark.gpu
def test_the_first_of_equal_ones_whatever_the_order(registry: Registry, shipped: ProfileStore, h200: Hardware) -> None:
    model = model_of(registry, shipped, h200, "olmoe-1b-7b")
    ids = routed("uniform", 64, 64, 8)
    us = model.cost(counted(ids, 64))[model.contenders]
    order = model.contenders[np.argsort(us, kind="stable")].tolist()
    for behind, columns in ((0, [order[0]] * 512), (30, order[30:0:-1] + order[:1] * 20), (6, [*order[1:7], *order])):
        table = CostTable.of(model, columns)
        assert check(made(table, 64), table, ids) == behind


@pytest.mark.gpu
def test_it_agrees_with_the_portable_one_and_records_alike(table: CostTable) -> None:
    cuda, portable = made(table, 64), TritonSelector(table, 64, "cuda")
    recorders = Recorder(3, 64, 8, torch.device("cuda", 0)), Recorder(3, 64, 8, torch.device("cuda", 0))
    for seed, routing in enumerate(ROUTINGS):
        ids = routed(routing, 100, 64, 8, seed)
        check(cuda, table, ids, 90, recorder=recorders[0])
        portable.launch(ids.cuda(), torch.tensor([90], dtype=torch.int32, device="cuda"), recorder=recorders[1])
        assert cuda.choice.item() == portable.choice.item()
    assert torch.equal(recorders[0].ring, recorders[1].ring)
    assert recorders[0].counter.item() == recorders[1].counter.item() == len(ROUTINGS)


@pytest.mark.gpu
def test_small_ones_for_a_sanitizer() -> None:
    table = largest_table(1)
    for tokens in (1, 70):
        check(
            made(table, 96),
            table,
            routed("padded", tokens, 96, 4),
            recorder=Recorder(2, 96, 4, torch.device("cuda", 0)),
        )


@pytest.mark.gpu
def test_bad_input(table: CostTable) -> None:
    selector = made(table, 64)
    ids = routed("uniform", 8, 64, 2).cuda()
    for bad, message in (
        (ids.float(), "contiguous int32 or int64, not torch.float32"),
        (ids.T, "contiguous int32 or int64"),
        (ids.cpu(), "topk_ids is on cpu, the choice is made on cuda:0; move it there"),
    ):
        with pytest.raises(KernelError, match=message):
            selector.launch(bad)
    with pytest.raises(KernelError, match="the recorder is for 2 of 8 experts"):
        selector.launch(ids, recorder=Recorder(4, 8, 2, torch.device("cuda", 0)))
    with pytest.raises(KernelError, match="1024 experts at most, not 1025"):
        made(table, 1025)
