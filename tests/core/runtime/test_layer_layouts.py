"""The layer's copies of the weights: in which layouts they are, and which kernels that leaves out."""

from __future__ import annotations

import pytest
import torch
from layer_cases import E, FakeKernel, H, K, by_hand, inputs, layer, model_of, weights
from ramp_moe import Candidate, Hardware, KernelError
from ramp_moe.cost_model.model import join
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.runtime.relayout import relayout
from ramp_moe.spec.kernel import LAYOUTS
from ramp_moe.spec.launchable import Batch, MoEWeights

MIXED = "gate-up-interleaved-8"
X, IDS, SCORES = inputs(4)


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
        moe = LayerRuntime(given, K, h200, [any_])
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
    one = layer(h200, plain, mixed, cost_model=model)
    assert list(one.configs()) in (["plain"], ["mixed"])
    (dropped,) = one.dropped.values()
    assert dropped.endswith("copies=2 would keep it")
    two = layer(h200, plain, mixed, cost_model=model, copies=2)
    assert (set(two.layouts), two.dropped) == ({"gate-first", MIXED}, {})
    # One that is never faster is no reason for a copy.
    model = join([model_of(h200, mixed, {8: 0.1}), model_of(h200, plain, {8: 0.2})])
    for copies in (1, 2):
        moe = layer(h200, plain, mixed, cost_model=model, copies=copies)
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
    moe = LayerRuntime(odd, K, h200, [mixed, plain])
    assert moe.layouts == ("gate-first",)
    assert moe.dropped == {"mixed": f"{MIXED} needs an intermediate size in multiples of 8, not 12"}


def test_a_format_of_its_own_is_made_of_gate_first(h200: Hardware) -> None:
    tiled = FakeKernel("tiled", layouts=("tiled",))
    moe = LayerRuntime(relayout(weights(), "up-first"), K, h200, [tiled])
    assert moe.layouts == ("tiled",)
    assert tiled.given.layout == "gate-first"


def test_there_must_be_a_copy(h200: Hardware) -> None:
    with pytest.raises(KernelError, match="at least one copy, not 0"):
        layer(h200, copies=0)
