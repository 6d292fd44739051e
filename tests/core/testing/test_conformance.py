"""The checks of a kernel: a right one passes all, one that breaks a part of the contract fails that part's alone."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from dataclasses import replace

import plain_kernel as cases
import pytest
import torch
from plain_kernel import Plain, conformance, gridded
from ramp_moe import Kernel, KernelError, MoEShape, get_registry
from ramp_moe.testing import KernelConformance
from ramp_moe.testing import launch as launching
from ramp_moe.testing.description import CHECKS, Conformance, _generic, run_all, run_apart, supported_shape
from ramp_moe.testing.outcome import Outcome
from simulated_gpu import Described

GPU = torch.cuda.is_available()
SKIPPED = ("layouts",) if GPU else ("layouts", "graph", "threads")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny operations by the thousand: threads would wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def failed(kernel: Kernel) -> dict[str, str]:
    return {o.check: o.detail for o in run_all(conformance(kernel)) if o.result == "failed"}


def test_a_right_kernel_passes() -> None:
    outcomes = {o.check: o for o in run_all(conformance(Plain()))}
    assert list(outcomes) == list(CHECKS)
    for check, outcome in outcomes.items():
        assert outcome.result == ("skipped" if check in SKIPPED else "passed"), outcome
    assert re.match(r"\d+ launches of 2 configurations, E8-k2-h128-i64-fp16 on ", outcomes["outputs"].detail)


BROKEN: dict[str, tuple[Kernel, str, str]] = {
    "an impossible name": (cases.Misnamed(), "name", "name is 'no such, name'"),
    "an unknown format": (cases.Misspelt(), "name", r"formats is \('bf16', 'mxpf4'\); name formats"),
    "a generic reason": (cases.Gruff(), "reasons", "'this dtype is not supported', which does not say why"),
    "a word for a reason": (cases.Curt(), "reasons", "'fp8', which does not say why"),
    "two names alike": (cases.Twins(), "configs", "names two configurations alike"),
    "one key, two grids": (cases.OneKeyTwoGrids(), "configs", "'bm64' .* stage 'experts' is another launch"),
    "unhashable params": (cases.Unhashable(), "configs", "'bm16' .* cannot be hashed"),
    "nothing for odd sizes": (cases.Choosy(), "configs", "has no configuration for E7-k1-h130-i70-bf16"),
    "a layout without down": (cases.Weightless(), "layout", "the weights alone have"),
    "half of the rows": (cases.HalfOfTheRows(), "geometry", "bm16 .* cover 32768 weights .* gate and up rows"),
    "half of the bytes": (cases.UpOnly(), "geometry", r"read \d+ bytes"),
    "a grid too short": (gridded(cases.TooShort), "geometry", r"CTAs have work, launched\("),
    "an order of experts": (gridded(cases.FirstExpertCounts), "geometry", "depends on the order"),
    "a grid that shrinks": (gridded(cases.Shrinking), "geometry", r"logical\(\) falls"),
    "no default for many": (cases.SmallBatchesOnly(), "default-config", r"1024\) raises KeyError: 1024"),
    "unwritten columns": (cases.LeavesColumns(), "outputs", "bm16 on 9 tokens, even routing: relative error nan"),
    "empty experts": (cases.EmptyExpertsCount(), "outputs", "bm16 on 9 tokens, empty experts: relative error"),
    "padding": (cases.ForgetsPadding(), "outputs", r"padding \(-1 and E\): relative error"),
    "a layout that is not read": (cases.SwapsGateAndUp(), "layouts", "bm16 on weights in up-first: relative error"),
    "a write out of bounds": (cases.OutOfBounds(), "bounds", "bm16 on 9 tokens, even routing writes beyond"),
    "spent inputs": (cases.ConsumesInputs(), "inputs", "changes topk_weights"),
    "spent weights": (cases.ConsumesWeights(), "inputs", "changes the weights' down"),
    "another result": (cases.Wavers(), "repeatable", "two runs differ by 0.012"),
    "no zeroing": (cases.TrustsItsBuffers(), "workspace", "bm16 on 9 tokens, even routing, buffers full of 0xff"),
    "steps backwards": (cases.StepsBackwards(), "steps", r"yields \['plain/cast'"),
    "a yield too many": (cases.StopsTooOften(), "steps", "plain.run yields 4 times, bm16 has 3 stages"),
    "a yield too few": (cases.StopsTooRarely(), "steps", "plain.run yields 2 times, bm16 has 3 stages"),
    "steps without launches": (cases.StopsEarly(), "steps", r"after steps\(\), relative error nan"),
    "a wait": (cases.Waits(), "asynchronous", "reads from the device .*aten._local_scalar_dense"),
}


@pytest.mark.skipif(GPU, reason="some faults show in several checks on a GPU")
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_part_fails_its_check_alone(case: str) -> None:
    kernel, check, detail = BROKEN[case]
    found = failed(kernel)
    assert list(found) == [check]
    assert re.search(detail, found[check])
    assert "\n" not in found[check]
    assert "; " in found[check] or check == "name", "it names a remedy"
    for module in re.findall(r"\bramp_moe[.\w]+", found[check]):
        importlib.import_module(module)


@pytest.mark.skipif(GPU, reason="a GPU has graphs of its own")
def test_a_graph_must_follow_new_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over an emulation: what torch did is done again, and what the host decided stays."""
    monkeypatch.setattr(launching, "capture_on", lambda device: cases.capture)
    assert conformance(Plain()).run("graph") == Outcome("graph", "passed")
    found = failed(cases.FixedRouting())
    assert list(found) == ["graph"]
    assert re.search(r"bm16 replayed on .*: relative error .* set graph_safe to False$", found["graph"])

    class Honest(cases.FixedRouting):
        graph_safe = False

    assert conformance(Honest()).run("graph").result == "skipped"

    def refuse(launch: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(launching, "capture_on", lambda device: refuse)
    outcome = conformance(Plain()).run("graph")
    assert re.match(r"configuration bm16 cannot be captured on \d+ tokens: RuntimeError: operation not", outcome.detail)


def test_the_layout_that_is_wanted_is_read() -> None:
    outcome = conformance(cases.ReadsAnother()).run("layout")
    assert outcome.result == "failed"
    assert "is gate-first, readable_layouts() are ('up-first',)" in outcome.detail


def test_what_raises_fails() -> None:
    found = failed(cases.Raises())
    assert list(found) == ["outputs"]
    assert "1 token, even routing: IndexError: no second token" in found["outputs"]

    assert "plain.run returned Tensor; it writes to out" in failed(cases.ReturnsOut())["outputs"]

    class Broken(Plain):
        def unsupported(self, shape: MoEShape, hardware: object) -> str | None:
            raise ZeroDivisionError("by nothing")

    assert conformance(Broken()).run("reasons") == Outcome("reasons", "failed", "ZeroDivisionError: by nothing")


def test_what_cannot_be_launched_is_skipped() -> None:
    h200 = get_registry().device("h200")
    outcome = Conformance(Described(), cases.SHAPE, h200).run("outputs")
    assert (outcome.result, "only described" in outcome.detail) == ("skipped", True)

    class Absent(Plain):
        def unavailable(self) -> str:
            return "the package plain is missing: pip install plain"

    class Refuses(Plain):
        def prepare(self, weights: object) -> None:  # type: ignore[override]
            raise KernelError("the weights are on the CPU")

    class Large(Plain):
        def unsupported(self, shape: MoEShape, hardware: object) -> str | None:
            return "needs 64 experts" if shape.num_experts < 64 else None

    def without_launch_shape(kernel: Kernel) -> Conformance:
        return Conformance(kernel, supported_shape(kernel), h200)

    assert "cannot run here: the package plain is missing" in conformance(Absent()).run("bounds").detail
    assert "give launch_shape" in without_launch_shape(Large()).run("outputs").detail
    refused = conformance(Refuses()).run("outputs")
    assert refused.result == ("failed" if GPU else "skipped")
    assert "the weights are on the CPU" in refused.detail
    shape = MoEShape(64, 4, 32, 16, "fp16")
    given = Conformance(Large(), supported_shape(Large()), h200, launch_shape=shape, configs=1)
    assert shape.slug in given.run("outputs").detail


def test_defaults_beside_the_configurations_are_noted() -> None:
    class Beside(Plain):
        def default_config(self, shape: MoEShape, hardware: object, num_tokens: int):  # type: ignore[no-untyped-def]
            return replace(self.config(shape, 16), name="special") if num_tokens == 64 else self.config(shape, 16)

    checked = conformance(Beside())
    assert "cannot be profiled: special" in checked.run("default-config").detail
    assert "3 configurations" in checked.run("outputs").detail


@pytest.mark.parametrize("reason", ["", " ", "no", "unsupported", "this shape is not supported here", "bad size", 3])
def test_reasons_that_say_nothing(reason: object) -> None:
    assert _generic(reason)


@pytest.mark.parametrize(
    "reason", ["needs 64 experts", "hidden_size 40 is not a multiple of 16", "h100 has no fp8 units"]
)
def test_reasons_that_say_something(reason: str) -> None:
    assert _generic(reason) is None


def test_no_supported_dtype() -> None:
    class Never(Plain):
        def unsupported(self, shape: MoEShape, hardware: object) -> str | None:
            return "waits for a better world"

    with pytest.raises(KernelError, match=r"plain does not support olmoe-1b-7b on h200 \(fp8: waits for a better"):
        supported_shape(Never())


@pytest.mark.slow
def test_a_crash_fails_its_check_alone() -> None:
    outcomes = {o.check: o for o in run_apart(cases.crashing, 300)}
    assert [c for c, o in outcomes.items() if o.result == "failed"] == ["steps"]
    assert "killed by signal 11" in outcomes["steps"].detail
    assert outcomes["asynchronous"].result == "passed", "in another process"


@pytest.mark.slow
def test_checks_that_cannot_even_begin_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ramp_moe.testing.description.CHECKS", {"name": ""})
    (outcome,) = run_apart(cases.cannot_be_made, 60)
    assert (outcome.result, outcome.detail.partition(";")[0]) == ("failed", "MemoryError: the GPU is full")


@pytest.mark.gpu
def test_gpu_a_launch_that_synchronises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ramp_moe.testing.description.CHECKS", dict.fromkeys(("outputs", "asynchronous", "graph"), ""))
    outcomes = {o.check: o for o in run_apart(cases.synchronising, 300)}
    assert [o.result for o in outcomes.values()] == ["passed", "failed", "failed"]
    assert "cannot be captured" in outcomes["graph"].detail


class TestPlain(KernelConformance):
    kernel = Plain()
    shapes = (MoEShape(8, 2, 256, 128, "fp16"), MoEShape(3, 2, 130, 70, "bf16"))
    launch_shape = MoEShape(4, 2, 130, 70, "bf16")


def test_the_module_has_a_test_for_every_check() -> None:
    tests = {name for name in vars(KernelConformance) if name.startswith("test_")}
    assert tests == {f"test_{check.replace('-', '_')}" for check in CHECKS}


def test_a_failure_is_the_check_s_line() -> None:
    class Mine(KernelConformance):
        kernel = cases.Curt()

    with pytest.raises(pytest.fail.Exception, match=r"^reasons: unsupported\(.*, .*\) returns 'fp8'"):
        Mine().test_reasons()
    Mine().test_name()
    if not GPU:
        with pytest.raises(pytest.skip.Exception, match="streams need a GPU"):
            Mine().test_threads()
