"""The layer around its kernels: what it launches, on what it decides, what it refuses. The kernel is plain torch."""

from __future__ import annotations

import contextlib
import copy
import math
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from layer_cases import PRICES, SHAPE, E, FakeKernel, H, I, K, by_hand, inputs, layer, model_of, weights
from ramp_moe import (
    Candidate,
    Hardware,
    HardwareError,
    KernelConfig,
    KernelError,
    MoEShape,
    RampMoEError,
    Registry,
    RoutingError,
    ShapeError,
)
from ramp_moe.cost_model.model import join
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.runtime.padding import valid_tokens
from ramp_moe.spec.launchable import Batch, MoEWeights, Workspace


def test_it_computes_the_layer(h200: Hardware) -> None:
    kernel = FakeKernel()
    moe = layer(h200, kernel)
    x, ids, scores = inputs(7)
    out = moe(x, ids, scores)
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
    torch.testing.assert_close(out.float(), by_hand(x, ids, scores), rtol=1e-2, atol=1e-3)
    assert torch.equal(moe.forward(x, ids.long(), scores), out)
    assert kernel.prepared == 1
    assert moe.shape == SHAPE


def test_without_tokens_nothing_is_launched(h200: Hardware) -> None:
    for options in ({}, {"checked": True}, {"cost_model": model_of(h200, FakeKernel(), PRICES)}):
        kernel = FakeKernel()
        out = layer(h200, kernel, **options)(*inputs(0))
        assert (out.shape, out.dtype) == ((0, H), torch.bfloat16)
        assert kernel.launched == []


def test_padding_is_skipped(h200: Hardware) -> None:
    x, ids, scores = inputs(6)
    ids[0, 0], ids[1, 1], ids[2] = -1, E, -1
    for options in ({}, {"checked": True}, {"cost_model": model_of(h200, FakeKernel(), PRICES)}):
        out = layer(h200, **options)(x, ids, scores)
        torch.testing.assert_close(out.float(), by_hand(x, ids, scores), rtol=1e-2, atol=1e-3)
        assert not out[2].any()


def test_without_a_model_the_static_default_is_launched(h200: Hardware) -> None:
    first, second = FakeKernel("first"), FakeKernel("second")
    moe = layer(h200, first, second)
    for kind in ("uniform", "one-hot"):
        moe(*inputs(5, kind))
        moe(*inputs(64, kind))
    assert first.launched == [("bm8", 5), ("bm128", 64)] * 2
    assert second.launched == []
    assert moe.choose(Batch(*inputs(5))).name == "first/bm8"


def test_with_a_model_the_choice_follows_the_histogram(h200: Hardware) -> None:
    kernel = FakeKernel()
    moe = layer(h200, kernel, cost_model=model_of(h200, kernel, PRICES))
    # 128 ids: one tile of 128 for 0.4 us or 16 of 8 for 1.6 us, where one expert has them; else at least one an expert.
    even = torch.arange(64 * K).view(64, K).int() % E
    x, skewed, scores = inputs(64, "one-hot")
    few = even % 4
    for ids, chosen in ((even, "bm8"), (skewed, "bm128"), (few, "bm32"), (even, "bm8")):
        assert moe.choose(Batch(x, ids.contiguous(), scores)).name == f"fake/{chosen}"
        moe(x, ids.contiguous(), scores)
        assert kernel.launched[-1] == (chosen, 64)
    # The model chooses among kernels as well, and a kernel's own default plays no part.
    other = FakeKernel("other")
    both = join([model_of(h200, kernel, {8: 0.1}), model_of(h200, other, {128: 0.4})])
    moe = layer(h200, kernel, other, cost_model=both)
    assert [moe.choose(Batch(x, ids, scores)).kernel for ids in (even, skewed)] == ["fake", "other"]


def test_what_gains_less_than_reading_back_takes_follows_the_size(h200: Hardware) -> None:
    kernel = FakeKernel()
    even = torch.arange(64 * K).view(64, K).int() % E
    x, skewed, scores = inputs(64, "one-hot")
    for host_sync_us, kinds in ((0.0, 2), (0.01, 2), (1e6, 1), (math.inf, 1)):
        moe = layer(h200, kernel, cost_model=model_of(h200, kernel, PRICES), host_sync_us=host_sync_us)
        assert len({moe.choose(Batch(x, ids, scores)).name for ids in (even, skewed)}) == kinds


