"""SGLang's own runner with ramp_moe's core, without a GPU: kernels are interpreted."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang.srt.layers.moe.moe_runner")

import torch
from moe_cases import batch, error, expected, weights
from ramp_moe import KernelError
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.runtime.layer_factory import Builder, LayerPlan
from ramp_moe.runtime.placeholder import Placeholder
from ramp_moe.runtime.relayout import relayout
from ramp_moe.spec.launchable import Batch, MoEWeights
from ramp_moe_adapters.frameworks import sglang
from ramp_moe_adapters.frameworks.sglang import fields as sglang_fields
from ramp_moe_adapters.frameworks.sglang import runner as plugin
from ramp_moe_kernels.triton.kernel import TritonMoE
from sglang.srt.layers.moe.moe_runner.base import FusedOpPool
from sglang.srt.layers.moe.moe_runner.triton import TritonRunnerCore
from sglang.srt.layers.moe.token_dispatcher import standard
from sglang.srt.layers.moe.utils import MoeRunnerBackend, get_moe_runner_backend
from sglang_cases import Experts, selected
from torch import Tensor

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
E, K, H, I = 8, 2, 256, 128  # noqa: E741
TOLERANCE = {"bf16": 2e-2, "fp16": 4e-3, "fp8": 2e-2}
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
ROUTINGS = ("uniform", "skewed", "one-expert", "few-experts", "padded")


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Builder]:
    """Of a server that `--moe-runner-backend ramp_moe` started; nothing was said yet."""
    found = Builder("auto" if GPU else "h200")
    monkeypatch.setattr(plugin, "_builder", found)
    monkeypatch.setattr(plugin, "_said", set())
    with selected():
        yield found


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What SGLang's Triton runner is called with; it computes zeros."""
    calls: list[Any] = []

    def fused(dispatched: Any, info: Any, config: Any) -> standard.StandardCombineInput:
        calls.append(info)
        return standard.StandardCombineInput(torch.zeros_like(dispatched.hidden_states))

    monkeypatch.setitem(FusedOpPool._fused_funcs, ("none", "triton"), fused)
    return calls


def layer_of(experts: Experts) -> LayerRuntime:
    layer: LayerRuntime = experts.runner.runner_core._parameters.layer
    return layer


def drawn(dtype: str) -> MoEWeights:
    return weights(E, H, I, dtype, DEVICE)


def routed(tokens: int, dtype: str, routing: str = "uniform") -> Batch:
    return batch(tokens, K, E, H, routing, DEVICE, HALF[dtype])


