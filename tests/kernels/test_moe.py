"""The Triton path against the reference: every configuration, dtype, activation and kind of routing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from moe_cases import H200, ROUTINGS, batch, error, expected, weights
from ramp_moe import Hardware, Registry
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.spec.launchable import Workspace
from ramp_moe_kernels import reference
from ramp_moe_kernels.triton.config import GemmConfig, Path, quantises_itself
from ramp_moe_kernels.triton.kernel import TritonMoE, _path
from ramp_moe_kernels.triton.router import LinearRouter
from tiers import slow_except

KERNEL = TritonMoE()
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# The interpreter truncates where a GPU rounds to bf16.
HALF, HALF_DTYPE = ("bf16", torch.bfloat16) if GPU else ("fp16", torch.float16)
# Against the reference fed the same rounded inputs and intermediates.
TOLERANCE = {"bf16": 5e-3, "fp16": 5e-3, "fp8": 1e-2}


def run(config, layer, given):
    out = torch.full_like(given.hidden_states, float("nan"))
    KERNEL.launch(config, KERNEL.prepare(layer), given, out, Workspace())
    return out


def same_rounding(config, layer, given) -> torch.Tensor:
    """The reference fed the inputs and intermediates that the path rounds to fp8, as the path stores them."""
    stored_as = torch.float32 if quantises_itself(_path(config).up) else given.hidden_states.dtype
    return expected(layer, given, quantise=layer.gate_up_scale is not None, stored_as=stored_as)


def check(config, layer, given, dtype: str) -> None:
    out, same, exact = run(config, layer, given), same_rounding(config, layer, given), expected(layer, given, False)
    assert error(out, same) < TOLERANCE[dtype]
    # W8A8 itself is 0.043 from the exact layer for normal values, rounded ideally; this adds next to nothing.
    assert error(out, exact) <= (1.05 * error(same, exact) if dtype == "fp8" else TOLERANCE[dtype])


@pytest.mark.parametrize("routing", slow_except(["padded", "garbage"], ROUTINGS))
@pytest.mark.parametrize("dtype", [HALF, "fp8"])
@pytest.mark.parametrize("tokens", [1, 9])
def test_default_configurations(dtype: str, routing: str, tokens: int) -> None:
    layer = weights(8, 256, 128, dtype, DEVICE)
    given = batch(tokens, 3, 8, 256, routing, DEVICE, HALF_DTYPE)
    check(KERNEL.default_config(layer.shape(3), H200, tokens), layer, given, dtype)


@pytest.fixture(params=["bf16", "fp16", "fp8"])
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.gpu
@pytest.mark.parametrize("part", range(12))
def test_every_configuration(dtype: str, part: int, h200: Hardware) -> None:
    layer = weights(24, 512, 512, dtype, "cuda")
    given = [
        batch(t, 4, 24, 512, r, "cuda", torch.float16 if dtype == "fp16" else torch.bfloat16, seed=i)
        for i, (t, r) in enumerate([(150, "skewed"), (3, "padded")])
    ]
    configs = KERNEL.configs(layer.shape(4), h200)
    assert len(configs) >= 100
    by_rounding = {}
    for config in configs[part::12]:
        key = quantises_itself(_path(config).up)
        wanted = by_rounding.setdefault(key, [same_rounding(config, layer, g) for g in given])
        for g, w in zip(given, wanted, strict=True):
            assert error(run(config, layer, g), w) < TOLERANCE[dtype], config.name


@pytest.mark.gpu
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("tokens", [1, 2, 8, 33, 300, 2048])
def test_sizes_and_routings(dtype: str, routing: str, tokens: int) -> None:
    layer = weights(32, 768, 384, dtype, "cuda")
    given = batch(tokens, 8, 32, 768, routing, "cuda", torch.float16 if dtype == "fp16" else torch.bfloat16)
    check(KERNEL.default_config(layer.shape(8), H200, tokens), layer, given, dtype)


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu_oai", "swiglu_clamped"])
@pytest.mark.parametrize("tokens", [1, 9])
def test_activations_and_biases(activation: str, tokens: int) -> None:
    layer = weights(6, 160, 96, HALF, DEVICE, activation, bias=True)  # sizes off every tile
    given = batch(tokens, 2, 6, 160, "uniform", DEVICE, HALF_DTYPE)
    check(KERNEL.default_config(layer.shape(2), H200, tokens), layer, given, HALF)


def test_split_k_with_bias() -> None:
    layer = weights(6, 1024, 128, HALF, DEVICE, bias=True)
    given = batch(5, 2, 6, 1024, "padded", DEVICE, HALF_DTYPE)
    step = GemmConfig(16, 64, 64)
    for direct, atomic in ((False, True), (True, False)):
        path = Path(replace(step, split_k=4), step, direct, atomic)
        check(KERNEL.describe(path, layer.shape(2)), layer, given, HALF)


@pytest.mark.parametrize("dtype", slow_except(["fp8"], [HALF, "fp8"]))
@pytest.mark.parametrize("split_k", [1, 4])
@pytest.mark.parametrize(("direct", "atomic"), [(False, False), (False, True), (True, False)])
def test_steps_are_the_stages(dtype: str, split_k: int, direct: bool, atomic: bool) -> None:
    layer = weights(4, 512, 128, dtype, DEVICE)  # four steps of the reduction
    given = batch(2, 2, 4, 512, "uniform", DEVICE, HALF_DTYPE)
    step = GemmConfig(16, 64, 128)
    config = KERNEL.describe(Path(replace(step, split_k=split_k), step, direct, atomic), layer.shape(2))
    out, done = torch.full_like(given.hidden_states, float("nan")), []
    for key in KERNEL.steps(config, layer, given, out, Workspace()):
        assert out.isnan().all() or len(done) == len(config.stages) - 1, "the output is written in the last"
        done.append(key)
    assert done == [stage.key for stage in config.stages]
    assert error(out, same_rounding(config, layer, given)) < TOLERANCE[dtype]


def test_nan_stays_in_its_token() -> None:
    layer = weights(8, 256, 128, HALF, DEVICE)
    for tokens in (2, 9):
        given = batch(tokens, 3, 8, 256, "uniform", DEVICE, HALF_DTYPE)
        clean = run(KERNEL.default_config(layer.shape(3), H200, tokens), layer, given)
        given.hidden_states[1, 7] = float("nan")
        out = run(KERNEL.default_config(layer.shape(3), H200, tokens), layer, given)
        assert out[1].isnan().all()
        others = torch.arange(tokens, device=DEVICE) != 1
        assert torch.equal(out[others], clean[others])


def test_parameters_describe_the_path(registry: Registry, h200: Hardware) -> None:
    for dtype in ("bf16", "fp8"):
        shape = registry.shape("olmoe-1b-7b", dtype)
        paths = KERNEL.paths(shape, h200)
        configs = KERNEL.configs(shape, h200)
        assert [_path(c) for c in configs] == paths
        assert len({c.name for c in configs}) == len(configs) >= 100


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    """E * 2 I * H exceeds 2^31 elements, and the last expert is the one that is used."""
    experts, hidden, inter = 68, 4096, 4096
    gate_up = torch.zeros(experts, 2 * inter, hidden, dtype=torch.bfloat16, device="cuda")
    down = torch.zeros(experts, hidden, inter, dtype=torch.bfloat16, device="cuda")
    gate_up[-1].normal_(0, hidden**-0.5)
    down[-1].normal_(0, inter**-0.5)
    layer = type(weights(1, 16, 16, "bf16", "cpu"))(gate_up, down)
    assert gate_up.numel() > 2**31
    for tokens in (1, 40):
        given = batch(tokens, 1, experts, hidden, "uniform", "cuda", torch.bfloat16)
        given.topk_ids[:] = experts - 1
        check(KERNEL.default_config(layer.shape(1), H200, tokens), layer, given, "bf16")


@pytest.mark.gpu
def test_captured_in_a_graph_it_follows_new_routings() -> None:
    layer = weights(16, 512, 256, "fp8", "cuda")
    given = batch(20, 4, 16, 512, "uniform", "cuda", torch.bfloat16)
    config, workspace, out = (
        KERNEL.default_config(layer.shape(4), H200, 20),
        Workspace(),
        torch.empty_like(given.hidden_states),
    )
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        KERNEL.launch(config, layer, given, out, workspace)
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            KERNEL.launch(config, layer, given, out, workspace)
    for seed, routing in enumerate(ROUTINGS):
        new = batch(20, 4, 16, 512, routing, "cuda", torch.bfloat16, seed=seed)
        for old, fresh in (
            (given.hidden_states, new.hidden_states),
            (given.topk_ids, new.topk_ids),
            (given.topk_weights, new.topk_weights),
        ):
            old.copy_(fresh)
        graph.replay()
        torch.cuda.synchronize()
        assert error(out, same_rounding(config, layer, given)) < TOLERANCE["fp8"], routing


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_the_whole_layer_from_hidden_states(scoring: str) -> None:
    """Router weight, Triton router and Triton path together, against the reference for all of it."""
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(1)).to(DEVICE) / 16
    layer = weights(8, 256, 128, HALF, DEVICE)
    x = batch(9, 3, 8, 256, "uniform", DEVICE, HALF_DTYPE).hidden_states
    moe = LayerRuntime(layer, 3, H200, [KERNEL])
    ids, topk_weights = reference.route(x.float() @ weight.T, 3, scoring=scoring, scale=2.5)
    wanted = reference.experts(x, layer.gate_up, layer.down, ids, topk_weights)
    assert error(moe(x, *LinearRouter(weight, 3, scoring, scale=2.5)(x)), wanted) < TOLERANCE[HALF]
