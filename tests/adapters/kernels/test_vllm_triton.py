"""vLLM's launch: wired over a fake of its package everywhere, and the real one on a GPU that has it."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import fake_vllm
import pytest
import torch
from fake_vllm import FakeVllm
from moe_cases import H200, ROUTINGS, batch, error, expected, weights
from ramp_moe import Hardware, KernelError, MoEShape
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.spec.kernel import usable_configs
from ramp_moe.spec.launchable import Batch, MoEWeights, Workspace
from ramp_moe_adapters.kernels.vllm_triton import launch as vllm_triton_launch
from ramp_moe_adapters.kernels.vllm_triton.kernel import VllmTriton

KERNEL = VllmTriton()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXPERTS, TOP_K, HIDDEN, INTER = 6, 3, 256, 128
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
# Of the result's rounding to bf16; and of vLLM's against the exact layer: intermediates in bf16, or activations in fp8,
# whose scales may be powers of two.
ROUNDED, COMPUTED = 5e-3, {"bf16": 1e-2, "fp16": 2e-3, "fp8": 6e-2}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeVllm:
    return fake_vllm.install(monkeypatch, tmp_path)


def layer(dtype: str = "bf16", **given) -> MoEWeights:
    return weights(EXPERTS, HIDDEN, INTER, dtype, DEVICE, **given)


def given(tokens: int, routing: str = "uniform", dtype: torch.dtype = torch.bfloat16) -> Batch:
    return batch(tokens, TOP_K, EXPERTS, HIDDEN, routing, DEVICE, dtype)


def run(of: MoEWeights, b: Batch, prepared=None, workspace: Workspace | None = None) -> torch.Tensor:
    config = KERNEL.default_config(of.shape(b.top_k), H200, b.num_tokens)
    out = torch.full_like(b.hidden_states, float("nan"))
    KERNEL.launch(config, prepared or KERNEL.prepare(of), b, out, workspace or Workspace())
    return out


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8"])
@pytest.mark.usefixtures("fake")
def test_launch_over_the_fake(dtype: str, routing: str) -> None:
    of, b = layer(dtype), given(70, routing, HALF[dtype])
    assert error(run(of, b), expected(of, b, quantise=dtype == "fp8")) < ROUNDED


@pytest.mark.usefixtures("fake")
def test_biases_and_activations_are_passed_on() -> None:
    for of in (layer(bias=True), layer("fp8", bias=True), layer(activation="gelu_tanh")):
        b = given(9)
        assert error(run(of, b), expected(of, b, quantise=of.gate_up_scale is not None)) < ROUNDED


@pytest.mark.usefixtures("fake")
def test_skipped_ids_stand_for_an_expert_of_their_token() -> None:
    b = given(3)
    b.topk_ids.copy_(torch.tensor([[-1, 4, EXPERTS], [2**31 - 1, -1, -(2**31)], [5, 0, 1]]))
    b.topk_weights[0, 0] = float("nan")
    ids, weight, routed = vllm_triton_launch.routing(b, EXPERTS, Workspace())
    assert ids.tolist() == [[4, 4, 4], [0, 0, 0], [5, 0, 1]]
    assert routed.tolist() == [True, False, True]
    assert weight[0].tolist() == [0, b.topk_weights[0, 1], 0]
    assert weight[1].tolist() == [0, 0, 0]
    assert torch.equal(weight[2], b.topk_weights[2])


@pytest.mark.usefixtures("fake")
def test_a_token_without_experts_is_zero_whatever_it_holds() -> None:
    of, b = layer(), given(4)
    b.topk_ids[1] = -1
    b.hidden_states[1] = float("nan")
    out = run(of, b)
    assert not out[1].any()
    assert not out[[0, 2, 3]].isnan().any()


@pytest.mark.usefixtures("fake")
def test_out_in_place_of_the_input_and_one_workspace() -> None:
    of, workspace = layer(), Workspace()
    for tokens in (9, 130, 2):
        b = given(tokens)
        wanted = run(of, b, workspace=workspace)
        config = KERNEL.default_config(of.shape(TOP_K), H200, tokens)
        KERNEL.launch(config, KERNEL.prepare(of), b, b.hidden_states, workspace)
        assert torch.equal(b.hidden_states, wanted)


def test_a_launch_runs_under_its_configuration(fake: FakeVllm, h200: Hardware) -> None:
    of, b = layer(), given(5)
    prepared, out = KERNEL.prepare(of), torch.empty_like(b.hidden_states)
    for config in usable_configs(KERNEL, of.shape(TOP_K), h200)[::400]:
        assert list(KERNEL.steps(config, prepared, b, out, Workspace())) == []
        assert fake.calls[-1] == dict(config.params)
        assert set(fake.calls[-1]) == {
            *("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
        }
    assert fake.config is None


def test_an_exception_leaves_vllms_configuration_as_it_was(fake: FakeVllm) -> None:
    def fail() -> None:
        raise RuntimeError("out of shared memory")

    fake.config, fake.during = {"theirs": 1}, fail
    with pytest.raises(RuntimeError, match="out of shared memory"):
        run(layer(), given(5))
    assert fake.config == {"theirs": 1}
    fake.during = lambda: None
    run(layer(), given(5))


def test_threads_do_not_see_each_others_configuration(fake: FakeVllm, h200: Hardware) -> None:
    of, b = layer(), given(5)
    first, second = usable_configs(KERNEL, of.shape(TOP_K), h200)[:2]
    inside, looked, seen = threading.Event(), threading.Event(), []

    def during() -> None:
        if threading.current_thread() is other:
            looked.wait(5)
            return
        before = fake.config
        inside.set()
        time.sleep(0.2)  # for the other thread to change it, if it could
        seen.append((before, fake.config))
        looked.set()

    def launch(config) -> None:
        KERNEL.launch(config, prepared, b, torch.empty_like(b.hidden_states), Workspace())

    def launch_second() -> None:
        inside.wait()
        launch(second)

    prepared, other = KERNEL.prepare(of), threading.Thread(target=launch_second)
    fake.during = during
    other.start()
    launch(first)
    other.join()
    assert seen == [(dict(first.params),) * 2]
    assert fake.calls == [dict(first.params), dict(second.params)]


@pytest.mark.usefixtures("fake")
def test_a_layer_uses_it(h200: Hardware) -> None:
    of, b = layer("fp8"), given(9, "padded")
    moe = LayerRuntime(of, TOP_K, h200, [KERNEL])
    found = moe(b.hidden_states, b.topk_ids, b.topk_weights)
    assert error(found, expected(of, b, quantise=True)) < ROUNDED
    assert moe(b.hidden_states[:0], b.topk_ids[:0], b.topk_weights[:0]).shape == (0, HIDDEN)


@pytest.mark.usefixtures("fake")
def test_what_it_refuses() -> None:
    with pytest.raises(KernelError, match="computes swiglu and gelu_tanh, not swiglu_oai"):
        KERNEL.prepare(layer(activation="swiglu_oai"))
    of, b = layer(), given(4)
    with pytest.raises(KernelError, match=r"hidden_states are torch.float16, the weights torch.bfloat16"):
        run(of, given(4, dtype=torch.float16))
    with pytest.raises(KernelError, match=r"must be \[T, 256\], of one dtype"):
        run(of, batch(4, TOP_K, EXPERTS, 512, "uniform", DEVICE, torch.bfloat16))
    config, prepared = KERNEL.default_config(of.shape(TOP_K), H200, 4), KERNEL.prepare(of)
    with pytest.raises(KernelError, match=r"out on meta"):
        KERNEL.launch(config, prepared, b, b.hidden_states.to("meta"), Workspace())


def test_shapes_it_refuses(h200: Hardware) -> None:
    assert "1000 experts are more than the 992" in (KERNEL.unsupported(MoEShape(1000, 8, 256, 128), h200) or "")
    mi300x = replace(h200, name="mi300x", arch="gfx942")
    assert "e4m3fnuz on mi300x" in (KERNEL.unsupported(MoEShape(8, 2, 256, 128), mi300x) or "")
    assert KERNEL.unsupported(MoEShape(8, 2, 200, 72, "bf16"), mi300x) is None


@pytest.mark.usefixtures("fake")
def test_other_functions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[fake_vllm.MODULE]

    def lacking(hidden_states, w1, w2, topk_weights, topk_ids, activation, quant):
        raise AssertionError

    def needing(hidden_states, w1, w2, topk_weights, topk_ids, activation, quant_config, inplace):
        raise AssertionError

    for function, message in (
        (lacking, "the installed vllm's fused_experts does not take quant_config: it is of another version"),
        (needing, "the installed vllm's fused_experts needs inplace: it is of another version"),
    ):
        monkeypatch.setattr(module, "fused_experts", function)
        with pytest.raises(KernelError, match=message):
            KERNEL.prepare(layer())
    monkeypatch.delattr(module, "fused_experts")
    with pytest.raises(KernelError, match=r"the installed vllm has no vllm\.model_executor\.layers\.fused_moe\.fused_"):
        KERNEL.prepare(layer())
    monkeypatch.setitem(sys.modules, fake_vllm.MODULE, None)
    with pytest.raises(KernelError, match="vllm cannot be imported"):
        KERNEL.prepare(layer())


@pytest.mark.usefixtures("fake")
def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in found:
            raise metadata.PackageNotFoundError
        return found[name]

    monkeypatch.setattr(metadata, "version", version)
    assert KERNEL.unavailable() is None, "run from its sources"
    for found["vllm"] in ("0.33.0", "0.33.1rc1+cu130"):
        assert KERNEL.unavailable() is None
    for found["vllm"] in ("0.32.2", "0.34.0", "1.33.0", "dev"):
        reason = KERNEL.unavailable() or ""
        assert f"vllm {found['vllm']} is not a version" in reason
        assert "pip install 'vllm>=0.33,<0.34'" in reason
    monkeypatch.setattr("ramp_moe_adapters.kernels.vllm_triton.static_table.package", lambda: None)
    assert "the package vllm is missing; pip install" in (KERNEL.unavailable() or "")
    assert "https://docs.vllm.ai" in (KERNEL.unavailable() or "")


# --- the real package -------------------------------------------------------------------------------------------------

real = pytest.mark.skipif(
    KERNEL.unavailable() is not None or DEVICE == "cpu", reason=KERNEL.unavailable() or "needs a GPU"
)


@pytest.mark.gpu
@real
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8"])
@pytest.mark.parametrize("tokens", [1, 2, 33, 600])
def test_gpu_sizes_and_routings(h200: Hardware, tokens: int, dtype: str, routing: str) -> None:
    """32 experts: 1 token takes the path without alignment."""
    of = weights(32, 1024, 512, dtype, "cuda")
    moe, b = LayerRuntime(of, 8, h200, [KERNEL]), batch(tokens, 8, 32, 1024, routing, "cuda", HALF[dtype])
    out = moe(b.hidden_states, b.topk_ids, b.topk_weights)
    assert error(out, expected(of, b, quantise=False)) < COMPUTED[dtype]


@pytest.mark.gpu
@real
def test_gpu_graph_follows_new_routings(h200: Hardware) -> None:
    of, workspace = weights(32, 1024, 512, "bf16", "cuda"), Workspace()
    prepared, b = KERNEL.prepare(of), batch(24, 8, 32, 1024, "uniform", "cuda", torch.bfloat16)
    config, out = KERNEL.default_config(of.shape(8), h200, 24), torch.empty_like(b.hidden_states)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        KERNEL.launch(config, prepared, b, out, workspace)  # compiles, which a capture may not
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            KERNEL.launch(config, prepared, b, out, workspace)
    for seed, routing in enumerate(ROUTINGS):
        new = batch(24, 8, 32, 1024, routing, "cuda", torch.bfloat16, seed)
        for name in ("hidden_states", "topk_ids", "topk_weights"):
            getattr(b, name).copy_(getattr(new, name))
        out.fill_(float("nan"))
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        assert error(out, expected(of, b, quantise=False)) < COMPUTED["bf16"], routing
