"""The bench: what it draws, what its check lets pass, and on a GPU what its times are."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from moe_cases import batch, error, expected, weights
from ramp_moe import Hardware, HardwareError, KernelConfig, KernelError, MoEShape, RoutingError, UnknownNameError
from ramp_moe.profiler.bench import Bench, random_weights
from ramp_moe.runtime.reference import _errors, reference
from ramp_moe.spec.launchable import ACTIVATIONS, Batch, LaunchableKernel, Workspace
from ramp_moe.spec.routing import generate
from ramp_moe_kernels.triton.kernel import TritonMoE

GPU = torch.cuda.is_available()
KERNEL = TritonMoE()
TINY = MoEShape(4, 2, 256, 128, "bf16" if GPU else "fp16")  # the interpreter truncates where a GPU rounds to bf16
TOKENS = 6
SMALL = {dtype: MoEShape(32, 4, 1024, 512, dtype) for dtype in ("fp8", "bf16")}


def default(shape: MoEShape, tokens: int, hardware: Hardware) -> str:
    return KERNEL.default_config(shape, hardware, tokens).name


def ids(shape: MoEShape, tokens: int, kind: str = "uniform") -> Any:
    return generate(kind, tokens, shape.num_experts, shape.top_k)


def bench(shape: MoEShape, hardware: Hardware, tokens: int, *kernels: LaunchableKernel) -> Bench:
    made = Bench(shape, hardware, kernels or [KERNEL])
    made.open(ids(shape, tokens))
    return made


class Spoilt(TritonMoE):
    """Computes the layer right, then leaves in `out` what `spoil(out, right)` makes of it."""

    def __init__(self, spoil: Callable[[torch.Tensor, torch.Tensor], object]) -> None:
        self.spoil = spoil

    def launch(
        self, config: KernelConfig, prepared: Any, batch: Batch, out: torch.Tensor, workspace: Workspace
    ) -> None:
        right = torch.empty_like(out)
        super().launch(config, prepared, batch, right, workspace)
        self.spoil(out, right)


class OneStep(TritonMoE):
    """Cannot be stopped after its stages, nor captured."""

    graph_safe = False
    launched = 0

    def run(  # type: ignore[override]
        self, config: KernelConfig, prepared: Any, batch: Batch, out: torch.Tensor, workspace: Workspace
    ) -> None:
        self.launched += 1
        for _ in super().run(config, prepared, batch, out, workspace):
            pass


def drop_a_token(out: torch.Tensor, right: torch.Tensor) -> None:
    out.copy_(right)[len(out) // 2] = 0


def leave_64_columns(out: torch.Tensor, right: torch.Tensor) -> None:
    out[:, :64], out[:, 128:] = right[:, :64], right[:, 128:]


def zero_64_columns(out: torch.Tensor, right: torch.Tensor) -> None:
    out.copy_(right)[:, -64:] = 0


SPOILT: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], object], str]] = {
    "zeros": (lambda out, right: out.zero_(), r"relative error 1 of output"),
    "nothing": (lambda out, right: None, r"relative error nan of output"),
    "dropped token": (drop_a_token, r"of (output|token)"),
    "unwritten block": (leave_64_columns, r"relative error nan of output"),
    "zero block": (zero_64_columns, r"of (output|columns)"),
    "off by a tenth": (lambda out, right: out.copy_(right).mul_(1.1), r"relative error 0\.1\d* of output"),
}


def check_spoilt(case: str, shape: MoEShape, hardware: Hardware, tokens: int) -> None:
    spoil, message = SPOILT[case]
    config = default(shape, tokens, hardware)
    with pytest.raises(KernelError, match=f"^triton/.*{message}") as refused:
        bench(shape, hardware, tokens, Spoilt(spoil)).check("triton", config)
    assert config in str(refused.value)


# --- everywhere ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8"])
def test_weights_are_seeded_and_of_the_size_of_a_layers(dtype: str) -> None:
    shape = MoEShape(3, 2, 512, 256, dtype)
    drawn, again, other = (random_weights(shape, "cpu", seed) for seed in (0, 0, 1))
    assert drawn.shape(2) == shape
    for name, columns in (("gate_up", 512), ("down", 256)):
        w = getattr(drawn, name)
        assert torch.equal(w.view(torch.uint8), getattr(again, name).view(torch.uint8))
        assert not torch.equal(w.view(torch.uint8), getattr(other, name).view(torch.uint8))
        plain = w.float()
        if dtype == "fp8":
            scale = getattr(drawn, f"{name}_scale")
            assert scale.unique().numel() == scale.numel()
            plain = plain * scale.repeat_interleave(128, 1).repeat_interleave(128, 2)
        assert float(plain.std()) == pytest.approx(columns**-0.5, rel=0.1)


@pytest.mark.parametrize("dtype", ["fp16", "fp8"])
def test_the_reference_is_that_of_the_kernels(dtype: str) -> None:
    layer = random_weights(MoEShape(4, 2, 256, 128, dtype), "cpu", 0)
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(2)).half()
    topk_ids = torch.tensor([[0, 1], [3, 3], [-1, 4], [2, -7], [1, 2**30]], dtype=torch.int32)
    given = Batch(x, topk_ids, torch.rand(5, 2))
    got = reference(layer, given)
    assert error(got, expected(layer, given, quantise=False)) < 1e-5
    assert not got[2].any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_reference_knows_every_activation(activation: str) -> None:
    layer = weights(4, 64, 32, "fp16", "cpu", activation, bias=True)
    given = batch(7, 2, 4, 64, "padded", "cpu", torch.float16)
    assert error(reference(layer, given), expected(layer, given, quantise=False)) < 1e-5


def test_batches_are_drawn_alike(h200: Hardware) -> None:
    made = bench(TINY, h200, TOKENS)
    first = made._batch()
    made.open(ids(TINY, TOKENS, "one-hot"))
    second = made._batch()
    assert torch.equal(first.batch.hidden_states, second.batch.hidden_states)
    assert second.batch.topk_ids.unique().numel() == 1
    torch.testing.assert_close(second.batch.topk_weights.sum(1).cpu(), torch.ones(TOKENS))
    assert first.batch.hidden_states.dtype == (torch.bfloat16 if GPU else torch.float16)
    correlation = first.batch.hidden_states[0].float() @ made._weights.gate_up[0, 0].float()
    assert abs(float(correlation)) < 5, "the weights' first numbers are not the batch's"


def test_a_kernel_is_given_a_layout_that_it_reads(h200: Hardware) -> None:
    class Interleaved(TritonMoE):
        def readable_layouts(self, shape: MoEShape) -> tuple[str, ...]:
            return ("gate-up-interleaved-8",)

    made = bench(TINY, h200, TOKENS, Interleaved())
    assert made._kernels["triton"][1].layout == "gate-up-interleaved-8"
    assert made._weights.layout == "gate-first"
    made.check("triton", default(TINY, TOKENS, h200))


def test_a_right_kernel_passes(h200: Hardware) -> None:
    made = bench(TINY, h200, TOKENS)
    config = default(TINY, TOKENS, h200)
    made.warm("triton", config)
    made.check("triton", config)
    padded = ids(TINY, TOKENS)
    padded[2], padded[3, 0], padded[4, 1] = -1, TINY.num_experts, 2**31 - 1
    for topk_ids in (padded, np.full_like(padded, -1)):  # a token of zeros, then nothing but such
        made.open(topk_ids)
        made.check("triton", config)
    assert made.healthy()


@pytest.mark.parametrize("case", SPOILT)
def test_wrong_outputs_are_refused(case: str, h200: Hardware) -> None:
    check_spoilt(case, TINY, h200, TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "part"), [("token 5", (5, slice(None))), ("columns from 128 on", (slice(None), slice(128, 192)))]
)
def test_an_error_of_one_token_or_block_does_not_hide_among_the_others(where: str, part: Any, h200: Hardware) -> None:
    shape = MoEShape(4, 2, 1024, 64, TINY.dtype)
    config = default(shape, 16, h200)

    def spoil(factor: float) -> Bench:
        return bench(shape, h200, 16, Spoilt(lambda out, right: out.copy_(right)[part].mul_(factor)))

    spoil(1.01).check("triton", config)
    with pytest.raises(KernelError, match=rf"relative error 0\.02\d+ of {where}; at most 0\.02"):
        spoil(1.025).check("triton", config)


def test_errors_are_located() -> None:
    right = torch.randn(50, 160, generator=torch.Generator().manual_seed(0))
    right[7] *= 1e-6
    right[9] = 0
    exact = {"output": 0.0, "token 0": 0.0, "columns from 0 on": 0.0}
    assert _errors(right.clone(), right) == exact
    assert _errors(torch.zeros(2, 160), torch.zeros(2, 160)) == exact
    for spoilt, where in (((11, slice(None)), "token 11"), ((slice(None), slice(128, 160)), "columns from 128 on")):
        out = right.clone()
        out[spoilt] = 0
        errors = _errors(out, right)
        assert errors[where] == pytest.approx(1)
        assert errors["output"] < 0.5
    out = right.clone()
    out[9, 3] = 1e-3  # nothing belongs there
    assert _errors(out, right)["token 9"] > 0.05
    out = right.clone()
    out[7] = 0  # next to nothing beside the others
    assert max(_errors(out, right).values()) < 0.01
    out[20, 70] = float("nan")
    found = _errors(out, right)
    assert list(found) == ["output", "token 20", "columns from 64 on"]
    assert all(np.isnan(e) for e in found.values())


@pytest.mark.parametrize(("patience_us", "launches"), [(500.0, 1), (900.0, 5)])
def test_an_eager_kernel_tries_patience_too(
    patience_us: float, launches: int, h200: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With times made up, as there may be no GPU."""
    made = bench(TINY, h200, TOKENS, OneStep())
    config = KERNEL.default_config(TINY, h200, TOKENS).name
    monkeypatch.setattr(made, "_finished", contextlib.nullcontext)
    monkeypatch.setattr(made, "_stream", object())
    monkeypatch.setattr(made, "_run", lambda kernel, config: True)
    monkeypatch.setattr(made, "_eager", lambda timed: ({"path": 700.0}, 100.0))
    assert made.time("triton", config, 5, patience_us) == [700.0] * launches