def test_sglang_loads_it(tmp_path: Path) -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    entries = project["entry-points"]["sglang.srt.plugins"]
    info = tmp_path / "ramp_moe_plugin-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ramp-moe-plugin\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[sglang.srt.plugins]\n" + "\n".join(f"{name} = {value}" for name, value in entries.items())
    )
    code = f"""
import argparse, sys
sys.path[:0] = {[str(tmp_path), *sys.path]!r}
from sglang.srt.plugins import load_plugins
load_plugins()
from ramp_moe_adapters import sglang
sglang.register()
from sglang.srt.server_args import ServerArgs
from sglang.srt.arg_groups.choices import MOE_RUNNER_BACKEND_CHOICES
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
chosen = parser.parse_args(["--model-path", "dummy", "--moe-runner-backend", "ramp_moe"])
print(chosen.moe_runner_backend, MOE_RUNNER_BACKEND_CHOICES.count("ramp_moe"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ["ramp_moe", "1"]


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_nothing_happens_where_it_is_not_selected(dtype: str, backend: str) -> None:
    with selected(backend):
        runner = Experts(drawn(dtype), K).runner
    assert runner.runner_backend is MoeRunnerBackend.TRITON
    assert isinstance(runner.runner_core, TritonRunnerCore)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_sglang_makes_the_core(builder: Builder, dtype: str) -> None:
    assert get_moe_runner_backend() is plugin.BACKEND
    experts = Experts(drawn(dtype), K)
    assert isinstance(experts.runner.runner_core, plugin.RampRunnerCore)
    assert experts.runner.fused_func is None
    assert experts.layer.runner_backend.is_triton()


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8"])
def test_computes(builder: Builder, stock: list[Any], dtype: str, routing: str) -> None:
    given, x = drawn(dtype), routed(19, dtype, routing)
    out = Experts(given, K)(x)
    assert out.dtype == x.hidden_states.dtype
    assert 0 < error(out, expected(given, x, dtype == "fp8")) < TOLERANCE[dtype]
    assert not stock


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_one_token_and_none(builder: Builder, dtype: str) -> None:
    given = drawn(dtype)
    experts, x = Experts(given, K), routed(1, dtype)
    assert 0 < error(experts(x), expected(given, x, dtype == "fp8")) < TOLERANCE[dtype]
    assert experts(routed(2, dtype)).shape == (2, H)
    none = Batch(x.hidden_states[:0], x.topk_ids[:0], x.topk_weights[:0])
    assert experts(none).shape == (0, H)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_one_of_two_ranks_of_expert_parallelism(
    builder: Builder, monkeypatch: pytest.MonkeyPatch, dtype: str, rank: int
) -> None:
    monkeypatch.setattr(standard, "get_device", lambda: DEVICE)
    given, x = drawn(dtype), batch(9, K, 2 * E, H, "uniform", DEVICE, HALF[dtype])
    elsewhere = replace(x, topk_ids=(x.topk_ids % E + (1 - rank) * E).int())
    mine = x.topk_ids - rank * E
    local = replace(x, topk_ids=mine.masked_fill((mine < 0) | (mine >= E), -1).int())
    assert (local.topk_ids == -1).any()
    with selected(ranks=2, rank=rank):
        experts = Experts(given, K)
        assert experts.layer.num_local_experts == E
        assert 0 < error(experts(x), expected(given, local, dtype == "fp8")) < TOLERANCE[dtype]
        assert not experts(elsewhere).any()
        assert experts.runner.runner_core._parameters.layer.ep_size == 2


def test_the_routed_scaling_factor(builder: Builder) -> None:
    given, x = drawn("bf16"), routed(5, "bf16")
    out = Experts(given, K, routed_scaling_factor=2.5)(x)
    assert 0 < error(out, 2.5 * expected(given, x, False)) < TOLERANCE["bf16"]


def test_inputs_are_left_as_they_are(builder: Builder) -> None:
    x = routed(5, "bf16")
    before = [t.clone() for t in (x.hidden_states, x.topk_ids, x.topk_weights)]
    Experts(drawn("bf16"), K, inplace=True, routed_scaling_factor=2.0)(x)
    assert all(torch.equal(a, b) for a, b in zip(before, (x.hidden_states, x.topk_ids, x.topk_weights), strict=True))


def test_layers_share_a_workspace_and_notes_are_said_once(builder: Builder, caplog: pytest.LogCaptureFixture) -> None:
    first, second = Experts(drawn("bf16"), K), Experts(drawn("bf16"), K)
    first(routed(3, "bf16"))
    second(routed(3, "bf16"))
    assert first.runner.runner_core._parameters is not None
    assert second.runner.runner_core._parameters is not None
    assert first.runner.runner_core._parameters.layer.workspace is second.runner.runner_core._parameters.layer.workspace
    said = [record.message for record in caplog.records if record.name == "ramp_moe"]
    assert len(said) == len(set(said)) >= 1


# --- Weights ---------------------------------------------------------------------------------------------------------


def test_weights_are_sglangs_where_their_order_will_do(builder: Builder, stock: list[Any]) -> None:
    given, x = drawn("bf16"), routed(5, "bf16")
    experts = Experts(given, K)
    experts(x)
    (held,) = experts.runner.runner_core._parameters.layer.held
    assert held.gate_up.data_ptr() == experts.layer.w13_weight.data_ptr()
    experts.layer.w2_weight.data.mul_(2)  # loaded anew, in place
    assert error(experts(x), 2 * expected(given, x, False)) < TOLERANCE["bf16"]
    before = layer_of(experts)
    experts.layer.w2_weight = torch.nn.Parameter(given.down * 4, requires_grad=False)
    assert error(experts(x), 4 * expected(given, x, False)) < TOLERANCE["bf16"]
    assert layer_of(experts) is before
    assert not stock


class UpFirst(Builder):
    """As where kernels that want another order of rows are predicted to be faster."""

    def layer(self, weights: MoEWeights, *rest: Any) -> LayerRuntime:
        return super().layer(relayout(weights, "up-first"), *rest)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_what_is_moved_is_held_once(
    builder: Builder, stock: list[Any], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(plugin, "_builder", UpFirst(builder.device))
    given, x = drawn(dtype), routed(5, dtype)
    experts = Experts(given, K)
    for _ in range(2):
        assert 0 < error(experts(x), expected(given, x, dtype == "fp8")) < TOLERANCE[dtype]
    held = layer_of(experts).held[0]
    assert held.layout == "up-first"
    assert isinstance(experts.layer.w13_weight, Placeholder)
    assert experts.layer.w2_weight.data_ptr() == held.down.data_ptr()
    assert torch.equal(experts.layer.w13_weight.float(), given.gate_up.float()), "reads as SGLang's"
    assert not stock


class Repacking(TritonMoE):
    """A kernel whose weights lie in a format of its own."""

    name = "repacking"

    def readable_layouts(self, shape: Any) -> tuple[str, ...]:
        return ("repacking/own",)

    def prepare(self, given: MoEWeights) -> Any:
        raise AssertionError("a second copy of the weights was made")


def test_a_layer_that_is_made_when_it_first_runs_holds_no_second_copy(
    builder: Builder, stock: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The KV cache has taken the memory by then."""
    monkeypatch.setattr(builder, "_plan", lambda shape, gpu: LayerPlan(gpu, [Repacking(), TritonMoE()], None))
    given, x = drawn("bf16"), routed(5, "bf16")
    experts = Experts(given, K)
    assert error(experts(x), expected(given, x, False)) < TOLERANCE["bf16"]
    assert set(layer_of(experts).kernels) == {"triton"}
    assert not stock


