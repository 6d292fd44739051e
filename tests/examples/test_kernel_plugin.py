"""A stranger's path: install the example plugin, see its kernel, compare it with what ships, run it in a layer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_cases import H200, ROUTINGS, batch, error, expected, weights
from ramp_moe import Hardware, KernelError, Registry
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.spec.kernel import usable_configs
from ramp_moe.spec.launchable import Batch, LaunchableKernel, MoEWeights, Workspace

PLUGIN = Path(__file__).parents[2] / "examples" / "kernel_plugin"
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HALF = torch.bfloat16 if GPU else torch.float16  # the interpreter truncates where a GPU rounds to bf16


@pytest.fixture(scope="module")
def ramp_moe(tmp_path_factory: pytest.TempPathFactory):
    """ramp_moe(args) runs the command with the plugin installed, and returns what its --json prints."""
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*pip, str(site), str(PLUGIN)], check=True)

    def run(*args: str) -> Any:
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])}
        command = [sys.executable, "-m", "ramp_moe.cli", *args, "--json"]
        return json.loads(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)

    return run


@pytest.mark.slow
def test_it_is_listed(ramp_moe) -> None:
    plugins = {p["name"]: p for p in ramp_moe("plugins")}
    assert plugins["simple_triton"]["problems"] == []
    assert plugins["simple_triton"]["hooks"] == ["ramp_moe_kernels", "ramp_moe_profiles"]
    kernels = {k["name"]: k for k in ramp_moe("kernels", "--model", "olmoe-1b-7b")}
    assert kernels["simple_triton"]["num_configs"] == 6
    assert kernels["simple_triton"]["unsupported"] is None
    assert kernels["simple_triton"]["unavailable"] is None
    assert kernels["simple_triton"]["recorded"]
    bf16 = {k["name"]: k for k in ramp_moe("kernels", "--dtype", "bf16")}
    assert "fp8" in bf16["simple_triton"]["unsupported"]


@pytest.mark.slow
def test_it_takes_part_in_compare(ramp_moe) -> None:
    default = ramp_moe("compare", "--model", "olmoe-1b-7b", "--device", "h200")
    alone, beside = default["plugins"]
    assert alone["kernels"] == ["simple_triton"]
    assert beside["kernels"] == [*default["kernels"], "simple_triton"]
    kernels = [part for name in beside["kernels"] for part in ("--kernel", name)]
    both = ramp_moe("compare", "--model", "olmoe-1b-7b", *kernels)
    assert {s["kernel"] for s in both["sources"]} == set(both["kernels"]) == set(beside["kernels"])
    assert len(both["batches"]) == beside["batches"] >= 7
    assert both["speedup_over_static"] == beside["speedup_over_static"]
    alone = ramp_moe("compare", "--model", "olmoe-1b-7b", "--kernel", "simple_triton")
    assert alone["kernels"] == ["simple_triton"]
    assert {b["best"]["kernel"] for b in alone["batches"]} == {"simple_triton"}
    # the better of two kernels is never slower than one of them
    for joint, single in zip(both["batches"], alone["batches"], strict=True):
        assert joint["best"]["us"] <= single["best"]["us"]


@pytest.mark.slow
def test_it_changes_nothing_that_the_library_s_own_kernels_show(ramp_moe, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ("--model", "olmoe-1b-7b")
    shown = {command: ramp_moe(command, *model) for command in ("compare", "explain", "profiles", "kernels")}
    monkeypatch.setenv("RAMP_MOE_PLUGINS", "")
    without = {command: ramp_moe(command, *model) for command in shown}
    assert len(without["compare"]["batches"]) == 25
    assert shown["compare"].pop("plugins") != without["compare"].pop("plugins") == []
    assert shown["compare"] == without["compare"]
    for command, name in (("profiles", "kernel"), ("kernels", "name")):
        assert [row for row in shown[command] if row[name] != "simple_triton"] == without[command]
    candidates = shown["explain"]["candidates"]
    assert [c for c in candidates if c["kernel"] != "simple_triton"] == without["explain"]["candidates"] != candidates


def test_its_two_launches_are_summed(ramp_moe) -> None:
    found = ramp_moe("explain", "--model", "olmoe-1b-7b", "--kernel", "simple_triton", "--tokens", "64")
    assert len(found["candidates"]) == 6
    assert all(len(c["gemms"]) == 2 for c in found["candidates"])


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> LaunchableKernel:
    monkeypatch.syspath_prepend(str(PLUGIN))
    from ramp_moe_simple_triton import SimpleTriton

    return SimpleTriton()


def check(kernel: LaunchableKernel, layer: MoEWeights, given: Batch, hardware: Hardware) -> None:
    moe = LayerRuntime(layer, given.top_k, hardware, [kernel])
    out = moe(given.hidden_states, given.topk_ids, given.topk_weights)
    assert out.dtype == given.hidden_states.dtype
    assert error(out, expected(layer, given, quantise=False)) < 1e-2


@pytest.mark.parametrize("routing", ["uniform", "padded", "duplicates", "garbage"])
def test_a_layer_computes_with_it(kernel: LaunchableKernel, h200: Hardware, routing: str) -> None:
    layer = weights(4, 256, 128, "fp8", DEVICE)
    check(kernel, layer, batch(9, 2, 4, 256, routing, DEVICE, HALF), h200)


def test_every_configuration(kernel: LaunchableKernel, h200: Hardware) -> None:
    layer = weights(3, 256, 256, "fp8", DEVICE)
    given = batch(40, 2, 3, 256, "skewed", DEVICE, HALF)
    wanted, out = expected(layer, given, quantise=False), torch.empty_like(given.hidden_states)
    configs = usable_configs(kernel, layer.shape(2), h200)
    assert len(configs) == 6
    for config in configs:
        kernel.launch(config, kernel.prepare(layer), given, out.fill_(float("nan")), Workspace())
        assert error(out, wanted) < 1e-2, config.name


def test_its_defaults_are_configurations(kernel: LaunchableKernel, registry: Registry, h200: Hardware) -> None:
    shape = registry.shape("olmoe-1b-7b", "fp8")
    found = [kernel.default_config(shape, h200, tokens) for tokens in (1, 64, 128, 8192)]
    assert set(found) <= set(usable_configs(kernel, shape, h200))
    assert len(set(found)) == 3


def test_weights_it_refuses(kernel: LaunchableKernel) -> None:
    layer = weights(2, 256, 128, "fp8", DEVICE)
    with pytest.raises(KernelError, match="fp8"):
        kernel.prepare(weights(2, 256, 128, "bf16", DEVICE))
    with pytest.raises(KernelError, match="swiglu"):
        kernel.prepare(replace(layer, activation="gelu_tanh"))
    with pytest.raises(KernelError, match="biases"):
        kernel.prepare(replace(layer, down_bias=torch.zeros(2, 256, device=DEVICE)))


def test_the_readme_s_example(kernel: LaunchableKernel) -> None:
    code = (PLUGIN / "README.md").read_text().split("```python\n")[1].split("```")[0]
    # The plugin is on the path, not installed: the registry does not know it.
    changes = {'kernels=["simple_triton"]': "kernels=[SimpleTriton()]"}
    if not GPU:
        changes |= {
            '"cuda"': '"cpu"',
            "bfloat16": "float16",
            "top_k, options": 'top_k, device="h200", options',
        }
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    given: dict[str, Any] = {"SimpleTriton": type(kernel)}
    exec(code, given)
    assert given["out"].shape == (32, 512)
    routed = Batch(given["x"], given["ids"], given["routing_weights"])
    assert error(given["out"], expected(given["weights"], routed, quantise=False)) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("tokens", [1, 8, 33, 300, 2048])
def test_gpu_sizes_and_routings(kernel: LaunchableKernel, h200: Hardware, routing: str, tokens: int) -> None:
    layer = weights(32, 768, 384, "fp8", "cuda")
    check(kernel, layer, batch(tokens, 8, 32, 768, routing, "cuda", torch.bfloat16), h200)


@pytest.mark.gpu
def test_gpu_graph_follows_new_routings(kernel: LaunchableKernel) -> None:
    layer, given = weights(16, 512, 256, "fp8", "cuda"), batch(20, 4, 16, 512, "uniform", "cuda", torch.bfloat16)
    config, workspace = kernel.default_config(layer.shape(4), H200, 20), Workspace()
    out, side = torch.empty_like(given.hidden_states), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        kernel.launch(config, layer, given, out, workspace)  # compiles
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            kernel.launch(config, layer, given, out, workspace)
    for seed, routing in enumerate(ROUTINGS):
        new = batch(20, 4, 16, 512, routing, "cuda", torch.bfloat16, seed=seed)
        for name in ("hidden_states", "topk_ids", "topk_weights"):
            getattr(given, name).copy_(getattr(new, name))
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        assert error(out, expected(layer, given, quantise=False)) < 1e-2, routing
