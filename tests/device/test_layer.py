"""The layer around its kernels: what it launches, on what it decides, what it refuses. The kernel is plain torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from ramp_moe import (
    Candidate,
    CostModel,
    GridGeometry,
    Hardware,
    HardwareError,
    KernelConfig,
    KernelError,
    MoEShape,
    RampMoEError,
    Registry,
    RoutingError,
    ShapeError,
    Stage,
    WeightLayout,
    expert_histogram,
    fit_sweep,
    generate,
)
from ramp_moe.cost_model import join
from ramp_moe.device import Batch, LaunchableKernel, MoELayer, MoEWeights, Workspace, relayout
from ramp_moe.kernel import LAYOUTS
from ramp_moe.sweep import FORMAT, VERSION, Column, Row, Run, ShapeRecord, SweepRecord, make_sweep

E, K, H, I = 16, 2, 32, 16  # noqa: E741
SHAPE = MoEShape(E, K, H, I, "bf16")
BLOCKS = (8, 32, 128)


def weights(dtype: torch.dtype = torch.bfloat16) -> MoEWeights:
    generator = torch.Generator().manual_seed(1)
    gate_up, down = (torch.randn(shape, generator=generator) * 0.2 for shape in ((E, 2 * I, H), (E, H, I)))
    return MoEWeights(gate_up.to(dtype), down.to(dtype))


class FakeKernel(LaunchableKernel):
    """The layer token by token, in float32. Its three configurations differ in their token blocks alone; `launched`
    lists what was run."""

    def __init__(
        self,
        name: str = "fake",
        reason: str | None = None,
        refuses: str | None = None,
        layouts: tuple[str, ...] = ("gate-first",),
    ) -> None:
        self.name, self.reason, self.refuses, self.layouts = name, reason, refuses, layouts
        self.launched: list[tuple[str, int]] = []
        self.missing: str | None = None
        self.prepared = 0

    def unsupported(self, shape: MoEShape, hardware: Hardware) -> str | None:
        return self.reason

    def unavailable(self) -> str | None:
        return self.missing

    def config(self, block: int) -> KernelConfig:
        grid = GridGeometry(block, 2 * I, H, 2 * I, H, 1)
        return KernelConfig(f"bm{block}", (Stage("gemm", f"{self.name}/bm{block}", grid),), (("block", block),))

    def configs(self, shape: MoEShape, hardware: Hardware) -> Sequence[KernelConfig]:
        return [self.config(block) for block in BLOCKS]

    def weight_layout(self, shape: MoEShape) -> WeightLayout:
        return WeightLayout(self.layouts[0], shape.num_experts * shape.expert_bytes)

    def readable_layouts(self, shape: MoEShape) -> tuple[str, ...]:
        return self.layouts

    def prepare(self, weights: MoEWeights) -> Any:
        if self.refuses is not None:
            raise KernelError(self.refuses)
        self.prepared += 1
        self.given = weights
        weights = relayout(weights, "gate-first")
        return weights.gate_up.float(), weights.down.float()

    def default_config(self, shape: MoEShape, hardware: Hardware, num_tokens: int) -> KernelConfig:
        return self.config(8 if num_tokens < 64 else 128)

    def launch(
        self, config: KernelConfig, prepared: Any, batch: Batch, out: torch.Tensor, workspace: Workspace
    ) -> None:
        assert batch.num_tokens > 0
        self.launched.append((config.name, batch.num_tokens))
        gate_up, down = prepared
        total = workspace.get("total", (batch.num_tokens, H), torch.float32, out.device).zero_()
        for t, k in np.ndindex(batch.num_tokens, batch.top_k):
            expert = int(batch.topk_ids[t, k])
            if 0 <= expert < E:
                gate, up = (gate_up[expert] @ batch.hidden_states[t].float()).chunk(2)
                total[t] += batch.topk_weights[t, k] * (down[expert] @ (gate * gate.sigmoid() * up))
        out.copy_(total)


def inputs(tokens: int, kind: str = "uniform", seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.from_numpy(generate(kind, tokens, E, K, seed)).int()
    x = torch.randn(tokens, H, generator=generator).bfloat16()
    return x, ids, torch.rand(tokens, K, generator=generator)


def by_hand(x: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Every expert for every token, then the sum over those that were asked for."""
    w = weights()
    gate, up = torch.einsum("eih,th->tei", w.gate_up.float(), x.float()).chunk(2, -1)
    of_all = torch.einsum("ehi,tei->teh", w.down.float(), torch.nn.functional.silu(gate) * up)
    asked = torch.zeros(len(x), E + 2)
    asked.scatter_add_(1, torch.where((ids < 0) | (ids > E), E, ids).long(), scores)
    return torch.einsum("te,teh->th", asked[:, :E], of_all)


def layer(hardware: Hardware, *kernels: FakeKernel, **options: Any) -> MoELayer:
    return MoELayer(weights(), K, hardware, kernels or [FakeKernel()], **options)


