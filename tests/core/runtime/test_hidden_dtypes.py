"""Kernels that take hidden states of some dtypes alone: batches of others go to other kernels; nothing is lost."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_cases import FakeKernel, layer, weights
from ramp_moe import Hardware, KernelError, get_registry
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.spec.launchable import Batch, LaunchableKernel, MoEWeights

TOKENS, TOP_K = 5, 1


class Half(FakeKernel):
    """Takes, and writes, what it says; raises for the rest, as kernels do."""

    def __init__(self, name: str, *takes: str) -> None:
        super().__init__(name)
        self.hidden_dtypes = takes

    def prepare(self, weights: MoEWeights) -> Any:
        return weights

    def launch(self, config: Any, prepared: Any, batch: Batch, out: torch.Tensor, workspace: Any) -> None:
        dtype = {torch.bfloat16: "bf16", torch.float16: "fp16"}[batch.hidden_states.dtype]
        if dtype not in self.hidden_dtypes:
            raise KernelError(f"{self.name} takes no {dtype}")
        self.launched.append((dtype, batch.num_tokens))
        out.zero_()


def fp8(hardware: Hardware, *kernels: LaunchableKernel) -> LayerRuntime:
    gate_up, down = torch.zeros(2, 256, 128), torch.zeros(2, 128, 128)
    scales = torch.ones(2, 2, 1), torch.ones(2, 1, 1)
    return LayerRuntime(MoEWeights(*(t.to(torch.float8_e4m3fn) for t in (gate_up, down)), *scales), TOP_K, hardware,
                        kernels)  # fmt: skip


def run(moe: LayerRuntime, dtype: torch.dtype) -> None:
    ids = torch.zeros(TOKENS, TOP_K, dtype=torch.int32)
    out = moe(torch.zeros(TOKENS, 128, dtype=dtype), ids, torch.ones(TOKENS, TOP_K))
    assert out.dtype is dtype


def test_each_batch_goes_to_a_kernel_that_takes_it(h200: Hardware) -> None:
    narrow, wide = Half("narrow", "bf16"), Half("wide", "bf16", "fp16")
    moe = fp8(h200, narrow, wide)
    for dtype, kernel in ((torch.bfloat16, narrow), (torch.float16, wide), (torch.bfloat16, narrow)):
        before = len(kernel.launched)
        run(moe, dtype)
        assert len(kernel.launched) == before + 1
    assert moe.dropped == {}
    moe.warm_up(TOKENS, torch.float16)
    assert moe.dropped == {}
    assert wide.launched[-1] == ("fp16", TOKENS)


def test_if_none_takes_it_the_batch_is_refused_and_others_are_not(h200: Hardware) -> None:
    moe = fp8(h200, Half("narrow", "bf16"))
    with pytest.raises(KernelError, match=r"takes hidden states in fp16 \(narrow takes bf16\); cast them"):
        run(moe, torch.float16)
    run(moe, torch.bfloat16)
    assert moe.dropped == {}


def test_what_fails_is_dropped_for_all_dtypes(h200: Hardware) -> None:
    class Broken(Half):
        def launch(self, *given: Any) -> None:
            raise RuntimeError("no luck")

    narrow, wide = Half("narrow", "bf16"), Half("wide", "fp16", "bf16")
    moe = fp8(h200, Broken("broken", "fp16", "bf16"), narrow, wide)
    run(moe, torch.float16)
    assert "no luck" in moe.dropped["broken"]
    run(moe, torch.bfloat16)
    assert (narrow.launched, wide.launched) == ([("bf16", TOKENS)], [("fp16", TOKENS)])


def test_weights_of_a_dtype_that_it_never_takes_drop_it_at_once(h200: Hardware) -> None:
    moe = LayerRuntime(weights(torch.float16), 2, h200, [Half("narrow", "bf16"), FakeKernel("other")])
    assert moe.dropped == {"narrow": "takes hidden states in bf16 only"}
    assert list(layer(h200, Half("narrow", "bf16")).kernels) == ["narrow"]


def test_every_kernel_that_refuses_fp16_says_so() -> None:
    """By its source, since most of them run on a GPU alone."""
    found = {}
    for kernel in get_registry().kernels.values():
        source = inspect.getsourcefile(sys.modules[type(kernel).__module__])
        launch = Path(source or "").with_name("launch.py")
        text = launch.read_text() if launch.is_file() else ""
        if "check_bf16(" in text or "x.dtype != torch.bfloat16" in text:
            found[kernel.name] = getattr(kernel, "hidden_dtypes", None)
    assert {"alpha_moe", "deep_gemm", "flashinfer_cutlass", "cute"} <= {*found}
    assert {*found.values()} == {("bf16",)}