def turned(given: MoEWeights) -> MoEWeights:
    """Other weights."""
    flipped = {f.name: t.flip(0).contiguous() for f in fields(given) if isinstance(t := getattr(given, f.name), Tensor)}
    return replace(given, **flipped)


def by_loader(experts: Experts, new: MoEWeights) -> None:
    """As SGLang's weight updates do, from several threads."""
    pairs = {"weight": (new.gate_up, new.down), "weight_scale_inv": (new.gate_up_scale, new.down_scale)}
    with ThreadPoolExecutor(4) as threads:
        done = []
        for kind, (gate_up, down) in pairs.items():
            for e in range(E if gate_up is not None else 0):
                gate, up = gate_up[e].chunk(2)
                for shard, tensor in (("w1", gate), ("w3", up), ("w2", down[e])):
                    name = f"{'w2' if shard == 'w2' else 'w13'}_{kind}"
                    parameter = getattr(experts.layer, name)
                    done.append(threads.submit(parameter.weight_loader, parameter, tensor, name, shard, e))
        for each in done:
            each.result()


def by_loader_and_processed(experts: Experts, new: MoEWeights) -> None:
    by_loader(experts, new)
    experts.layer.quant_method.process_weights_after_loading(experts.layer)


def named(new: MoEWeights) -> dict[str, Tensor]:
    found = {"w13_weight": new.gate_up, "w2_weight": new.down}
    scales = {"w13_weight_scale_inv": new.gate_up_scale, "w2_weight_scale_inv": new.down_scale}
    return found | {name: t for name, t in scales.items() if t is not None}