def test_ids_out_of_range_do_not_sway_the_choice(h200: Hardware) -> None:
    kernel = FakeKernel()
    moe = layer(h200, kernel, cost_model=model_of(h200, kernel, PRICES))
    x, ids, scores = inputs(64, "one-hot")
    for garbage in (2**31 - 1, -(2**31), E + 1, -2):
        ids[0, 0] = garbage
        moe(x, ids, scores)
        assert kernel.launched[-1] == ("bm128", 64)


def test_a_capture_takes_what_ran_before_it(h200: Hardware, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a warm-up: a capture must not be the first to need a buffer."""
    kernel = FakeKernel()
    moe = layer(h200, kernel, cost_model=model_of(h200, kernel, PRICES))
    moe(*inputs(64, "one-hot"))
    ran = kernel.launched[-1]
    monkeypatch.setattr("ramp_moe.runtime.layer._capturing", lambda topk_ids: True)
    even = torch.arange(64 * K).view(64, K).int() % E
    x, _, scores = inputs(64)
    moe(x, even, scores)
    assert kernel.launched[-1] == ran == ("bm128", 64)


def test_a_rank_of_several_is_even_over_all(h200: Hardware, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FakeKernel()
    moe = layer(h200, kernel, cost_model=model_of(h200, kernel, PRICES), ep_size=4)
    seen: list[list[int]] = []
    choose = moe.chooser.dispatcher.choose
    monkeypatch.setattr(moe.chooser.dispatcher, "choose", lambda h: (seen.append(np.asarray(h).tolist()), choose(h))[1])
    monkeypatch.setattr("ramp_moe.runtime.layer._capturing", lambda topk_ids: True)
    moe.choose(Batch(*inputs(64)))
    assert seen == [[64 * K // 4 // E] * E]


def test_while_a_graph_is_captured_the_choice_is_for_an_even_spread(
    h200: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = FakeKernel()
    moe = layer(h200, kernel, cost_model=model_of(h200, kernel, PRICES))
    monkeypatch.setattr("ramp_moe.runtime.layer._capturing", lambda topk_ids: True)
    seen: list[list[int]] = []
    choose = moe.chooser.dispatcher.choose
    monkeypatch.setattr(moe.chooser.dispatcher, "choose", lambda h: (seen.append(np.asarray(h).tolist()), choose(h))[1])
    for tokens in (1, 8, 20, 64):
        moe.choose(Batch(*inputs(tokens, "one-hot")))
    # As many ids as there are: one token wakes two experts, not all of them.
    assert [sum(h) for h in seen] == [2, 16, 40, 128]
    assert [max(h) - min(h) for h in seen] == [1, 0, 1, 0]
    assert moe.choose(Batch(*inputs(64, "one-hot"))).name == "fake/bm8"


def test_kernels_are_dropped_with_their_reasons(h200: Hardware) -> None:
    absent = FakeKernel("absent")
    absent.missing = "needs a package; pip install it"
    bad = [FakeKernel("shy", reason="no such shape"), FakeKernel("picky", refuses="no such weights"), absent]
    good = FakeKernel("good")
    moe = layer(h200, *bad, good)
    assert moe.dropped == {
        "shy": "no such shape", "picky": "no such weights", "absent": "needs a package; pip install it",
    }  # fmt: skip
    moe(*inputs(3))
    assert good.launched == [("bm8", 3)]
    assert list(moe.configs()) == ["good"]
    assert [c.name for c in moe.configs()["good"]] == ["bm8", "bm32", "bm128"]
    # A model of all of them is narrowed to what is left.
    both = join([model_of(h200, bad[0], {8: 0.01}), model_of(h200, good, {32: 5.0})])
    assert layer(h200, *bad, good, cost_model=both).choose(Batch(*inputs(3))).name == "good/bm32"
    with pytest.raises(KernelError, match="no candidate"):
        layer(h200, good, cost_model=model_of(h200, bad[0], {8: 0.01}))


def test_no_kernel_is_left(h200: Hardware) -> None:
    with pytest.raises(KernelError, match=re.escape(f"no kernel can compute {SHAPE.slug} on h200 (none was given)")):
        LayerRuntime(weights(), K, h200, [])
    with pytest.raises(KernelError, match=r"\(shy: no such shape; picky: no such weights\)$"):
        layer(h200, FakeKernel("shy", reason="no such shape"), FakeKernel("picky", refuses="no such weights"))


def test_a_kernels_own_mistake_is_not_swallowed(h200: Hardware) -> None:
    class Broken(FakeKernel):
        def prepare(self, weights: MoEWeights) -> Any:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        layer(h200, Broken(), FakeKernel("good"))


TAKES = f"the layer takes hidden_states [T, {H}] and {K} ids a token, not "
X, IDS, SCORES = inputs(4)
WRONG: dict[str, tuple[Any, Any, Any, type[RampMoEError], str]] = {
    "hidden size": (X[:, :16].contiguous(), IDS, SCORES, ShapeError, TAKES + "[4, 16] and 2"),
    "top_k": (X, IDS[:, :1].contiguous(), SCORES[:, :1].contiguous(), ShapeError, TAKES + "[4, 32] and 1"),
    "no ids": (X, IDS[:, :0], SCORES[:, :0], ShapeError, TAKES + "[4, 32] and 0"),
    "tokens": (X[:3], IDS, SCORES, RoutingError, "topk_ids must be contiguous int32 [3, k]"),
    "weights": (X, IDS, SCORES[:3], RoutingError, "topk_weights must be contiguous float32 [4, 2]"),
    "half weights": (X, IDS, SCORES.bfloat16(), RoutingError, "topk_weights must be contiguous float32 [4, 2]"),
    "float ids": (X, IDS.float(), SCORES, RoutingError, "topk_ids must be contiguous int32 [4, k], not torch.float32"),
    "bool ids": (X, IDS.bool(), SCORES, RoutingError, "topk_ids must be contiguous int32 [4, k], not torch.bool"),
    "float32": (X.float(), IDS, SCORES, ShapeError, "hidden_states must be contiguous bf16 or fp16"),
    "other half": (X.half(), IDS, SCORES, ShapeError, "hidden_states must be torch.bfloat16 as the weights are"),
    "elsewhere": (
        X.to("meta"),
        IDS.to("meta"),
        SCORES.to("meta"),
        ShapeError,
        "hidden_states is on meta, the weights on cpu; move it there",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_inputs_that_do_not_fit(case: str, h200: Hardware) -> None:
    x, ids, scores, error, message = WRONG[case]
    kernel = FakeKernel()
    for options in ({}, {"checked": True}):
        with pytest.raises(error, match="^" + re.escape(message)):
            layer(h200, kernel, **options)(x, ids, scores)
    assert kernel.launched == []


def test_fp8_weights_take_both_halves(h200: Hardware) -> None:
    eight = MoEWeights(
        torch.zeros(2, 256, 128, dtype=torch.float8_e4m3fn),
        torch.zeros(2, 128, 128, dtype=torch.float8_e4m3fn),
        torch.ones(2, 2, 1),
        torch.ones(2, 1, 1),
    )

    class Zero(FakeKernel):
        def launch(
            self, config: KernelConfig, prepared: Any, batch: Batch, out: torch.Tensor, workspace: Workspace
        ) -> None:
            out.zero_()

    moe = LayerRuntime(eight, 1, h200, [Zero()])
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.ones(3, 128, dtype=dtype)
        assert moe(x, torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1)).dtype == dtype


@pytest.mark.parametrize("garbage", [-2, E + 1, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("wide", [False, True])
def test_garbage_ids_are_refused_or_skipped(garbage: int, wide: bool, h200: Hardware) -> None:
    x, ids, scores = inputs(4)
    ids[1, 0] = garbage
    given = ids.long() if wide else ids
    with pytest.raises(RoutingError, match=rf"expert id {garbage} is outside \[0, {E}\)"):
        layer(h200, checked=True)(x, given, scores)
    torch.testing.assert_close(layer(h200)(x, given, scores).float(), by_hand(x, ids, scores), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("garbage", [2**32 + 3, -(2**32) + 3, 2**63 - 1])
def test_int64_ids_do_not_wrap_around_to_an_expert(garbage: int, h200: Hardware) -> None:
    x, ids, scores = inputs(4)
    given = ids.long()
    given[1, 0] = garbage
    with pytest.raises(RoutingError, match=f"expert id {garbage} is outside"):
        layer(h200, checked=True)(x, given, scores)
    ids[1, 0] = -1
    expected = layer(h200)(x, ids, scores)
    assert torch.equal(layer(h200)(x, given, scores), expected)
    assert given[1, 0] == garbage, "the caller's ids are not touched"


@pytest.mark.parametrize(
    "other",
    [
        MoEShape(E, 3, H, I, "bf16"),
        MoEShape(8, K, H, I, "bf16"),
        MoEShape(E, K, H, I, "fp16"),
        MoEShape(E, K, 64, I, "bf16"),
    ],
    ids=lambda shape: shape.slug,
)
def test_a_cost_model_for_another_shape_is_refused(other: MoEShape, h200: Hardware) -> None:
    kernel = FakeKernel()
    message = f"the cost model is for {other.slug}, the weights are {SHAPE.slug}"
    with pytest.raises(ShapeError, match=re.escape(message)):
        layer(h200, kernel, cost_model=model_of(h200, kernel, PRICES, other))


def test_a_cost_model_of_another_gpu_is_refused(registry: Registry, h200: Hardware) -> None:
    kernel = FakeKernel()
    with pytest.raises(HardwareError, match="fitted on h200, the layer is on b200"):
        layer(registry.device("b200"), kernel, cost_model=model_of(h200, kernel, PRICES))


def test_two_kernels_of_one_name_are_refused(h200: Hardware) -> None:
    with pytest.raises(KernelError, match=r"two of the layer's kernels are named '.*'; give one of them"):
        layer(h200, FakeKernel(), FakeKernel())


def test_top_k_must_exist(h200: Hardware) -> None:
    with pytest.raises(ShapeError, match=f"top_k {E + 1} exceeds num_experts {E}"):
        LayerRuntime(weights(), E + 1, h200, [FakeKernel()])
    with pytest.raises(ShapeError, match="top_k must be a positive integer"):
        LayerRuntime(weights(), 0, h200, [FakeKernel()])


def test_out_is_written_and_returned(h200: Hardware) -> None:
    moe = layer(h200)
    x, ids, scores = inputs(6)
    out = torch.full_like(x, float("nan"))
    assert moe(x, ids, scores, out=out) is out
    assert torch.equal(out, moe(x, ids, scores))
    again = out.clone()
    assert moe(x, ids, scores, out) is out
    assert torch.equal(out, again)
    empty = torch.empty(0, H, dtype=x.dtype)
    assert moe(*inputs(0), out=empty) is empty


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.empty(5, H, dtype=torch.bfloat16), "out must be contiguous torch.bfloat16 [4, 32]"),
        (torch.empty(4, H), "out must be contiguous torch.bfloat16 [4, 32]"),
        (torch.empty(H, 4, dtype=torch.bfloat16).T, "out must be contiguous torch.bfloat16 [4, 32]"),
        (torch.empty(4, H, dtype=torch.bfloat16, device="meta"), "out is on meta, the weights on cpu"),
    ],
    ids=["shape", "dtype", "strides", "device"],
)
def test_an_out_that_does_not_fit(out: torch.Tensor, message: str, h200: Hardware) -> None:
    with pytest.raises(ShapeError, match=re.escape(message)):
        layer(h200)(X, IDS, SCORES, out=out)


def test_launch_runs_what_it_is_told(h200: Hardware) -> None:
    kernel = FakeKernel()
    moe = layer(h200, kernel)
    given = Batch(X, IDS, SCORES)
    wanted = moe(X, IDS, SCORES)
    for config in moe.configs()["fake"]:
        out = torch.full_like(X, float("nan"))
        moe.launch(Candidate("fake", config), given, out)
        assert torch.equal(out, wanted)
    assert [name for name, _ in kernel.launched] == ["bm8", "bm8", "bm32", "bm128"]


def test_the_workspace_is_kept_between_calls(h200: Hardware) -> None:
    moe = layer(h200)
    moe(*inputs(8))
    size = moe.workspace.bytes
    assert size >= 8 * H * 4
    for tokens in (8, 3, 8):
        moe(*inputs(tokens))
    assert moe.workspace.bytes == size
    moe(*inputs(9))
    assert moe.workspace.bytes > size


@pytest.mark.parametrize(
    ("num_valid", "message"),
    [
        (torch.tensor([1, 2]), "num_valid must be one integer, an int or int32 [1], not torch.int64 [2]"),
        (torch.zeros(0, dtype=torch.int32), "num_valid must be one integer, an int or int32 [1], not torch.int32 [0]"),
        (torch.tensor([1.0]), "num_valid must be one integer, an int or int32 [1], not torch.float32 [1]"),
        (torch.tensor(True), "num_valid must be one integer, an int or int32 [1], not torch.bool []"),
        (1.0, "num_valid must be one integer, an int or int32 [1], not 1.0"),
        (True, "num_valid must be one integer, an int or int32 [1], not True"),
        ("2", "num_valid must be one integer, an int or int32 [1], not '2'"),
        (torch.zeros(1, dtype=torch.int32, device="meta"), "num_valid is on meta, topk_ids on cpu; move it there"),
    ],
)
def test_a_number_of_valid_tokens_that_does_not_fit(h200: Hardware, num_valid: Any, message: str) -> None:
    with pytest.raises(RoutingError, match="^" + re.escape(message)):
        layer(h200, FakeKernel())(X, IDS, SCORES, num_valid=num_valid)


@pytest.mark.parametrize("count", [2, 0, 4, -1, -(2**31), 5, 2**31 - 1, 2**40, -(2**40)])
@pytest.mark.parametrize("compiling", [False, True])
def test_tokens_past_the_valid_ones_are_zero(
    h200: Hardware, count: int, compiling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the number is given, and whatever it is; through the operator that torch.compile sees, too."""
    moe = layer(h200, FakeKernel())
    whole, kept = moe(X, IDS, SCORES), min(max(count, 0), len(X))
    forms: list[Any] = [count, np.int64(count), torch.tensor(count), torch.tensor([count]), torch.tensor([[count]])]
    if abs(count) < 2**31:
        forms += [torch.tensor([count], dtype=torch.int32), torch.tensor(count, dtype=torch.int32)]
    if 0 <= count < 256:
        forms.append(torch.tensor([count], dtype=torch.uint8))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    for num_valid in forms:
        out = moe(X, IDS, SCORES, num_valid=num_valid)
        assert torch.equal(out[:kept], whole[:kept])
        assert not out[kept:].any()


def test_an_int_is_refused_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RoutingError, match="num_valid is the int 3, which a CUDA graph would keep; give an int32"):
        valid_tokens(3, 4, torch.device("cuda"))
    given = torch.ones(1, dtype=torch.int32)
    assert valid_tokens(given, 4, given.device) is not None
    assert valid_tokens(given, 4, given.device).data_ptr() == given.data_ptr()