def test_a_kernel_without_steps_launches_once_and_names_none(h200: Hardware) -> None:
    kernel = OneStep()
    made = bench(TINY, h200, TOKENS, kernel)
    config = KERNEL.default_config(TINY, h200, TOKENS)
    given, out = made._batch().batch, made._batch().out.fill_(float("nan"))
    steps = kernel.steps(config, made._weights, given, out, Workspace())
    assert kernel.launched == 0, "it begins when it is asked"
    assert list(steps) == []
    assert kernel.launched == 1
    assert not out.isnan().any()


def test_what_is_refused(h200: Hardware) -> None:
    made, config = Bench(TINY, h200, [KERNEL]), default(TINY, TOKENS, h200)
    with pytest.raises(RoutingError, match="no batch is open"):
        made.check("triton", config)
    for wrong in (np.zeros((0, 2), np.int64), np.zeros((3, 1), np.int64), np.zeros(6, np.int64)):
        with pytest.raises(RoutingError, match=r"topk_ids must be \[T, 2\] with T > 0"):
            made.open(wrong)
    made.open(ids(TINY, TOKENS))
    with pytest.raises(UnknownNameError, match="unknown kernel 'tritium'"):
        made.warm("tritium", config)
    with pytest.raises(UnknownNameError, match="unknown configuration of triton 'bm16'"):
        made.warm("triton", "bm16")

    class Absent(TritonMoE):
        def unavailable(self) -> str:
            return "no package"

    with pytest.raises(KernelError, match="kernel triton cannot run here: no package"):
        Bench(TINY, h200, [Absent()])
    with pytest.raises(KernelError, match="does not support"):
        Bench(MoEShape(4, 2, 40, 40, "bf16"), h200, [KERNEL])