def copied(experts: Experts, new: MoEWeights) -> None:
    for name, tensor in named(new).items():
        getattr(experts.layer, name).data.copy_(tensor)


def rebound(experts: Experts, new: MoEWeights) -> None:
    for name, tensor in named(new).items():
        getattr(experts.layer, name).data = tensor.clone()


def exchanged(experts: Experts, new: MoEWeights) -> None:
    for name, tensor in named(new).items():
        setattr(experts.layer, name, torch.nn.Parameter(tensor.clone(), requires_grad=False))


WAYS = {f.__name__: f for f in (by_loader, by_loader_and_processed, copied, rebound, exchanged)}


@pytest.mark.parametrize(
    ("dtype", "way"), [*(("bf16", way) for way in WAYS), ("fp8", "by_loader_and_processed"), ("fp8", "copied")]
)
@pytest.mark.parametrize("moved", [False, True], ids=["sglangs-order", "moved"])
def test_new_weights_count(
    builder: Builder, stock: list[Any], monkeypatch: pytest.MonkeyPatch, dtype: str, moved: bool, way: str
) -> None:
    """Where the old ones lay, since CUDA graphs have the addresses."""
    if moved:
        monkeypatch.setattr(plugin, "_builder", UpFirst(builder.device))
    given, x = drawn(dtype), routed(4, dtype)
    new, experts = turned(given), Experts(given, K)
    assert error(experts(x), expected(given, x, dtype == "fp8")) < TOLERANCE[dtype]
    places = [t.data_ptr() for t in vars(layer_of(experts).held[0]).values() if isinstance(t, Tensor)]
    WAYS[way](experts, new)
    assert error(experts(x), expected(new, x, dtype == "fp8")) < TOLERANCE[dtype]
    assert places == [t.data_ptr() for t in vars(layer_of(experts).held[0]).values() if isinstance(t, Tensor)]
    copied(experts, given)
    assert error(experts(x), expected(given, x, dtype == "fp8")) < TOLERANCE[dtype], "parameters are still the layer's"
    assert not stock


@pytest.mark.parametrize("moved", [False, True], ids=["sglangs-order", "moved"])
def test_weights_that_do_not_fit_are_an_error_until_others_come(
    builder: Builder, stock: list[Any], monkeypatch: pytest.MonkeyPatch, moved: bool
) -> None:
    if moved:
        monkeypatch.setattr(plugin, "_builder", UpFirst(builder.device))
    given, x = drawn("bf16"), routed(4, "bf16")
    experts = Experts(given, K)
    experts(x)
    experts.layer.w2_weight = torch.nn.Parameter(given.down[:, :64].contiguous(), requires_grad=False)
    for _ in range(2):
        with pytest.raises(KernelError, match="update"):
            experts(x)
    assert not stock, "it has a part of both"
    exchanged(experts, turned(given))
    assert error(experts(x), expected(turned(given), x, False)) < TOLERANCE["bf16"]


