"""Kernels that raise in eager batches: dropped with their reason, and the batch computed by the next."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch
from layer_cases import PRICES, FakeKernel, by_hand, inputs, layer, model_of
from ramp_moe import Hardware, KernelConfig, KernelError, MoEShape, RoutingError, ShapeError
from ramp_moe.cost_model.model import join
from ramp_moe.runtime.choice import MOST_FAILURES
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.spec.launchable import Batch, Workspace

X, IDS, SCORES = inputs(40)


class Failing(FakeKernel):
    """Raises `error` in the configurations `blocks`, after half of the output was written; in all of them if None."""

    def __init__(self, error: Exception, name: str = "failing", blocks: tuple[int, ...] | None = None) -> None:
        super().__init__(name)
        self.error: Exception | None = error
        self.blocks = blocks
        self.raised = 0

    def launch(
        self, config: KernelConfig, prepared: Any, batch: Batch, out: torch.Tensor, workspace: Workspace
    ) -> None:
        if self.error is not None and (self.blocks is None or dict(config.params)["block"] in self.blocks):
            out[::2] = 1e4
            self.raised += 1
            raise self.error
        super().launch(config, prepared, batch, out, workspace)


def modelled(h200: Hardware, *kernels: FakeKernel, prices: dict[int, float] = PRICES) -> LayerRuntime:
    """Earlier kernels are predicted to be faster."""
    models = [
        model_of(h200, k, {block: (1 + 100 * i) * us for block, us in prices.items()}) for i, k in enumerate(kernels)
    ]
    return layer(h200, *kernels, cost_model=join(models))


def check(moe: LayerRuntime) -> None:
    out = torch.full_like(X, torch.nan)
    assert moe(X, IDS, SCORES, out) is out
    torch.testing.assert_close(out.float(), by_hand(X, IDS, SCORES), rtol=1e-2, atol=1e-3)


ERRORS = [
    KernelError("takes no such batch"),
    RuntimeError("CUDA error: invalid configuration argument\nand more lines"),
    ValueError("odd"),
    KeyError("missing"),
    AssertionError(),
    NotImplementedError("not yet"),
    type("OutOfResources", (Exception,), {})("shared memory"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("by_model", [False, True])
def test_the_next_kernel_computes_the_batch(
    error: Exception, by_model: bool, h200: Hardware, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = Failing(error), FakeKernel("good")
    moe = modelled(h200, bad, good) if by_model else layer(h200, bad, good)
    check(moe)
    check(moe)
    tried = 1 if not by_model else MOST_FAILURES
    assert bad.raised == tried, "and never again"
    reason = moe.dropped["failing"]
    assert reason.startswith(f"raised {type(error).__name__}")
    assert "\n" not in reason
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(lines) == tried
    assert lines[-1].startswith("ramp_moe: dropped failing, which raised")
    assert list(moe.configs()) == ["good"]
    assert moe.choose(Batch(X, IDS, SCORES)).kernel == "good"


def test_a_configuration_alone_is_dropped_while_others_of_its_kernel_run(h200: Hardware) -> None:
    bad = Failing(RuntimeError("no shared memory"), blocks=(8,))
    moe = modelled(h200, bad, prices={8: 0.01, 32: 0.02})
    check(moe)
    assert list(moe.dropped) == ["failing/bm8"]
    assert list(moe.configs()) == ["failing"]
    assert moe.choose(Batch(X, IDS, SCORES)).name == "failing/bm32"


def test_kernels_without_a_profile_come_last(h200: Hardware) -> None:
    bad, spare = Failing(RuntimeError("no")), FakeKernel("spare")
    moe = layer(h200, bad, spare, cost_model=model_of(h200, bad, PRICES))
    check(moe)
    assert spare.launched == [("bm8", 40)]


@pytest.mark.parametrize("by_model", [False, True])
def test_with_none_left_the_reasons_are_told_and_the_last_is_tried_again(by_model: bool, h200: Hardware) -> None:
    first, last = Failing(RuntimeError("no luck"), "first"), Failing(ValueError("odd"), "last")
    moe = modelled(h200, first, last) if by_model else layer(h200, first, last)
    with pytest.raises(
        KernelError, match=r"no kernel computes 40 tokens \(.*first: .*no luck.*last.*: ValueError: odd\)"
    ):
        moe(X, IDS, SCORES)
    last.error = None
    check(moe)


@pytest.mark.parametrize("error", [ShapeError("so"), RoutingError("so")])
def test_what_is_said_of_the_batch_is_raised(error: Exception, h200: Hardware) -> None:
    bad, good = Failing(error), FakeKernel("good")
    moe = layer(h200, bad, good)
    with pytest.raises(type(error), match="so"):
        moe(X, IDS, SCORES)
    assert moe.dropped == {}
    assert good.launched == []


def test_a_half_overwritten_input_is_not_computed_again(h200: Hardware) -> None:
    moe = layer(h200, Failing(RuntimeError("no luck")), FakeKernel("good"))
    x = X.clone()
    with pytest.raises(KernelError, match="failed while out overlaps hidden_states and is dropped; run that again"):
        moe(x, IDS, SCORES, out=x)
    x = X.clone()
    assert torch.equal(moe(x, IDS, SCORES, out=x), moe(X, IDS, SCORES))


def test_a_capture_is_not_gone_on_with(h200: Hardware, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was captured of a kernel that raised half way would be replayed."""
    from ramp_moe.runtime import fallback

    monkeypatch.setattr(fallback, "_capturing", lambda out: True)
    moe = layer(h200, Failing(RuntimeError("no luck")), FakeKernel("good"))
    with pytest.raises(KernelError, match="failed in the capture of a graph and is dropped; run that again"):
        moe(X, IDS, SCORES)
    check(moe)