def model_of(hardware: Hardware, kernel: FakeKernel, us_a_tile: dict[int, float], shape: MoEShape = SHAPE) -> CostModel:
    """Each configuration costs 1 us, and so many us for each of its tiles, exactly."""
    found = []
    for block, price in us_a_tile.items():
        config = kernel.config(block)
        rows = []
        for tokens in (1, 4, 16, 64, 256, 1024):
            for kind in ("uniform", "zipf1.2", "active0.25", "one-hot"):
                h = expert_histogram(
                    generate(kind, tokens, shape.num_experts, shape.top_k, seed=tokens), shape.num_experts
                )
                tiles = sum(-(-n // block) for n in h.tolist())
                rows.append(Row(tokens, kind, h.tolist(), [[1 + price * tiles]]))
        record = SweepRecord(
            format=FORMAT, version=VERSION, device=hardware.name, kernel=kernel.name, kernel_version="1",
            shape=ShapeRecord.of(shape), runs=[Run("2026-01-01", hardware.device_names[0], "", {}, "made up")],
            columns=[Column("gemm", config.stages[0].key)], left_out=[], rows=rows,
        )  # fmt: skip
        found.append(fit_sweep(make_sweep(record), [Candidate(kernel.name, config)], hardware))
    return join(found)


PRICES = {8: 0.1, 32: 0.2, 128: 0.4}


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
    for options in ({}, {"checked": True}, {"model": model_of(h200, FakeKernel(), PRICES)}):
        kernel = FakeKernel()
        out = layer(h200, kernel, **options)(*inputs(0))
        assert (out.shape, out.dtype) == ((0, H), torch.bfloat16)
        assert kernel.launched == []


def test_padding_is_skipped(h200: Hardware) -> None:
    x, ids, scores = inputs(6)
    ids[0, 0], ids[1, 1], ids[2] = -1, E, -1
    for options in ({}, {"checked": True}, {"model": model_of(h200, FakeKernel(), PRICES)}):
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
    moe = layer(h200, kernel, model=model_of(h200, kernel, PRICES))
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
    moe = layer(h200, kernel, other, model=both)
    assert [moe.choose(Batch(x, ids, scores)).kernel for ids in (even, skewed)] == ["fake", "other"]


def test_ids_out_of_range_do_not_sway_the_choice(h200: Hardware) -> None:
    kernel = FakeKernel()
    moe = layer(h200, kernel, model=model_of(h200, kernel, PRICES))
    x, ids, scores = inputs(64, "one-hot")
    for garbage in (2**31 - 1, -(2**31), E + 1, -2):
        ids[0, 0] = garbage
        moe(x, ids, scores)
        assert kernel.launched[-1] == ("bm128", 64)


def test_while_a_graph_is_captured_the_choice_is_for_an_even_spread(
    h200: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = FakeKernel()
    moe = layer(h200, kernel, model=model_of(h200, kernel, PRICES))
    monkeypatch.setattr(MoELayer, "_capturing", staticmethod(lambda batch: True))
    seen: list[list[int]] = []
    choose = moe._dispatcher.choose
    monkeypatch.setattr(moe._dispatcher, "choose", lambda h: (seen.append(np.asarray(h).tolist()), choose(h))[1])
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
    assert layer(h200, *bad, good, model=both).choose(Batch(*inputs(3))).name == "good/bm32"
    with pytest.raises(KernelError, match="no candidate"):
        layer(h200, good, model=model_of(h200, bad[0], {8: 0.01}))


def test_no_kernel_is_left(h200: Hardware) -> None:
    with pytest.raises(KernelError, match=re.escape(f"no kernel can compute {SHAPE.slug} on h200 (none was given)")):
        MoELayer(weights(), K, h200, [])
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

    moe = MoELayer(eight, 1, h200, [Zero()])
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


def test_the_router_is_asked(h200: Hardware) -> None:
    x, ids, scores = inputs(5)
    asked: list[torch.Tensor] = []

    def router(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(hidden)
        return ids, scores

    moe = layer(h200, router=router)
    assert torch.equal(moe.forward_hidden(x), moe(x, ids, scores))
    assert len(asked) == 1
    assert asked[0] is x
    with pytest.raises(RoutingError, match="built without a router; call forward with top-k ids and weights"):
        layer(h200).forward_hidden(x)
    with pytest.raises(ShapeError, match="2 ids a token"):
        layer(h200, router=lambda hidden: (ids[:, :1].contiguous(), scores[:, :1].contiguous())).forward_hidden(x)


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
        layer(h200, kernel, model=model_of(h200, kernel, PRICES, other))


def test_a_cost_model_of_another_gpu_is_refused(registry: Registry, h200: Hardware) -> None:
    kernel = FakeKernel()
    with pytest.raises(HardwareError, match="fitted on h200, the layer is on b200"):
        layer(registry.device("b200"), kernel, model=model_of(h200, kernel, PRICES))


def test_two_kernels_of_one_name_are_refused(h200: Hardware) -> None:
    with pytest.raises(KernelError, match=r"two of the layer's kernels are named '.*'; give one of them"):
        layer(h200, FakeKernel(), FakeKernel())


def test_top_k_must_exist(h200: Hardware) -> None:
    with pytest.raises(ShapeError, match=f"top_k {E + 1} exceeds num_experts {E}"):
        MoELayer(weights(), E + 1, h200, [FakeKernel()])
    with pytest.raises(ShapeError, match="top_k must be a positive integer"):
        MoELayer(weights(), 0, h200, [FakeKernel()])


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


# --- weight layouts --------------------------------------------------------------------------------------------------

MIXED = "gate-up-interleaved-8"


def kernels() -> tuple[FakeKernel, FakeKernel, FakeKernel]:
    """One that reads the weights interleaved, one that reads them gate-first, one that reads all layouts."""
    return FakeKernel("mixed", layouts=(MIXED,)), FakeKernel("plain"), FakeKernel("any", layouts=LAYOUTS)


def test_one_copy_of_the_weights_that_all_kernels_read(h200: Hardware) -> None:
    mixed, _, any_ = kernels()
    moe = layer(h200, any_, mixed)
    assert (moe.layouts, moe.dropped) == ((MIXED,), {})
    assert mixed.given is any_.given, "one copy"
    assert mixed.given.layout == MIXED
    for kernel in (mixed, any_):
        out = torch.full_like(X, float("nan"))
        moe.launch(Candidate(kernel.name, kernel.config(8)), Batch(X, IDS, SCORES), out)
        torch.testing.assert_close(out.float(), by_hand(X, IDS, SCORES), rtol=1e-2, atol=1e-3)


def test_weights_are_used_as_they_are_given_where_that_will_do(h200: Hardware) -> None:
    for layout in LAYOUTS:
        any_, given = kernels()[2], relayout(weights(), layout)
        moe = MoELayer(given, K, h200, [any_])
        assert moe.layouts == (layout,)
        assert any_.given is given


def test_without_a_model_the_first_kernel_is_kept(h200: Hardware) -> None:
    for order in ((0, 1, 2), (1, 0, 2)):
        first, second, third = (kernels()[i] for i in order)
        moe = layer(h200, first, second, third)
        assert list(moe.configs()) == [first.name, third.name]
        assert moe.layouts == first.layouts
        assert moe.dropped == {
            second.name: f"reads weights in {second.layouts[0]}, which are held in {first.layouts[0]} alone; "
            "copies=2 would keep it"
        }
        assert second.prepared == 0
    mixed, plain, any_ = kernels()
    moe = layer(h200, mixed, plain, any_, copies=2)
    assert (set(moe.layouts), moe.dropped) == ({"gate-first", MIXED}, {})
    assert (mixed.given.layout, plain.given.layout, any_.given.layout) == (MIXED, "gate-first", "gate-first")
    assert any_.given is plain.given


def test_with_a_model_the_kernels_that_are_faster_are_kept(h200: Hardware) -> None:
    # The wide tiles of the one pay for batches on few experts, the narrow ones of the other for all else.
    mixed, plain, _ = kernels()
    model = join([model_of(h200, mixed, {8: 0.1}), model_of(h200, plain, {128: 0.4})])
    one = layer(h200, plain, mixed, model=model)
    assert list(one.configs()) in (["plain"], ["mixed"])
    (dropped,) = one.dropped.values()
    assert dropped.endswith("copies=2 would keep it")
    two = layer(h200, plain, mixed, model=model, copies=2)
    assert (set(two.layouts), two.dropped) == ({"gate-first", MIXED}, {})
    # One that is never faster is no reason for a copy.
    model = join([model_of(h200, mixed, {8: 0.1}), model_of(h200, plain, {8: 0.2})])
    for copies in (1, 2):
        moe = layer(h200, plain, mixed, model=model, copies=copies)
        assert (moe.layouts, list(moe.configs())) == ((MIXED,), ["mixed"])
        assert moe.dropped["plain"].endswith("a copy for it would gain nothing by the cost model")


def test_a_kernel_that_refuses_leaves_the_choice_to_the_others(h200: Hardware) -> None:
    refusing = FakeKernel("picky", refuses="no such weights", layouts=(MIXED,))
    _, plain, _ = kernels()
    moe = layer(h200, refusing, plain)
    assert (moe.layouts, moe.dropped) == (("gate-first",), {"picky": "no such weights"})
    assert plain.given.layout == "gate-first"
    # So does one whose layout the sizes rule out.
    odd = MoEWeights(torch.zeros(E, 24, H).bfloat16(), torch.zeros(E, H, 12).bfloat16())
    mixed, plain, _ = kernels()
    moe = MoELayer(odd, K, h200, [mixed, plain])
    assert moe.layouts == ("gate-first",)
    assert moe.dropped == {"mixed": f"{MIXED} needs an intermediate size in multiples of 8, not 12"}


def test_a_format_of_its_own_is_made_of_gate_first(h200: Hardware) -> None:
    tiled = FakeKernel("tiled", layouts=("tiled",))
    moe = MoELayer(relayout(weights(), "up-first"), K, h200, [tiled])
    assert moe.layouts == ("tiled",)
    assert tiled.given.layout == "gate-first"


def test_there_must_be_a_copy(h200: Hardware) -> None:
    with pytest.raises(KernelError, match="at least one copy, not 0"):
        layer(h200, copies=0)