def test_threads_launch_one_after_the_other(h200: Hardware) -> None:
    """Layers that share a workspace write to the same buffers."""
    together = threading.Barrier(2)

    class Waiting(FakeKernel):
        def launch(self, *given: Any) -> None:
            with contextlib.suppress(threading.BrokenBarrierError):
                together.wait(0.1)
                overlapped.append(given)
            super().launch(*given)

    overlapped: list[Any] = []
    layers = [layer(h200, Waiting()) for _ in range(2)]
    layers[1].workspace = layers[0].workspace
    with ThreadPoolExecutor(2) as pool:
        outs = [pool.submit(moe, *inputs(3)) for moe in layers]
        assert all(torch.equal(out.result(), layers[0](*inputs(3))) for out in outs)
    assert not overlapped
    assert copy.deepcopy(layers[0].workspace).lock is not layers[0].workspace.lock


@pytest.mark.parametrize(("tokens", "dtype"), [(0, torch.bfloat16), (-1, torch.bfloat16), (4, torch.float16)])
def test_warming_up_for_what_a_layer_does_not_take(tokens: int, dtype: torch.dtype, h200: Hardware) -> None:
    moe = layer(h200)
    with pytest.raises(ShapeError, match=r"token|must be torch.bfloat16"):
        moe.warm_up(tokens, dtype)
    assert not moe.dropped
    assert moe(*inputs(4)).shape == (4, H)


def test_what_is_remembered_may_be_cleared_by_another_thread(h200: Hardware) -> None:
    """At any moment: here, as soon as it is noted."""

    class Cleared(dict[Any, Any]):
        def __setitem__(self, key: Any, value: Any) -> None:
            """Forget it."""

    moe = layer(h200, FakeKernel())
    moe.chooser._known, moe._choosers, moe._ready, moe._picky = Cleared(), Cleared(), Cleared(), True
    x, ids, scores = inputs(7)
    for _ in range(2):
        torch.testing.assert_close(moe(x, ids, scores).float(), by_hand(x, ids, scores), rtol=2e-2, atol=1e-3)
