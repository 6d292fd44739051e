"""What can win is compiled in the background: layers choose among what is compiled, and take more once it is."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from layer_cases import PRICES, FakeKernel, K, by_hand, inputs, model_of, weights
from planted_compiler import Compiled
from ramp_moe import CostModel, DispatchOptions, Hardware, KernelError
from ramp_moe.cost_model.model import join
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.runtime.layer_factory import Builder
from ramp_moe.runtime.on_demand import OnDemand, on_demand, worth_trying
from ramp_moe.spec.compiling import VARIABLE

FEW, MANY = inputs(2), inputs(1024)


@pytest.fixture(autouse=True)
def on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def slow() -> FakeKernel:
    """A kernel that needs no compiling."""
    return FakeKernel("slow")


def model(hardware: Hardware, kernel: FakeKernel, other: FakeKernel | None = None) -> CostModel:
    """The kernel is the faster one, by its small blocks for small batches, and by its large ones for large batches."""
    found = [model_of(hardware, kernel, PRICES)]
    if other is not None:
        found.append(model_of(hardware, other, {8: 1.0}))
    return join(found)


def built(hardware: Hardware, *kernels: FakeKernel) -> tuple[LayerRuntime, Builder]:
    options = DispatchOptions(kernels=kernels, cost_model=model(hardware, *kernels), host_sync_us=0.0)
    builder = Builder("h200", options)
    return builder.layer(weights(), K), builder


def check(layer: LayerRuntime, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    wanted = by_hand(*batch)
    assert (layer(*batch).float() - wanted).norm() < 1e-2 * wanted.norm()


def of(layer: LayerRuntime) -> OnDemand:
    assert layer._compiling is not None
    return layer._compiling


def settle(layer: LayerRuntime) -> None:
    """Wait until all is compiled. The layer may know already that it is."""
    if layer._compiling is not None:
        layer._compiling.wait()


def test_a_layer_computes_with_what_is_ready_and_takes_what_is_compiled_later(h200: Hardware) -> None:
    kernel, other = Compiled(), slow()
    layer, builder = built(h200, kernel, other)
    compiling = of(layer)
    second = builder.layer(weights(), K)
    check(layer, FEW)
    check(layer, MANY)
    assert not kernel.launched
    assert {name for name, _ in other.launched} == {"bm8"}
    kernel.allow(3)
    compiling.wait()
    check(layer, FEW)
    check(layer, MANY)
    assert {("bm8", 2), ("bm128", 1024)} <= {*kernel.launched}
    assert len(other.launched) == 2, "what is faster is taken"
    assert layer._compiling is None, "nothing is asked any more"
    check(second, MANY)
    assert len(other.launched) == 2
    assert layer.chooser.model is second.chooser.model, "what is derived from the model is derived once"
    assert len([n for n in builder.notes if "background" in n]) == 1


def test_each_configuration_is_used_as_soon_as_it_is_compiled(h200: Hardware) -> None:
    kernel, other = Compiled(), slow()
    layer, _ = built(h200, kernel, other)
    compiling = of(layer)
    kernel.allow()
    while compiling.version == 0:
        pass
    check(layer, MANY)
    assert [name for name, _ in kernel.launched] == kernel.asked[:1]
    kernel.allow(2)
    compiling.wait()


def test_what_is_best_for_batches_that_were_met_is_compiled_first(h200: Hardware) -> None:
    for tokens, first in ((1, "bm8"), (4096, "bm128")):
        kernel, other = Compiled(), slow()
        _, compiling = on_demand(model(h200, kernel, other), [kernel, other], 1, [])
        assert compiling is not None
        compiling.meet(tokens)
        kernel.allow(3)
        compiling.begin()
        compiling.wait()
        assert kernel.asked[0] == first


def test_what_no_batch_needs_is_not_compiled(h200: Hardware) -> None:
    kernel, other = Compiled(), slow()
    whole = join([model_of(h200, kernel, {8: 0.1, 32: 50.0, 128: 90.0}), model_of(h200, other, {8: 1.0})])
    _, compiling = on_demand(whole, [kernel, other], 1, [])
    assert compiling is not None
    kernel.allow(3)
    compiling.begin()
    compiling.wait()
    assert kernel.asked == ["bm8"]
    assert compiling.done
    assert {c.name for c in compiling.model.candidates} == {"compiled/bm8", "slow/bm8"}
    tried = worth_trying(whole, [Compiled(), other], 1)
    assert {c.name for c in tried.candidates} == {"compiled/bm8", "slow/bm8"}
    again = worth_trying(whole, [kernel, other], 1)
    assert again.candidates == tried.candidates, "the same once it is compiled: a calibration goes by it"


def test_what_spills_is_never_chosen(h200: Hardware) -> None:
    kernel, other = Compiled(spills=["bm8"]), slow()
    layer, _ = built(h200, kernel, other)
    kernel.allow(3)
    settle(layer)
    check(layer, FEW)
    check(layer, MANY)
    assert {name for name, _ in kernel.launched} <= {"bm32", "bm128"}
    later, _ = built(h200, kernel, other)
    check(later, FEW)
    assert later._compiling is None
    assert "compiled/bm8" not in {c.name for c in later.chooser.model.candidates}  # type: ignore[union-attr]


def test_what_was_dropped_stays_dropped(h200: Hardware) -> None:
    kernel, other = Compiled(objects=["bm128"]), slow()
    layer, _ = built(h200, kernel, other)
    compiling = of(layer)
    failed = next(c for c in compiling.model.candidates if c.name == "compiled/bm128")
    assert layer.drop(failed, "it failed") == "compiled/bm128"
    kernel.allow(3)
    compiling.wait()
    check(layer, MANY)
    assert "bm128" not in {name for name, _ in kernel.launched}
    assert kernel.launched


def test_all_is_ready_and_nothing_begins(h200: Hardware) -> None:
    kernel = Compiled(objects=["bm8", "bm32", "bm128"])
    layer, builder = built(h200, kernel, slow())
    assert layer._compiling is None
    assert not kernel.asked
    assert not [n for n in builder.notes if "compile" in n]


def test_without_anything_that_can_run_the_best_is_waited_for(h200: Hardware) -> None:
    kernel = Compiled()
    kernel.allow(3)
    layer, _ = built(h200, kernel)
    assert kernel.objects
    check(layer, FEW)
    settle(layer)


def test_without_a_compiler_there_is_one_line(h200: Hardware, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ramp_moe"):
        layer, _ = built(h200, Compiled(fails="a C compiler is missing"), slow())
        settle(layer)
    check(layer, MANY)
    (record,) = caplog.records
    assert "a C compiler is missing" in record.getMessage()
    with pytest.raises(KernelError, match="a C compiler is missing"):
        built(h200, Compiled(fails="a C compiler is missing"))


def test_a_container_may_forbid_it(h200: Hardware, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "0")
    kernel = Compiled(objects=["bm128"])
    layer, builder = built(h200, kernel, slow())
    assert layer._compiling is None
    check(layer, FEW)
    check(layer, MANY)
    assert {name for name, _ in kernel.launched} == {"bm128"}
    assert any(VARIABLE in note for note in builder.notes)
    with pytest.raises(KernelError, match="kernels build"):
        built(h200, Compiled())
    assert not kernel.asked
    monkeypatch.setenv(VARIABLE, "never")
    with pytest.raises(KernelError, match=VARIABLE):
        built(h200, Compiled(), slow())


def test_a_copy_of_a_layer_goes_on(h200: Hardware) -> None:
    kernel, other = Compiled(), slow()
    layer, _ = built(h200, kernel, other)
    copied = copy.deepcopy(layer)
    kernel.allow(3)
    settle(layer)
    check(copied, MANY)
    assert copied._compiling is None