# --- What fails ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raised", [RuntimeError("CUDA error"), torch.OutOfMemoryError("CUDA out of memory"), TypeError()]
)
@pytest.mark.parametrize("moved", [False, True], ids=["sglangs-order", "moved"])
def test_a_batch_that_fails_is_left_to_sglang(
    builder: Builder,
    stock: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    moved: bool,
    raised: Exception,
) -> None:
    """With its own weights in its own order, whatever was raised, and each reason said once."""
    if moved:
        monkeypatch.setattr(plugin, "_builder", UpFirst(builder.device))
    given, x = drawn("fp8"), routed(4, "fp8")
    experts = Experts(given, K)
    experts(x)
    caplog.clear()

    def fail(*_: Any, **__: Any) -> None:
        raise raised

    with monkeypatch.context() as patch:
        patch.setattr(LayerRuntime, "forward", fail)
        for _ in range(2):
            experts(x)
    (said,) = [record.message for record in caplog.records if record.name == "ramp_moe"]
    assert said.startswith(type(raised).__name__)
    assert said.endswith("left to SGLang's Triton runner")
    for info in stock:
        assert torch.equal(info.w13_weight.float(), given.gate_up.float())
        assert torch.equal(info.w2_weight.float(), given.down.float())
        assert torch.equal(info.w13_scale, given.gate_up_scale)
        assert not any(isinstance(t, Placeholder) for t in vars(info).values())
    assert len(stock) == 2
    assert error(experts(x), expected(given, x, True)) < TOLERANCE["fp8"], "the next batch is ramp_moe's"


@pytest.mark.parametrize("raised", [RuntimeError("no memory"), KernelError("no kernel")])
def test_a_layer_that_cannot_be_made_is_left_to_sglang(
    builder: Builder, stock: list[Any], monkeypatch: pytest.MonkeyPatch, raised: Exception
) -> None:
    def fail(*_: Any) -> None:
        raise raised

    monkeypatch.setattr(builder, "layer", fail)
    experts = Experts(drawn("bf16"), K)
    for _ in range(2):
        experts(routed(3, "bf16"))
    assert len(stock) == 2


def test_both_reasons_are_told_if_sglang_fails_too(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    experts, x = Experts(drawn("bf16"), K), routed(3, "bf16")
    experts(x)

    def fail(reason: str) -> Any:
        def failing(*_: Any, **__: Any) -> None:
            raise RuntimeError(reason)

        return failing

    monkeypatch.setattr(LayerRuntime, "forward", fail("ours"))
    monkeypatch.setitem(FusedOpPool._fused_funcs, ("none", "triton"), fail("theirs"))
    monkeypatch.setattr(experts.runner.runner_core._stock, "fused_func", fail("theirs"))
    with pytest.raises(KernelError, match=r"RuntimeError: ours.*runner after it \(RuntimeError: theirs"):
        experts(x)


def test_loras_hooks_are_an_error(builder: Builder) -> None:
    experts, x = Experts(drawn("bf16"), K), routed(3, "bf16")
    experts(x)
    core = experts.runner.runner_core
    with pytest.raises(KernelError, match="run no LoRA"):
        core.run_from_dispatch(SimpleNamespace(hidden_states=x.hidden_states), None, core.config, hooks=object())


# --- What is left to SGLang ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "gelu"}, "the activation is gelu"),
        ({"gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0}, r"limits \(1.702, 7.0, None\)"),
        ({"swiglu_limit": 10.0}, "limits"),
        ({"no_combine": True, "inplace": False}, "router weights"),
        ({"apply_router_weight_on_input": True}, "router weights"),
    ],
)
def test_layers_that_ramp_moe_does_not_compute(
    builder: Builder, stock: list[Any], caplog: pytest.LogCaptureFixture, options: dict[str, Any], message: str
) -> None:
    for _ in range(2):
        experts = Experts(drawn("bf16"), K, **options)
        experts(routed(3, "bf16"))
        experts(routed(4, "bf16"))
        assert experts.layer.w13_weight.numel()
    assert len(stock) == 4
    (said,) = [record.message for record in caplog.records if record.name == "ramp_moe"]
    assert said.endswith("left to SGLang's Triton runner")
    assert caplog.records[0].levelno == logging.WARNING
    assert re.search(message, said)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_int8_w8a8": True}, "quantised in another way"),
        ({"use_fp8_w8a8": True, "block_shape": [64, 64]}, "quantised in another way"),
        ({"use_fp8_w8a8": True, "block_shape": [128, 128], "a13_scale": torch.ones(1)}, "static scales"),
        ({"fuse_swiglu_interleaved": True}, "another form"),
        ({"w13_zp": torch.zeros(1)}, "TritonMoeQuantInfo.w13_zp is Tensor"),
        ({"w2_weight": torch.zeros(E, H, 2 * I)}, "down must be"),
        ({"w13_weight": torch.zeros(E, 2 * I, H, dtype=torch.float32)}, "gate_up is torch.float32"),
    ],
)
def test_weights_that_ramp_moe_does_not_read(
    builder: Builder,
    stock: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    change: dict[str, Any],
    message: str,
) -> None:
    experts = Experts(drawn("bf16"), K)
    method = experts.layer.quant_method
    info = replace(method.get_triton_quant_info(experts.layer), **change)
    monkeypatch.setattr(method, "get_triton_quant_info", lambda _: info)
    experts(routed(3, "bf16"))
    assert stock == [info]
    (said,) = [record.message for record in caplog.records if record.name == "ramp_moe"]
    assert re.search(message, said)


