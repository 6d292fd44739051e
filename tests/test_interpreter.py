"""Triton's interpreter as the tests run it: faster than Triton's own, and the same."""

from __future__ import annotations

import interpreter
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


BLOCKS = [(tl.float32, [4, 16]), (tl.pointer_type(tl.int32), [8]), (tl.int1, [core.constexpr(1), core.constexpr(2)])]


@pytest.mark.parametrize(("element", "shape"), BLOCKS, ids=str)
def test_types_and_tensors_are_those_that_triton_makes(element: core.dtype, shape: list[int]) -> None:
    """Made twice, since the second comes from what the first left."""
    theirs = core.block_type.__new__(core.block_type)
    interpreter._make_block_type(theirs, element, shape)
    for _ in range(2):
        block = core.block_type(element, shape)
        assert vars(block).keys() == vars(theirs).keys()
        assert (block.name, block.numel, block.element_ty) == (theirs.name, theirs.numel, element)
        assert [*block.shape] == [*theirs.shape]
        assert interpreter.np_dtype(block) == interpreter._get_np_dtype(theirs)
        tensor = core.tensor(None, block)
        assert [s.value for s in tensor.shape] == [*theirs.shape]
        assert (tensor.numel.value, tensor.dtype, tensor.type) == (theirs.numel, theirs.scalar, theirs)
        assert core.tensor(None, element).shape.values == []


def test_types_that_numpy_holds() -> None:
    known = [core.dtype(name) for name in (*core.dtype.SINT_TYPES, *core.dtype.UINT_TYPES, *core.dtype.FP_TYPES)]
    for dtype in known:
        assert interpreter.np_dtype(dtype) == interpreter._get_np_dtype(dtype)


@pytest.mark.parametrize("shape", [[3], [2**21], [], [2.0]], ids=str)
def test_shapes_that_no_block_has(shape: list[int]) -> None:
    core.block_type(tl.float32, [2])
    for _ in range(2):
        with pytest.raises((TypeError, ValueError)):
            core.block_type(tl.float32, shape)


@triton.jit
def overflowing(x_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, x * x + x)


def test_overflow_wraps_as_on_a_gpu() -> None:
    x = torch.tensor([2**31 - 1, 2**16, -(2**31), 3], dtype=torch.int32)
    out = torch.empty_like(x)
    overflowing[(1,)](x, out, 4)
    wide = x.long() * x.long() + x.long()
    assert torch.equal(out, ((wide + 2**31) % 2**32 - 2**31).int())
