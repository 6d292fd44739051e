"""Measuring vLLM's layers when they are loaded: which sizes its own experts keep, what is said, and what is shared."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

pytest.importorskip("vllm")

import torch
import vllm_cases  # noqa: F401  (before anything of vllm's)
from moe_cases import batch, error, expected, weights
from ramp_moe.measurements.calibration_file import records
from ramp_moe.runtime import calibration_seconds, probe
from ramp_moe.runtime.calibration import ENGINE, ROUTINGS
from ramp_moe.spec.launchable import Batch, MoEWeights
from ramp_moe.spec.routing import IntArray
from ramp_moe_adapters.frameworks import engine_calibration as engine
from ramp_moe_adapters.frameworks import engine_timer
from ramp_moe_adapters.frameworks import vllm as plugin
from ramp_moe_adapters.frameworks.engine_timer import TIMERS
from ramp_moe_kernels.triton.kernel import TritonMoE
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm_cases import DEVICE, experts_of, run, said_by_plugin, serve

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="with made-up times; others are measured there")

EXPERTS, TOP_K, HIDDEN, INTER = 8, 2, 128, 128
HALF = torch.float16
SIZES = {"moe_options": {"max_num_tokens": 64}}


@pytest.fixture(scope="module", autouse=True)
def loaded() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(plugin.SWITCH, "1")
        plugin.register()
        yield
    op_registry_oot.pop("RoutedExperts")


class Times:
    """A timer: `us` says what a name takes at a number of tokens."""

    def __init__(self, us: Callable[[str, int], float]) -> None:
        self.us, self.asked = us, list[tuple[str, int]]()

    def time(self, candidate: Any, topk_ids: IntArray) -> float:
        name = ENGINE if candidate is None else candidate.name
        self.asked.append((name, len(topk_ids)))
        return self.us(name, len(topk_ids))


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Callable[[str, int], float]], Times]:
    """Has layers measured by made-up times, as in a process that has just started."""
    monkeypatch.setenv("RAMP_MOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(engine, "usable_kernels", lambda shape, hardware: [TritonMoE()])
    monkeypatch.setattr(engine, "warm", lambda layer, candidates, *_: {})

    def start(us: Callable[[str, int], float]) -> Times:
        made = Times(us)
        start.model = serve(monkeypatch)  # type: ignore[attr-defined]
        monkeypatch.setitem(TIMERS, DEVICE, lambda *_: made)
        return made

    return start


@pytest.fixture
def said() -> Iterator[list[str]]:
    with said_by_plugin() as found:
        yield found


def layer(dtype: str = "fp16") -> MoEWeights:
    return weights(EXPERTS, HIDDEN, INTER, dtype, DEVICE)


def given(tokens: int) -> Batch:
    found = batch(tokens, TOP_K, EXPERTS, HIDDEN, "skewed", DEVICE, HALF)
    return Batch(found.hidden_states, found.topk_ids.clamp(0, EXPERTS - 1), found.topk_weights)


def experts(routed: Any) -> Any:
    return routed.quant_method.moe_kernel.fused_experts


def large_are_vllms(name: str, tokens: int) -> float:
    """Its own experts are faster from 16 tokens on."""
    return 10.0 if name != ENGINE else 20.0 if tokens < 16 else 5.0


def test_vllm_keeps_the_sizes_at_which_nothing_is_faster(
    times: Any, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    from ramp_moe_adapters.frameworks.vllm.stock import Stock

    times(large_are_vllms)
    of = layer()
    routed = experts_of(of, TOP_K, dtype=HALF, **SIZES)
    theirs: list[int] = []

    def own(self: Stock, output: Any, x: Any, topk_weights: Any, topk_ids: Any, *rest: Any) -> None:
        theirs.append(len(x))
        assert rest[3].numel() >= len(x) * TOP_K * HIDDEN, "vLLM's workspaces are given"
        output.copy_(expected(of, Batch(x, topk_ids.int(), topk_weights.float()), quantise=False))

    monkeypatch.setattr(Stock, "run", own)
    for tokens in (1, 8, 16, 64):
        b = given(tokens)
        assert error(run(routed, b), expected(of, b, quantise=False)) < 2e-2
    assert theirs == [16, 64]
    (table,) = [line for line in said if "what computes batches" in line]
    rows = table.splitlines()[1:]
    assert rows[0].split() == ["tokens", "kernel", "mode", "bodies", "predicted", "measured", "vLLM", "histogram"]
    assert [row.split()[0] for row in rows[1:]] == ["1-8", "16-64"]
    assert rows[1].split()[1].startswith("triton/")
    assert rows[2].split()[1:4] == ["vLLM's", "own", "eager"]
    assert any("vLLM's own path keeps 16, 32, 64 tokens: nothing is 2% faster" in line for line in said)


def test_memory_is_vllms_or_none(times: Any) -> None:
    """Workspaces of vLLM's own path are asked for if it keeps a size, by its own experts' rule; else none."""
    shapes = (64, 2 * INTER, HIDDEN, TOP_K, EXPERTS, EXPERTS, None)
    times(lambda name, n: 5.0 if name == ENGINE else 10.0)
    routed = experts_of(layer(), TOP_K, dtype=HALF, **SIZES)
    own = TritonExperts.workspace_shapes(experts(routed).stock._experts, *shapes, routed.activation)
    assert experts(routed).workspace_shapes(*shapes, routed.activation) == own
    times(lambda name, n: 20.0 if name == ENGINE else 10.0)
    routed = experts_of(layer("bf16"), TOP_K, **SIZES)
    assert experts(routed).stock is None
    assert experts(routed).workspace_shapes(*shapes, routed.activation) == ((0,), (0,), (64, HIDDEN))


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_vllms_own_experts_are_made_of_what_the_layer_holds(times: Any, dtype: str) -> None:
    times(lambda name, n: 5.0 if name == ENGINE else 10.0)
    routed = experts_of(layer(dtype), TOP_K, **SIZES)
    stock, (held,) = experts(routed).stock, experts(routed).layer.held
    assert stock._weights is held
    own = stock._experts
    assert isinstance(own, TritonExperts)
    assert own.quant_dtype == (torch.float8_e4m3fn if dtype == "fp8" else None)
    assert own.block_shape == ([128, 128] if dtype == "fp8" else None)
    if dtype == "fp8":
        assert own.w1_scale.data_ptr() == held.gate_up_scale.data_ptr()
        assert own.w2_scale.data_ptr() == held.down_scale.data_ptr()


def test_a_shape_is_measured_once_and_kept(times: Any, said: list[str]) -> None:
    first = times(large_are_vllms)
    for _ in range(2):
        experts_of(layer(), TOP_K, dtype=HALF, **SIZES)
    assert first.asked
    assert all(first.asked.count(asked) == len(ROUTINGS) for asked in first.asked)
    (record,) = records()
    assert record.complete
    assert record.left
    assert len(record.plan) == 7
    said.clear()
    again = times(large_are_vllms)
    routed = experts_of(layer(), TOP_K, dtype=HALF, **SIZES)
    assert not again.asked, "the file has it"
    assert experts(routed).stock is not None
    assert any("what computes batches" in line for line in said)


@pytest.mark.parametrize("other", ["fp8", "gelu_tanh"])
def test_layers_of_one_size_and_another_kind_are_measured_apart(times: Any, said: list[str], other: str) -> None:
    """As of a model whose last layers are not quantised. What was measured of one is not said of the other."""
    timer = times(large_are_vllms)
    experts_of(layer(), TOP_K, dtype=HALF, **SIZES)
    asked = len(timer.asked)
    kind = layer("fp8") if other == "fp8" else replace(layer(), activation=other)
    for _ in range(2):
        experts_of(kind, TOP_K, dtype=HALF, **SIZES)
    assert len({(r.key["shape"], r.key["weights"]) for r in records()}) == 2
    assert len(timer.asked) == 2 * asked or other == "fp8", "its candidates are others"
    assert len(timer.asked) > asked
    assert not [line for line in said if "rank 0 has measured" in line]
    assert len([line for line in said if "what computes batches" in line]) == 2


def test_what_fails_is_named_and_the_rest_computes(times: Any, said: list[str]) -> None:
    failing: set[str] = set()

    def us(name: str, tokens: int) -> float:
        if name != ENGINE and not failing:
            failing.add(name)
        if name in failing:
            raise RuntimeError("planted")
        return 10.0 if name != ENGINE else 20.0

    times(us)
    of, b = layer(), given(9)
    routed = experts_of(of, TOP_K, dtype=HALF, **SIZES)
    (name,) = failing
    assert any(f"left out: {name}: RuntimeError: planted" in line for line in said)
    assert error(run(routed, b), expected(of, b, quantise=False)) < 2e-2


def test_all_that_may_be_chosen_is_compiled_before(
    times: Any, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    """Once for a shape, for batches up to the largest; what raises is dropped."""
    timer, warmed = times(lambda name, n: 20.0 if name == ENGINE else 10.0 + len(name)), list[Any]()

    def warm(layer: Any, candidates: Any, most: int, dtype: Any) -> dict[str, str]:
        warmed.append(({c.name for c in candidates}, most, dtype))
        return {min(warmed[0][0]): "planted"}

    monkeypatch.setattr(engine, "warm", warm)
    layers = [experts_of(layer(), TOP_K, dtype=HALF, **SIZES) for _ in range(2)]
    assert warmed == [({name for name, _ in timer.asked if name != ENGINE}, 64, HALF)]
    name = min(warmed[0][0])
    assert experts(layers[0]).layer.dropped[name] == "planted"
    assert f"ramp_moe: left out: {name}: planted" in said


def test_a_kernel_without_a_version_stops_no_other(
    times: Any, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    class Broken(TritonMoE):
        name = "broken"

        def version(self) -> str:
            raise OSError("gone")

    timer = times(large_are_vllms)
    monkeypatch.setattr(engine, "usable_kernels", lambda shape, hardware: [TritonMoE(), Broken()])
    experts_of(layer(), TOP_K, dtype=HALF, **SIZES)
    assert any(name.startswith("triton/") for name, _ in timer.asked), said
    (record,) = records()
    assert "broken ?" in record.key["kernels"]


def test_if_everything_fails_vllm_has_the_layer(times: Any, said: list[str]) -> None:
    def us(name: str, tokens: int) -> float:
        if name == ENGINE:
            return 10.0
        raise RuntimeError("planted")

    times(us)
    assert isinstance(experts(experts_of(layer(), TOP_K, dtype=HALF, **SIZES)), TritonExperts)
    assert any(line.startswith("ramp_moe leaves experts to vLLM: nothing could be timed (") for line in said)


def test_it_can_be_turned_off(times: Any, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    monkeypatch.setenv(calibration_seconds.VARIABLE, "0")
    timer = times(large_are_vllms)
    routed = experts_of(layer(), TOP_K, dtype=HALF, **SIZES)
    assert not timer.asked
    assert experts(routed).stock is None
    assert list(records()) == []


@pytest.mark.parametrize("nonsense", ["soon", "-1", "nan", "inf", "1e400"])
def test_nonsense_is_the_default_with_a_line(monkeypatch: pytest.MonkeyPatch, nonsense: str) -> None:
    monkeypatch.setenv(calibration_seconds.VARIABLE, nonsense)
    said: list[str] = []
    assert calibration_seconds.seconds(said.append) == calibration_seconds.SECONDS
    (line,) = said
    assert line.startswith(f"{calibration_seconds.VARIABLE}={nonsense} is no number of seconds; 20 are taken")
    for given, found in (("", 20.0), ("0", 0.0), (" 7.5 ", 7.5)):
        monkeypatch.setenv(calibration_seconds.VARIABLE, given)
        assert calibration_seconds.seconds(said.append) == found
    assert len(said) == 1


def test_a_cache_that_cannot_be_written_costs_lines(
    times: Any, monkeypatch: pytest.MonkeyPatch, said: list[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAMP_MOE_CACHE", str(tmp_path / "file"))
    times(large_are_vllms)
    routed = experts_of(layer(), TOP_K, dtype=HALF, **SIZES)
    assert experts(routed).stock is not None, "measured all the same"
    assert any("what is measured is not kept: cannot write" in line for line in said)


def test_a_record_that_is_damaged_is_measured_again(times: Any, said: list[str], tmp_path: Path) -> None:
    times(large_are_vllms)
    experts_of(layer(), TOP_K, dtype=HALF, **SIZES)
    (path,) = (tmp_path / "cache").rglob("*.json")
    path.write_bytes(path.read_bytes()[:100])
    again = times(large_are_vllms)
    experts_of(layer(), TOP_K, dtype=HALF, **SIZES)
    assert again.asked
    assert any("corrupt or truncated" in line and line.endswith("it is measured again") for line in said)


def test_without_time_for_anything_what_is_predicted_stands(
    times: Any, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.setenv(calibration_seconds.VARIABLE, "1e-9")
    timer = times(large_are_vllms)
    of, b = layer(), given(9)
    assert error(run(experts_of(of, TOP_K, dtype=HALF, **SIZES), b), expected(of, b, quantise=False)) < 2e-2
    assert not timer.asked
    assert any("no time was left to measure" in line for line in said)


def test_the_time_is_for_a_model(times: Any, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    """A second shape has what the first left."""
    timer = times(large_are_vllms)
    times.model._spent = 20.5
    experts_of(layer(), TOP_K, dtype=HALF, **SIZES)
    assert not timer.asked
    assert any("is not measured: the time for a model is over (RAMP_MOE_CALIBRATE_S)" in line for line in said)


def test_whatever_measuring_raises_the_layer_is_made(
    times: Any, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    times(large_are_vllms)

    def no_timer(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setitem(TIMERS, DEVICE, no_timer)
    of, b = layer(), given(9)
    assert error(run(experts_of(of, TOP_K, dtype=HALF, **SIZES), b), expected(of, b, quantise=False)) < 2e-2
    assert "ramp_moe: nothing is measured: OutOfMemoryError: no memory" in said


def test_a_strange_kernel_is_tried_in_a_process_apart(times: Any, monkeypatch: pytest.MonkeyPatch, said: Any) -> None:
    class Strange(TritonMoE):
        name = "strange"

    timer = times(large_are_vllms)
    strange = Strange()
    monkeypatch.setattr(engine, "usable_kernels", lambda *_: [TritonMoE(), strange])
    monkeypatch.setattr(probe, "third_party", lambda kernels: [k for k in kernels if k is strange])
    monkeypatch.setattr(
        probe, "fault", lambda name, *_: probe.Fault("gave no answer within 60 s in a process apart", True)
    )
    experts_of(layer(), TOP_K, dtype=HALF, **SIZES)
    assert not any(name.startswith("strange") for name, _ in timer.asked)
    assert any("strange: gave no answer within 60 s in a process apart" in line for line in said)


def test_each_configuration_loads_a_model_of_its_own() -> None:
    """Nothing of a model before, or beside it, is used: its ranks, or its batches, may be others. What is released is
    forgotten."""
    from ramp_moe_adapters.frameworks.vllm import calibrate
    from vllm.config import VllmConfig, set_current_vllm_config

    found = []
    for config in (first := VllmConfig(), second := VllmConfig()):
        with set_current_vllm_config(config):
            found.append(calibrate.model())
            assert calibrate.model() is found[-1]
    assert found[0] is not found[1]
    known, of_first = set(calibrate._models), id(first)
    assert {of_first, id(second)} <= known
    del config, first, second, found
    gc.collect()
    assert of_first not in calibrate._models


class Group:
    """Two ranks of a tensor-parallel group, one after the other in this process, with one key-value store."""

    world_size = 2

    def __init__(self, rank: int, store: torch.distributed.Store) -> None:
        self.rank_in_group = rank
        self.cpu_group = SimpleNamespace(get_group_store=lambda: store)


def test_ranks_choose_by_what_the_first_measured(times: Any, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    from ramp_moe_adapters.frameworks.vllm import calibrate

    kept, store = [], torch.distributed.HashStore()
    for rank in range(2):
        # The second rank's own times would say otherwise.
        timer = times(large_are_vllms if rank == 0 else lambda name, n: 1.0)
        monkeypatch.setattr(calibrate, "_group", lambda rank=rank: Group(rank, store))
        routed = experts_of(layer(), TOP_K, dtype=HALF, **SIZES)
        assert bool(timer.asked) is (rank == 0)
        kept.append([experts(routed)._keeps(n) for n in range(1, 65)])
    assert kept[0] == kept[1]
    assert True in kept[0]
    assert sum("what computes batches" in line for line in said) == 1, "the first rank tells"


def test_a_first_rank_that_has_no_layer_says_so(times: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others would wait for it. They choose by what is predicted."""
    from ramp_moe_adapters.frameworks.vllm import calibrate

    store = torch.distributed.HashStore()
    monkeypatch.setattr(calibrate, "_group", lambda: Group(0, store))
    times(large_are_vllms)

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(times.model.builder, "layer", refuse)
        for _ in range(2):
            assert isinstance(experts(experts_of(layer(), TOP_K, dtype=HALF, **SIZES)), TritonExperts)
    monkeypatch.setattr(calibrate, "_group", lambda: Group(1, store))
    timer = times(large_are_vllms)
    assert experts(experts_of(layer(), TOP_K, dtype=HALF, **SIZES)).stock is None
    assert not timer.asked


