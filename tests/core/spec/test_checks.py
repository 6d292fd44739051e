"""Checks that kernels' launches share; and that no launch writes its own once more."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from ramp_moe.errors import KernelError, ShapeError
from ramp_moe.spec.checks import check_aligned, check_batch, check_bf16, check_gpu, check_hopper, check_tensor
from ramp_moe.spec.launchable import Batch

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")


def batch_of(dtype: torch.dtype = torch.bfloat16) -> Batch:
    return Batch(torch.zeros(3, 16, dtype=dtype), torch.zeros(3, 2, dtype=torch.int32), torch.zeros(3, 2))


def test_what_fits_passes() -> None:
    batch = batch_of()
    out = torch.empty_like(batch.hidden_states)
    check_bf16("k", batch, out)
    check_batch("k", batch, out, 16, CPU)
    check_aligned("k", "out", out)


def test_only_bf16() -> None:
    batch = batch_of()
    for given, out in ((batch_of(torch.float16), batch.hidden_states), (batch, batch.hidden_states.half())):
        with pytest.raises(KernelError, match=r"^k takes and writes bf16 only: .*torch.float16"):
            check_bf16("k", given, out)


@pytest.mark.parametrize("out", [torch.zeros(3, 8), torch.zeros(2, 16), torch.zeros(48)])
def test_shapes(out: torch.Tensor) -> None:
    with pytest.raises(KernelError, match=r"^k: hidden_states .* and out .* must be \[T, 16\], of one dtype"):
        check_batch("k", batch_of(), out.bfloat16(), 16, CPU)


def test_another_hidden_size_dtype_or_device() -> None:
    batch = batch_of()
    with pytest.raises(KernelError, match=r"must be \[T, 32\], of one dtype"):
        check_batch("k", batch, batch.hidden_states, 32, CPU)
    with pytest.raises(KernelError, match=r"out torch.float16 \[3, 16\] must be \[T, 16\], of one dtype"):
        check_batch("k", batch, batch.hidden_states.half(), 16, CPU)
    for out, device in ((batch.hidden_states.to("meta"), CPU), (batch.hidden_states, torch.device("meta"))):
        with pytest.raises(KernelError, match=r"^k: hidden_states are on cpu, out on .*; move them together"):
            check_batch("k", batch, out, 16, device)


def test_alignment() -> None:
    buffer = torch.zeros(64, dtype=torch.bfloat16)
    for tensor in (buffer[4:], buffer.view(8, 8).T):
        with pytest.raises(KernelError, match=r"^k: down must be contiguous and start at a multiple of 16 bytes"):
            check_aligned("k", "down", tensor)


def test_only_hopper() -> None:
    with pytest.raises(KernelError, match=r"^k runs on Hopper \(sm_90\) only; the weights are on cpu"):
        check_hopper("k", CPU)


ASKED = ("is_contiguous", "is_cuda", "get_device_capability", ".device", "data_ptr")
"""What a check of a tensor's place asks for."""
ROOMS = ("kernels/ramp_moe_kernels", "adapters/ramp_moe_adapters/kernels")


def own_checks(source: str) -> list[int]:
    """Lines of conditions that ask where a tensor lies, and raise an error if it lies elsewhere."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.If)
        and isinstance(node.body[0], ast.Raise)
        and any(word in ast.unparse(node.test) for word in ASKED)
    ]


def test_kernels_and_adapters_share_these_checks() -> None:
    files = [f for room in ROOMS for f in sorted((ROOT / room).rglob("*.py"))]
    assert len(files) > 30
    own = [f"{f.relative_to(ROOT)}:{line}" for f in files for line in own_checks(f.read_text())]
    assert not own, "use ramp_moe.spec.checks"


@pytest.mark.parametrize(
    ("test", "found"),
    [
        ("x.device != y.device", [1]),
        ("not x.is_contiguous()", [1]),
        ("torch.cuda.get_device_capability(d) != (9, 0)", [1]),
        ("x.data_ptr() % 16", [1]),
        ("x.ndim != 2", []),
    ],
)
def test_the_search_finds(test: str, found: list[int]) -> None:
    assert own_checks(f"if {test}:\n    raise KernelError") == found


def test_a_tensor_as_it_must_be() -> None:
    half, float32 = torch.zeros(4, 6, dtype=torch.float16), (torch.float32, torch.int32)
    check_tensor("the sums", half, (4, 6), (torch.float16,), CPU)
    for given, shape, dtypes, device, error, message in (
        (half, (4, 7), (torch.float16,), CPU, ShapeError, r"the sums must be \[4, 7\], not \[4, 6\]"),
        (half, (4, 6), float32, CPU, KernelError, "the sums must be float32 or int32, not float16; convert it"),
        (half, (4, 6), (torch.float16,), torch.device("meta"), KernelError, "the sums must be on meta, not on cpu"),
        (half.T, (6, 4), (torch.float16,), CPU, KernelError, r"the sums must be contiguous.*\.contiguous\(\)"),
    ):
        with pytest.raises(error, match=message):
            check_tensor("the sums", given, shape, dtypes, device)
    with pytest.raises(KernelError, match="the sums must be on a GPU, not on cpu; move it there"):
        check_gpu("the sums", half)


def test_an_output_that_is_not_contiguous() -> None:
    batch = batch_of()
    with pytest.raises(KernelError, match=r"^k: out must be contiguous, its strides are \(1, 3\)"):
        check_batch("k", batch, torch.zeros(16, 3, dtype=torch.bfloat16).T, 16, CPU)
