"""A third-party kernel that goes wrong is tried in a process apart when a server loads a model, and dropped by name."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch
from moe_cases import batch, error, expected, weights
from planted_kernel import Planted, install
from ramp_moe.measurements.calibration_file import records
from ramp_moe.registry.registry import get_registry
from ramp_moe.runtime import probe
from ramp_moe.runtime.layer_factory import Builder
from ramp_moe_adapters.frameworks import engine_calibration as engine
from ramp_moe_adapters.frameworks.engine_calibration import Engine, LoadedModel
from ramp_moe_adapters.frameworks.engine_timer import TIMERS, LoadedLayer
from ramp_moe_kernels.triton.kernel import TritonMoE

GPU = torch.cuda.is_available()
DEVICE, HALF = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float16)
DTYPE = {torch.bfloat16: "bf16", torch.float16: "fp16"}[HALF]
TOKENS = 8


class Times:
    """A timer by which the planted kernel is the fastest."""

    def time(self, candidate: object, topk_ids: object) -> float:
        return 1.0 if getattr(candidate, "kernel", "") == "planted" else 2.0


def loaded(monkeypatch: pytest.MonkeyPatch, folder: Path, how: str) -> tuple[set[str], list[str]]:
    """Kernels of a layer of a server in which the plugin is installed, and what the log has. The layer computes."""
    install(folder, monkeypatch, how)
    said, of = list[str](), weights(8, 128, 128, DTYPE, DEVICE)
    monkeypatch.setenv("RAMP_MOE_CACHE", str(folder / "cache"))
    monkeypatch.setenv("RAMP_MOE_CALIBRATE_S", "20" if GPU else "1e6")
    monkeypatch.setattr(get_registry(), "third_party", {"planted"})
    monkeypatch.setattr(engine, "usable_kernels", lambda *_: [TritonMoE(), Planted()])
    if not GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setitem(TIMERS, "cpu", lambda *_: Times())
        monkeypatch.setattr(engine, "warm", lambda *_: {})
    given = LoadedLayer(
        of, 2, 1, HALF, ("a layer",), (), TOKENS, lambda ids: ids, lambda: lambda batch, out: None
    )  # fmt: skip
    model = LoadedModel(Engine("vLLM", lambda: None, said.append), Builder("auto" if GPU else "h200"))
    layer = model.layer(given)
    model.report(layer)
    x = batch(TOKENS, 2, 8, 128, "uniform", DEVICE, HALF)
    out = layer(x.hidden_states, x.topk_ids, x.topk_weights)
    assert error(out, expected(of, x, quantise=False)) < 2e-2
    return set(layer.kernels), said


@pytest.mark.slow
@pytest.mark.skipif(GPU, reason="with made-up times")
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("", None),
        ("raises", "RuntimeError: planted"),
        ("NaN", "relative error nan of output"),
        ("spins", "gave no answer within 3 s in a process apart"),
    ],
)
def test_it_is_dropped_with_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str, reason: str | None
) -> None:
    real = probe.fault
    seconds = 3.0 if how == "spins" else 300.0  # a machine under load is slow
    monkeypatch.setattr(probe, "SECONDS_AGAIN", 300.0)
    monkeypatch.setattr(probe, "fault", lambda *given: real(*given, seconds))
    kernels, said = loaded(monkeypatch, tmp_path, how)
    assert ("planted" in kernels) is (reason is None)
    if reason is not None:
        (line,) = [line for line in said if "left out: planted: " in line]
        assert reason in line
        (record,) = records()
        assert reason in record.dropped["planted"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("raises", "RuntimeError: planted"),
        ("NaN", "relative error nan of output"),
        ("spins", "gave no answer within 25 s in a process apart"),
    ],
)
def test_it_is_dropped_with_its_name_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str, reason: str
) -> None:
    """It spins for 30 s when it is warmed up, in each process."""
    kernels, said = loaded(monkeypatch, tmp_path, how)
    assert "planted" not in kernels
    assert any("left out: planted: " in line and reason in line for line in said), said