class HostTimer:
    """Runs what a GPU would time, and compares it with the reference."""

    ran: ClassVar[list[str]] = []

    def __init__(self, launch: Any, of: MoEWeights, dtype: Any, local: Any, safe: Any) -> None:
        self._launch, self._of, self._local, self._safe = launch, of, local, safe

    def time(self, candidate: Any, topk_ids: IntArray) -> float:
        assert self._safe(candidate)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(len(topk_ids), HIDDEN, dtype=torch.float32, generator=generator).to(HALF)
        ids = torch.tensor(topk_ids, dtype=torch.int32)
        b = Batch(x, ids, torch.full(ids.shape, 0.5, dtype=torch.float32))
        out = torch.full_like(x, float("nan"))
        self._launch(candidate, b, out)
        here = Batch(x, self._local(ids).int().contiguous(), b.topk_weights)
        assert error(out, expected(self._of, here, quantise=False)) < 2e-2
        self.ran.append(ENGINE if candidate is None else candidate.kernel)
        return 10.0


@pytest.mark.parametrize("ep", [(1, 0), (2, 1)])
def test_what_is_timed_is_what_computes(times: Any, monkeypatch: pytest.MonkeyPatch, ep: tuple[int, int]) -> None:
    """A rank's own experts, by ours and by vLLM's, of ids of all experts."""
    from ramp_moe_adapters.frameworks.vllm.stock import Stock

    def own(self: Stock, output: Any, x: Any, topk_weights: Any, topk_ids: Any, *rest: Any) -> None:
        _, num_experts, expert_map, first, second = rest
        assert num_experts == EXPERTS
        assert min(first.numel(), second.numel()) >= len(x) * TOP_K * HIDDEN
        ids = topk_ids if expert_map is None else expert_map[topk_ids]
        output.copy_(expected(self._weights, Batch(x, ids.int(), topk_weights), quantise=False))

    times(large_are_vllms)
    HostTimer.ran.clear()
    monkeypatch.setattr(Stock, "run", own)
    monkeypatch.setattr(engine_timer, "GraphTimer", HostTimer)
    monkeypatch.setitem(TIMERS, DEVICE, engine_timer._gpu_timer)
    experts_of(layer(), TOP_K, dtype=HALF, ep=ep, moe_options={"max_num_tokens": 1})
    (record,) = records()
    assert record.key["ep_size"] == str(ep[0])
    assert not record.dropped
    assert set(HostTimer.ran) == {ENGINE, "triton"}