@pytest.mark.parametrize(
    ("field", "value", "known"),
    [
        ("gemm1_beta", 0.5, True),
        ("no_combine_keep_router_weight", True, True),
        ("use_tp_all_gather_activation", True, True),
        ("top_k", K, False),
    ],
)
def test_settings_that_ramp_moe_does_not_compute_or_know(
    builder: Builder,
    stock: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    field: str,
    value: Any,
    known: bool,
) -> None:
    experts = Experts(drawn("bf16"), K)
    monkeypatch.setattr(experts.runner.runner_core.config, field, value)
    if not known:
        monkeypatch.delitem(sglang_fields.RUNNER, field)  # as if a newer version had added it
    experts(routed(3, "bf16"))
    assert len(stock) == 1
    (said,) = [record.message for record in caplog.records if record.name == "ramp_moe"]
    unknown = "" if known else ", which ramp_moe does not know"
    assert said.startswith(f"MoeRunnerConfig.{field} is {value}{unknown}: left to")


def test_runners_that_are_called_otherwise_are_not_registered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run_from_dispatch(self: Any, dispatch_output: Any, *, swizzle: bool) -> None: ...

    monkeypatch.setattr(plugin.DispatchMoeRunnerCore, "run_from_dispatch", run_from_dispatch)
    monkeypatch.setattr(plugin, "MOE_RUNNER_BACKEND_CHOICES", [])
    sglang.register()
    (said,) = [record.message for record in caplog.records if record.name == "ramp_moe"]
    assert "is no backend of sglang" in said
    assert "its runners are called with other arguments" in said
    assert "swizzle" in said


def test_a_batch_that_the_layer_refuses_is_left_to_sglang(builder: Builder, stock: list[Any]) -> None:
    experts = Experts(drawn("bf16"), K)
    experts(routed(3, "bf16"))
    assert not stock
    experts(batch(3, K, E, H, "uniform", DEVICE, torch.float16))
    assert len(stock) == 1, "hidden states of another dtype"
    given, x = drawn("bf16"), routed(3, "bf16")
    assert 0 < error(experts(x), expected(given, x, False)) < TOLERANCE["bf16"]
    assert len(stock) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_lora": True}, "LoRA"),
        ({"enable_eplb": True}, "EPLB"),
        ({"cpu_offload_gb": 4}, "offloaded"),
        ({"enable_torch_compile": True}, r"torch\.compile"),
        ({"enable_deterministic_inference": True}, "deterministic"),
        ({"moe_a2a_backend": "deepep"}, "a2a backend"),
        ({"dwdp_size": 2}, "DWDP"),
    ],
)
def test_servers_that_are_left_to_sglang(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(plugin, "_said", set())
    with selected(**options):
        assert get_moe_runner_backend() is MoeRunnerBackend.TRITON
    (said,) = [record.message for record in caplog.records if record.name == "ramp_moe"]
    assert re.search(message, said)
    assert said.endswith("every layer is left to SGLang's Triton runner")