def test_a_gpu_that_is_lost_is_said_to_be(h200: Hardware, monkeypatch: pytest.MonkeyPatch) -> None:
    from ramp_moe.runtime import fallback

    monkeypatch.setattr(fallback, "_lost", lambda out: "AcceleratorError: CUDA error: an illegal memory access")
    good = FakeKernel("good")
    moe = layer(h200, Failing(RuntimeError("no luck")), good)
    message = (
        "failing/bm8 failed (RuntimeError: no luck), and the GPU with it (AcceleratorError: CUDA error: an illegal"
    )
    with pytest.raises(KernelError, match=re.escape(message)):
        moe(X, IDS, SCORES)
    assert good.launched == []


class Hungry(FakeKernel):
    """Has memory for so many tokens."""

    room = 16

    def launch(
        self, config: KernelConfig, prepared: Any, batch: Batch, out: torch.Tensor, workspace: Workspace
    ) -> None:
        if batch.num_tokens > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        super().launch(config, prepared, batch, out, workspace)


def test_without_memory_the_parts_are_smaller(h200: Hardware, caplog: pytest.LogCaptureFixture) -> None:
    kernel = Hungry()
    x, ids, scores = inputs(150)
    moe = layer(h200, kernel)
    assert torch.equal(moe(x, ids, scores), layer(h200)(x, ids, scores))
    assert moe.dropped == {}
    assert {tokens for _, tokens in kernel.launched} == {16, 6}
    assert [r.getMessage() for r in caplog.records] == [
        f"ramp_moe: fake/bm128 lacks memory; in parts of {n} tokens" for n in (75, 37, 18)
    ]
    kernel.room = 0
    with pytest.raises(KernelError, match="fake/bm8 lacks memory for 16 tokens: OutOfMemoryError: CUDA out of memory"):
        moe(X, IDS, SCORES)
    assert moe.dropped == {}, "another batch may fit"


@pytest.mark.parametrize("where", ["in the capture of a graph", "while out overlaps hidden_states"])
def test_without_memory_nothing_is_dropped_where_there_is_no_second_try(
    where: str, h200: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ramp_moe.runtime import fallback

    monkeypatch.setattr(fallback, "_capturing", lambda out: "capture" in where)
    kernel, other = Hungry(), FakeKernel("other")
    kernel.room = 0
    moe = layer(h200, kernel, other)
    x = X.clone()
    with pytest.raises(KernelError, match=f"lacks memory {where}; free some, then run that again"):
        moe(x, IDS, SCORES, out=x if "out" in where else None)
    assert moe.dropped == {}
    assert other.launched == []
    kernel.room = 1000
    monkeypatch.undo()
    check(moe)
    assert kernel.launched


def test_warming_up_takes_the_next_kernel_too(h200: Hardware) -> None:
    good = FakeKernel("good")
    moe = layer(h200, Failing(RuntimeError("no luck")), good)
    assert moe.warm_up(5, torch.bfloat16) is None
    assert good.launched == [("bm8", 5)]


def test_a_kernel_without_a_default_is_passed_over(h200: Hardware) -> None:
    class Undecided(FakeKernel):
        def default_config(self, shape: MoEShape, hardware: Hardware, num_tokens: int) -> KernelConfig:
            raise ZeroDivisionError

    good = FakeKernel("good")
    check(layer(h200, Undecided("undecided"), good))
    assert good.launched == [("bm8", 40)]
    message = "no kernel has a default for 40 tokens (undecided: ZeroDivisionError: )"
    with pytest.raises(KernelError, match=re.escape(message)):
        layer(h200, Undecided("undecided"))(X, IDS, SCORES)


@pytest.mark.gpu
def test_gpu_the_next_kernel_computes_what_one_left_half_done() -> None:
    """Eager; and after a capture that failed, a second one."""
    from moe_cases import batch, weights
    from ramp_moe.registry.detect import detect
    from ramp_moe_kernels.triton.kernel import TritonMoE

    class Bad(TritonMoE):
        name = "bad"

        def launch(
            self, config: KernelConfig, prepared: Any, batch: Batch, out: torch.Tensor, workspace: Workspace
        ) -> None:
            out.fill_(torch.nan)
            raise RuntimeError("no luck")

    of, given = weights(8, 256, 128, "bf16", "cuda"), batch(40, 2, 8, 256, "uniform", "cuda", torch.bfloat16)
    routed = given.hidden_states, given.topk_ids, given.topk_weights
    wanted = LayerRuntime(of, 2, detect(), [TritonMoE()])(*routed)
    assert torch.equal(LayerRuntime(of, 2, detect(), [Bad(), TritonMoE()])(*routed), wanted)
    moe = LayerRuntime(of, 2, detect(), [Bad(), TritonMoE()])
    with pytest.raises(KernelError, match="in the capture of a graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        moe(*routed)
    out, graph = torch.empty_like(wanted), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moe(*routed, out)
    graph.replay()
    assert torch.equal(out, wanted)