@pytest.mark.skipif(GPU, reason="there is a CUDA device")
def test_without_a_gpu_nothing_is_timed(h200: Hardware) -> None:
    made, config = bench(TINY, h200, TOKENS), default(TINY, TOKENS, h200)
    for method in (made.time, made.time_stages):
        with pytest.raises(HardwareError, match="times need a CUDA device"):
            method("triton", config, 3)


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=SMALL)
def shape(request: pytest.FixtureRequest) -> MoEShape:
    return SMALL[request.param]


@pytest.fixture
def opened(shape: MoEShape, h200: Hardware) -> tuple[Bench, str]:
    return bench(shape, h200, 48), default(shape, 48, h200)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["uniform", "zipf1.2", "one-hot"])
@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_gpu_every_path_passes(shape: MoEShape, tokens: int, kind: str, h200: Hardware) -> None:
    made = Bench(shape, h200, [KERNEL])
    made.open(ids(shape, tokens, kind))
    for config in [KERNEL.default_config(shape, h200, 48), *KERNEL.configs(shape, h200)[::40]]:
        made.check("triton", config.name)


@pytest.mark.gpu
@pytest.mark.parametrize("case", SPOILT)
def test_gpu_wrong_outputs_are_refused(case: str, shape: MoEShape, h200: Hardware) -> None:
    check_spoilt(case, shape, h200, 48)


