"""What engines' models have in common: kinds of layers, what models of one process share, and what is compiled."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import msgspec
import torch
from moe_cases import weights
from ramp_moe.cost_model.model import Candidate
from ramp_moe.dispatch import profile_store
from ramp_moe.dispatch.profile_store import relative_path
from ramp_moe.measurements import calibration_file
from ramp_moe.measurements.calibration_file import records
from ramp_moe.plugin import KernelError, WeightLayout
from ramp_moe.registry.registry import get_registry
from ramp_moe.runtime import probe
from ramp_moe.runtime.calibration import ENGINE, guess
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.runtime.layer_factory import Builder, LayerPlan
from ramp_moe_adapters.frameworks import engine_calibration as engine
from ramp_moe_adapters.frameworks.engine_calibration import Engine, LoadedModel
from ramp_moe_adapters.frameworks.engine_timer import TIMERS, LoadedLayer
from ramp_moe_kernels.triton.kernel import TritonMoE

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with made-up times")


class Times:
    """A timer by which the engine's own path is fastest, and which notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def time(self, candidate: Candidate | None, topk_ids: Any) -> float:
        self.asked.append(ENGINE if candidate is None else candidate.name)
        return 1.0 if candidate is None else 2.0


class Strange(TritonMoE):
    """A third-party kernel."""

    name = "strange"


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Times:
    found = Times()
    monkeypatch.setenv("RAMP_MOE_CACHE", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(engine, "usable_kernels", lambda *_: [TritonMoE()])
    monkeypatch.setattr(engine, "warm", lambda *_: {})
    monkeypatch.setitem(TIMERS, "cpu", lambda *_: found)
    return found


@pytest.fixture
def said() -> list[str]:
    return []


def given(**changed: Any) -> LoadedLayer:
    found = LoadedLayer(
        weights(8, 128, 128, "fp16", "cpu"), 2, 1, torch.float16, ("a layer",), (), 4, lambda ids: ids,
        lambda: lambda batch, out: None,
    )  # fmt: skip
    return replace(found, **changed)


def model(say: Callable[[str], None], builder: Builder | None = None) -> LoadedModel:
    return LoadedModel(Engine("vLLM", lambda: None, say), builder or Builder("h200"))


def test_models_of_one_process_share_no_plan(times: Times, said: list[str]) -> None:
    """Such as a draft beside the model that it speculates for, or one that is loaded after another was released."""
    builder = Builder("h200")
    first, second = model(said.append, builder), model(said.append, builder)
    keeping = first.calibrated(first.layer(given()))
    assert keeping is not None
    assert keeping.keeps_any
    times.time = lambda candidate, ids: 2.0 if candidate is None else 1.0  # type: ignore[method-assign]
    other = second.calibrated(second.layer(given(most=8, kind=("a layer", 8))))
    assert other is not None
    assert not other.keeps_any
    again = first.calibrated(first.layer(given()))
    assert again is keeping


def test_kinds_of_one_model_share_no_plan(times: Times, said: list[str]) -> None:
    """Even if only what batches it may meet tells one from another."""
    loaded = model(said.append)
    found = [loaded.calibrated(loaded.layer(given(most=most, kind=("a layer", most)))) for most in (4, 16)]
    assert [f.found.tokens for f in found if f is not None] == [(1, 2, 4), (1, 2, 4, 8, 16)]


@pytest.mark.parametrize("seconds", ["20", "0"])
def test_a_kernel_that_does_not_answer_is_left_out_until_the_next_start(
    times: Times, said: list[str], monkeypatch: pytest.MonkeyPatch, seconds: str
) -> None:
    """Also if nothing is measured."""
    fault: probe.Fault | None = probe.Fault("gave no answer within 60 s in a process apart", passing=True)
    monkeypatch.setenv("RAMP_MOE_CALIBRATE_S", seconds)
    monkeypatch.setattr(engine, "usable_kernels", lambda *_: [TritonMoE(), Strange()])
    monkeypatch.setattr(probe, "third_party", lambda kernels: [k for k in kernels if k.name == "strange"])
    monkeypatch.setattr(probe, "fault", lambda *_: fault)

    def kernels() -> set[str]:
        builder = Builder("h200")
        monkeypatch.setattr(builder, "_plan", lambda shape, gpu: LayerPlan(gpu, [Strange(), TritonMoE()], None))
        loaded = model(said.append, builder)
        layer = loaded.layer(given())
        loaded.report(layer)
        return set(layer.kernels)

    assert kernels() == {"triton"}
    assert "trying strange in a process apart" in said
    if seconds == "0":
        assert not times.asked
        assert list(records()) == []
        return
    assert any("left out: strange: gave no answer within 60 s" in line for line in said)
    (record,) = records()
    assert not record.complete
    fault = None
    times.asked.clear()
    assert "strange" in kernels()
    assert {name.partition("/")[0] for name in times.asked} == {"strange"}, "the others were timed"
    (record,) = records()
    assert record.complete


def test_a_kernel_that_is_at_fault_stays_left_out(
    times: Times, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not even given the weights."""
    tried: list[str] = []
    monkeypatch.setattr(Strange, "prepare", lambda *_: pytest.fail("the kernel was given the weights"))

    def timer(given: LoadedLayer, kernels: Any, hardware: Any) -> Times:
        LayerRuntime(given.weights, given.top_k, hardware, kernels, copies=3)  # as the timer on a GPU does
        return times

    monkeypatch.setitem(TIMERS, "cpu", timer)

    def fault(name: str, *_: Any) -> probe.Fault:
        tried.append(name)
        return probe.Fault("output: NaN")

    monkeypatch.setattr(engine, "usable_kernels", lambda *_: [TritonMoE(), Strange()])
    monkeypatch.setattr(probe, "third_party", lambda kernels: [k for k in kernels if k.name == "strange"])
    monkeypatch.setattr(probe, "fault", fault)
    for _ in range(2):
        loaded = model(said.append)
        loaded.report(loaded.layer(given()))
    assert tried == ["strange"], "until its version changes, which the record's key has"
    (record,) = records()
    assert record.complete
    assert record.dropped["strange"] == "output: NaN"


def test_without_times_what_batches_of_any_size_can_need_is_compiled(
    times: Times, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the next best, if a choice raises."""
    monkeypatch.setenv("RAMP_MOE_CALIBRATE_S", "0")
    warmed: list[list[str]] = []

    def warm(layer: Any, candidates: Any, most: int, dtype: Any) -> dict[str, str]:
        warmed.append([c.name for c in candidates])
        return {warmed[0][0]: "planted"} if len(warmed) == 1 else {}

    monkeypatch.setattr(engine, "warm", warm)
    layer = model(said.append).layer(given(most=64))
    assert warmed[0]
    assert said == [f"left out: {warmed[0][0]}: planted"]
    chosen = {layer.chooser.by_size(n, layer.host_sync_us).name for n in range(1, 65)}
    assert chosen <= {name for names in warmed for name in names}


@pytest.mark.parametrize("most", [1, 2, 7, 100, 8192])
def test_sizes_that_are_compiled_for_are_those_that_are_chosen_for(most: int) -> None:
    """Every size below is rounded up to one of them, as `choice_by_batch_size` rounds."""
    found = engine.chosen_for(most)
    assert found == sorted(set(found))
    assert found[-1] <= most
    for n in range(1, most + 1):
        step = 1 << max(0, n.bit_length() - 3)
        assert min(-(-n // step) * step, most) in {*found, most}


def test_whatever_a_report_raises_is_one_line(times: Times, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise KernelError("no candidate is left")

    loaded = model(said.append)
    layer = loaded.layer(given())
    monkeypatch.setattr(engine, "plan_rows", fail)
    loaded.report(layer)
    assert said == ["cannot say what is done with each size: no candidate is left"]


def test_a_full_disk_costs_one_line(times: Times, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured is used all the same."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    loaded = model(said.append)
    layer = loaded.layer(given())
    loaded.report(layer)
    found = loaded.calibrated(layer)
    assert found is not None
    assert found.keeps_any
    (line,) = [line for line in said if "is not kept" in line]
    assert "No space left on device" in line
    assert "\n" not in line
    assert list(records()) == []


def test_a_cache_that_cannot_be_written_costs_one_line(
    times: Times, said: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAMP_MOE_CACHE", str(tmp_path / "file"))
    loaded = model(said.append)
    layer = loaded.layer(given())
    loaded.report(layer)
    assert loaded.calibrated(layer) is not None
    assert len([line for line in said if "is not kept: cannot write" in line]) == 1


@pytest.mark.parametrize(
    "written", [b"", b"{", b"[]", b'{"format": "ramp-moe/calibration", "version": 99}', b"\xff\xfe"]
)
def test_a_record_of_nonsense_is_measured_again_with_one_line(times: Times, said: list[str], written: bytes) -> None:
    first = model(said.append)
    first.report(first.layer(given()))
    (path,) = calibration_file.folder().glob("*.json")
    path.write_bytes(written)
    said.clear()
    times.asked.clear()
    model(said.append).layer(given())
    assert times.asked
    (line,) = said
    assert line.endswith("it is measured again")
    assert "\n" not in line


def test_a_gpu_that_nobody_profiled_is_served_by_what_was_measured(times: Times, said: list[str]) -> None:
    """The notes say that there is no profile."""
    loaded = model(said.append, Builder("a100-sxm"))
    found = loaded.calibrated(loaded.layer(given()))
    assert found is not None
    assert found.keeps_any
    assert any("nothing was measured in fp16 on a100-sxm" in note for note in loaded.builder.notes)


def test_a_profile_of_another_gpu_is_passed_over_with_one_line(
    times: Times, said: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As a file that was copied from the folder of another GPU."""
    registry = get_registry()
    shape, h200 = registry.shape("olmoe-1b-7b", "bf16"), registry.device("h200")
    place = relative_path("triton", shape, h200)
    shipped = next(folder / place for folder in registry.profile_dirs if (folder / place).exists())
    monkeypatch.setattr(profile_store, "user_data_dir", lambda: tmp_path / "data")
    copy = tmp_path / "data" / relative_path("triton", given().weights.shape(2), h200)
    copy.parent.mkdir(parents=True)
    copy.write_bytes(shipped.read_bytes().replace(b'"device": "h200"', b'"device": "a100"'))
    loaded = model(said.append)
    assert loaded.calibrated(loaded.layer(given())) is not None
    (line,) = [line for line in caplog.messages if line.startswith("passed over: ")]
    assert "a100, its place says triton" in line


@pytest.mark.parametrize("part", ["gpu", "driver", "vllm", "torch", "triton", "kernels"])
def test_times_of_another_gpu_driver_or_version_are_not_used(
    times: Times, said: list[str], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    model(said.append).layer(given())
    times.asked.clear()
    key_of = engine.key_of
    monkeypatch.setattr(engine, "key_of", lambda *given: key_of(*given) | {part: "another"})
    model(said.append).layer(given())
    assert times.asked
    assert len({record.key[part] for record in records()}) == 2


class Repacking(TritonMoE):
    """A kernel whose weights lie in a format of its own."""

    name = "repacking"

    def weight_layout(self, shape: Any) -> Any:
        return WeightLayout("repacking/own", 1)

    def readable_layouts(self, shape: Any) -> tuple[str, ...]:
        return ("repacking/own",)


@pytest.mark.parametrize("late", [False, True])
def test_a_kernel_that_was_timed_and_then_fails_its_trial_leaves_the_others(
    times: Times, said: list[str], monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """Its times of an earlier start, which was cut short, count no more."""
    fault: probe.Fault | None = None
    monkeypatch.setattr(engine, "usable_kernels", lambda *_: [TritonMoE(), Strange()])
    monkeypatch.setattr(probe, "third_party", lambda kernels: [k for k in kernels if k.name == "strange"])
    monkeypatch.setattr(probe, "fault", lambda *_: fault)
    works = times.time

    def fails(candidate: Candidate | None, ids: Any) -> float:
        if candidate is None or (late and candidate.kernel == "triton" and len(ids) > 1):
            raise KernelError("planted")
        return works(candidate, ids)

    times.time = fails  # type: ignore[method-assign]

    def made() -> LayerRuntime:
        builder = Builder("h200")
        monkeypatch.setattr(builder, "_plan", lambda shape, gpu: LayerPlan(gpu, [Strange(), TritonMoE()], None))
        return model(said.append, builder).layer(given())

    made()
    (record,) = records()
    assert not record.complete
    assert {t.candidate.partition("/")[0] for t in record.timings} >= {"strange"}
    fault = probe.Fault("hangs")
    times.time = works  # type: ignore[method-assign]
    assert set(made().kernels) == {"triton"}


@pytest.mark.parametrize("seconds", ["20", "0"])
def test_a_kernel_that_repacks_would_need_a_second_copy_of_an_engines_weights(
    times: Times, said: list[str], monkeypatch: pytest.MonkeyPatch, seconds: str
) -> None:
    """It is neither timed nor given the weights, and the log says so."""
    monkeypatch.setenv("RAMP_MOE_CALIBRATE_S", seconds)
    monkeypatch.setattr(Repacking, "prepare", lambda *_: pytest.fail("the kernel was given the weights"))
    monkeypatch.setattr(engine, "usable_kernels", lambda *_: [Repacking(), TritonMoE()])
    builder = Builder("h200")
    monkeypatch.setattr(builder, "_plan", lambda shape, gpu: LayerPlan(gpu, [Repacking(), TritonMoE()], None))
    layer = model(said.append, builder).layer(given())
    assert set(layer.kernels) == {"triton"}
    assert not any(name.startswith("repacking") for name in times.asked)
    assert sum("repacking is left out: it would hold a second copy of the weights" in line for line in said) == 1


def test_what_was_measured_without_a_profile_is_measured_again_with_one(
    times: Times, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A profile has candidates that nobody could think of before. Its times may change without that."""
    gpu = get_registry().device("h200")
    shape = given().weights.shape(2)
    profiled = [Candidate("triton", config) for config in TritonMoE().configs(shape, gpu)[-4:-1]]
    plans = [LayerPlan(gpu, [TritonMoE()], of) for of in (None, *[guess(shape, gpu, None, profiled)] * 2)]
    asked = []
    for plan in plans:
        builder = Builder("h200")
        monkeypatch.setattr(builder, "_plan", lambda *_, plan=plan: plan)
        times.asked.clear()
        loaded = model(said.append, builder)
        assert loaded.calibrated(loaded.layer(given())) is not None
        asked.append({*times.asked} - {ENGINE})
    assert asked[1]
    assert asked[1] <= {c.name for c in profiled}
    assert not asked[2]


def test_a_report_does_not_undo_what_another_server_measured_since(times: Times, said: list[str]) -> None:
    """A server may report minutes after it has measured, once its graphs are captured."""
    loaded = model(said.append)
    layer = loaded.layer(given())
    (record,) = records()
    first = record.timings[0]
    more = calibration_file.Timing(first.tokens, first.routing, "triton/another", 1.0)
    later = msgspec.structs.replace(record, timings=[*record.timings, more])
    calibration_file.save(later)
    loaded.report(layer)
    (kept,) = records()
    assert kept.timings == later.timings


def test_an_engine_without_a_path_on_the_loaded_weights_has_them_in_the_fastest_format(
    times: Times, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = [TritonMoE(), Repacking()]
    monkeypatch.setattr(engine, "usable_kernels", lambda *_: kernels)
    times.time = lambda candidate, ids: 1.0 if candidate.kernel == "repacking" else 2.0  # type: ignore[method-assign]
    packed = given(own=None, like=frozenset({"repacking"}))
    assert set(model(said.append).layer(packed).kernels) == {"repacking"}
    assert not any("left out" in line for line in said)
    unlike = replace(packed, like=frozenset({"humming"}), kind=("another",))
    with pytest.raises(KernelError, match="no kernel like them was compared"):
        model(said.append).layer(unlike)
