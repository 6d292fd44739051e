"""Triton's interpreter as the tests run it: the language is replaced once a launch, and whole again after it."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.language import core

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is interpreted where there is no GPU")


@triton.jit
def squared(x):
    return x * x


@triton.jit
def largest(x):
    return core.maximum(tl.max(squared(x), 0), 1.0)


@triton.jit
def kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, squared(x) / largest(x))


@triton.jit
def failing(x_ptr, SIZE: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, SIZE), squared(tl.load(x_ptr + "nowhere")))


def language() -> tuple[dict[str, object], ...]:
    return tuple({name: getattr(package, name) for name in dir(package)} for package in (tl, core, tl.tensor))


def test_helpers_compute_and_the_language_is_whole_afterwards() -> None:
    before = language()
    x = torch.arange(-4, 12, dtype=torch.float32)
    for _ in range(2):
        out = torch.full_like(x, torch.nan)
        kernel[(4,)](x, out, 4)
        rows = (x * x).view(4, 4)
        assert torch.equal(out.view(4, 4), rows / rows.amax(1, keepdim=True).clamp(min=1))
        with pytest.raises(Exception, match="has no attribute"):
            failing[(1,)](x, 4)
        assert all(
            found[name] == value for was, found in zip(before, language(), strict=True) for name, value in was.items()
        )
