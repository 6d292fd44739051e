"""Checks that kernels' launches share; and that no launch writes its own once more."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from ramp_moe.errors import KernelError
from ramp_moe.spec.checks import check_aligned, check_batch, check_bf16, check_hopper
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


def test_launches_share_these_checks() -> None:
    """Whoever asks for a tensor's address to judge it, or holds three devices against each other, writes one again."""
    own = []
    for package in ("kernels", "adapters"):
        for file in (ROOT / package).rglob("launch.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                three = isinstance(node, ast.Compare) and len(node.ops) > 1 and "device" in ast.unparse(node)
                judged = (
                    isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod) and "data_ptr" in ast.unparse(node)
                )
                if three or judged:
                    own.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert not own, "use ramp_moe.spec.checks"