@pytest.mark.gpu
def test_gpu_times_repeat(opened: tuple[Bench, str]) -> None:
    made, config = opened
    first, second = (made.time("triton", config, 30) for _ in range(2))
    for times in (first, second):
        assert len(times) == 30
        assert min(times) > 0
    assert statistics.median(first) == pytest.approx(statistics.median(second), rel=0.1)
    assert len(made._batch().graphs) == 1


@pytest.mark.gpu
def test_gpu_stages_make_up_the_path(shape: MoEShape, opened: tuple[Bench, str], h200: Hardware) -> None:
    made, config = opened
    made.open(ids(shape, 2048))  # so much that the gaps between the stages are little
    stages = made.time_stages("triton", config, 30)
    described = KERNEL.default_config(shape, h200, 48)
    assert list(stages) == [s.key for s in described.stages]
    assert all(len(times) >= 2 and min(times) > 0 for times in stages.values())
    whole = statistics.median(made.time("triton", config, 30))
    assert sum(statistics.median(t) for t in stages.values()) == pytest.approx(whole, rel=0.3)


@pytest.mark.gpu
def test_gpu_what_is_timed_computes_the_layer(opened: tuple[Bench, str]) -> None:
    made, config = opened
    out = made._batch().out
    for measure in (made.time, made.time_stages):
        measure("triton", config, 2)
        out.fill_(float("nan"))
        torch.cuda.synchronize()
        measure("triton", config, 2)  # a replay alone
        assert error(out, reference(made._weights, made._batch().batch)) < 0.06


@pytest.mark.gpu
def test_gpu_an_eager_kernel_is_timed_too(h200: Hardware) -> None:
    kernel = OneStep()
    made, config = bench(SMALL["bf16"], h200, 48, kernel), default(SMALL["bf16"], 48, h200)
    eager = made.time("triton", config, 20)
    assert kernel.launched == 22  # once to compile, once to see how long it takes
    assert len(eager) == 20
    assert min(eager) > 0
    assert made.time_stages("triton", config, 20) == {}
    assert made._batch().graphs == {}


@pytest.mark.gpu
@pytest.mark.parametrize("host_us", [100.0, 600.0])
def test_gpu_only_what_the_host_did_not_hold_up_is_far_behind(
    opened: tuple[Bench, str], host_us: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, config = opened
    monkeypatch.setattr(made, "_eager", lambda timed: ({"path": 1000.0}, host_us))
    times = made.time("triton", config, 5, 500.0)
    if host_us < 500:
        assert times == [1000.0]
    else:
        assert len(times) == 5
        assert max(times) < 500


@pytest.mark.gpu
def test_gpu_another_batch_is_timed_anew(opened: tuple[Bench, str], shape: MoEShape) -> None:
    """Buffers grow with the batch; graphs of the old one are gone."""
    made, config = opened
    small = statistics.median(made.time("triton", config, 10))
    made.open(ids(shape, 4096))
    assert made._batch().graphs == {}
    assert statistics.median(made.time("triton", config, 10)) > 1.5 * small
    made.check("triton", config)
