"""Alpha-MoE's launch: wired over an emulation of its operator everywhere, and the real one on a Hopper GPU."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from moe_cases import H200, batch, error, expected, weights
from ramp_moe import Candidate, Hardware, KernelError
from ramp_moe.cli import main
from ramp_moe.cli.listing import why_unavailable
from ramp_moe.runtime.layer import MoELayer
from ramp_moe.runtime.relayout import relayout
from ramp_moe.spec.kernel import LAYOUTS, usable_configs
from ramp_moe.spec.launchable import Batch, MoEWeights, Workspace
from ramp_moe_adapters.kernels.alpha_moe import launch as alpha_moe_launch
from ramp_moe_adapters.kernels.alpha_moe.kernel import AlphaMoE
from ramp_moe_kernels import reference
from ramp_moe_kernels.triton.kernel import TritonMoE

KERNEL = AlphaMoE()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP8 = torch.float8_e4m3fn
ROUTINGS = ("skewed", "few-experts", "one-expert", "padded", "duplicates", "garbage")
# Against the layer whose intermediates are rounded to fp8 too, and against the exact layer of the same fp8 inputs. (The
# layer of unrounded inputs is 0.035 to 0.047 away from whatever rounds its inputs and intermediates to fp8.) The first
# was 3.1e-2 in one of 152 configurations once: the operator adds in bf16, in any order.
QUANTISED, SAME_INPUTS = 3.5e-2, 4e-2
EXPERTS, TOP_K, HIDDEN, INTER = 6, 3, 256, 256


def emulate(
    x,
    xs,
    w,
    ws,
    w2,
    w2s,
    sorted_token_ids,
    experts,
    num_tokens_post_padded,
    weights,
    out,
    top_k,
    block_m,
    block_n,
    warp_n,
    stages,
    factor,
) -> None:
    """What the operator computes, with its roundings and its blind spots; the asserts are what it trusts its caller in.

    The up-projection is accumulated in bf16 over blocks of 128, the intermediate rounded to bf16 and requantised a
    token and 128 columns, and added to `out` in bf16 for each of them.
    """
    for t, dtype in zip((x, w, w2, xs, ws, w2s, weights, out), (FP8,) * 3 + (torch.float32,) * 4, strict=False):
        assert t.dtype == dtype
    assert all(t.is_contiguous() for t in (x, xs, w, ws, w2, w2s, weights, out))
    assert all(t.dtype == torch.int32 for t in (sorted_token_ids, experts, num_tokens_post_padded))
    assert out.dtype == torch.bfloat16
    assert (block_n, warp_n) in ((64, 4), (32, 8))
    assert 1 <= stages <= (5 if block_m <= 100 else 4)
    tokens, grid = len(x), len(sorted_token_ids) // block_m
    assert len(sorted_token_ids) == grid * block_m
    assert len(experts) >= grid
    half = torch.arange(256, device=x.device) // 8 % 2  # 8 gate rows, 8 up rows, ...
    for tile in range(int(num_tokens_post_padded) // block_m):
        e = int(experts[tile])
        assert 0 <= e < len(w), "scales would be read out of bounds"
        ids = sorted_token_ids[tile * block_m : (tile + 1) * block_m].long()
        assert bool((ids >= 0).all()), "would be added to token 0"
        ids = ids[ids // top_k < tokens]
        token = ids // top_k
        for cta in range(w.shape[1] // 256):
            acc = torch.zeros(len(ids), 256, dtype=torch.bfloat16, device=x.device)
            for k in range(x.shape[1] // 128):
                columns = slice(k * 128, (k + 1) * 128)
                part = x[token, columns].float() @ w[e, cta * 256 : (cta + 1) * 256, columns].float().T
                acc += (part * ws[e, 2 * cta + half, k] * xs[token, k, None]).bfloat16()
            gate, up = acc.view(-1, 16, 2, 8).float().unbind(2)
            h = (torch.nn.functional.silu(gate) * up).bfloat16().reshape(-1, 128).float()
            scale = h.abs().amax(1, keepdim=True) / 448
            q = torch.where(scale > 0, h / scale, 0).clamp(-448, 448).to(FP8).float()
            y = q @ w2[e, :, cta * 128 : (cta + 1) * 128].float().T
            y = y * scale * weights.flatten()[ids, None] * factor * w2s[e, :, cta].repeat_interleave(128)
            for row, t in enumerate(token.tolist()):
                out[t] += y[row].bfloat16()


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alpha_moe_launch, "operator", lambda device: emulate)


@pytest.fixture
def layer() -> MoEWeights:
    return weights(EXPERTS, HIDDEN, INTER, "fp8", DEVICE)


def given(tokens: int, routing: str = "uniform", seed: int = 0) -> Batch:
    return batch(tokens, TOP_K, EXPERTS, HIDDEN, routing, DEVICE, torch.bfloat16, seed)


def config(block_m: int, layer: MoEWeights):
    return KERNEL._config(layer.shape(TOP_K), block_m, 64, 4, 2)


def run(config, prepared, given: Batch, workspace: Workspace | None = None) -> torch.Tensor:
    out = torch.full_like(given.hidden_states, float("nan"))
    KERNEL.launch(config, prepared, given, out, workspace or Workspace())
    return out


def check(out: torch.Tensor, layer: MoEWeights, given: Batch, what: str = "") -> None:
    assert error(out, expected(layer, given, quantise=True)) < QUANTISED, what
    assert error(out, same_inputs(layer, given)) < SAME_INPUTS, what


def same_inputs(layer: MoEWeights, given: Batch) -> torch.Tensor:
    """The exact layer of the hidden states after their round trip through fp8, float32."""
    values, scale = reference.quantise_activations(given.hidden_states)
    ids = given.topk_ids.masked_fill((given.topk_ids < 0) | (given.topk_ids > len(layer.down)), -1)
    return reference.experts(
        values.float() * scale.repeat_interleave(128, -1),
        layer.gate_up,
        layer.down,
        ids,
        given.topk_weights,
        gate_up_scale=layer.gate_up_scale,
        down_scale=layer.down_scale,
    )


def random_fp8(*shape: int) -> torch.Tensor:
    """Every bit pattern, NaN and both zeros included."""
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).view(FP8)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("e", "i", "h"), [(1, 128, 256), (3, 256, 256), (2, 384, 512)])
def test_rows_lie_where_the_operator_reads_them(e: int, i: int, h: int) -> None:
    """A CTA reads 256 rows; of its 128 intermediates j, gate is row 16 * (j // 8) + j % 8 and up the same + 8."""
    gate_up, scale = random_fp8(e, 2 * i, h), torch.rand(e, 2 * i // 128, h // 128)
    plain = MoEWeights(gate_up, random_fp8(e, h, i), scale, torch.rand(e, h // 128, i // 128))
    prepared = KERNEL.prepare(plain)
    w, w_scale = prepared.w, prepared.w_scale
    assert w.is_contiguous()
    assert w_scale.is_contiguous()
    assert (w.dtype, w.shape, w_scale.shape) == (FP8, gate_up.shape, scale.shape)
    assert (prepared.w2, prepared.w2_scale) == (plain.down, plain.down_scale)
    got, wanted = w.view(torch.uint8), gate_up.view(torch.uint8)
    for j, half in itertools.product(range(i), range(2)):
        assert torch.equal(got[:, 256 * (j // 128) + 16 * (j % 128 // 8) + j % 8 + 8 * half], wanted[:, half * i + j])
    for b, half in itertools.product(range(i // 128), range(2)):
        assert torch.equal(w_scale[:, 2 * b + half], scale[:, half * (i // 128) + b])


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("routing", ["uniform", *ROUTINGS])
@pytest.mark.parametrize(("tokens", "block_m"), [(1, 8), (30, 16)])
def test_launch_over_the_emulated_operator(layer: MoEWeights, routing: str, tokens: int, block_m: int) -> None:
    b = given(tokens, routing)
    check(run(config(block_m, layer), KERNEL.prepare(layer), b), layer, b)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_in_any_layout(layer: MoEWeights, layout: str) -> None:
    b, relaid = given(9), relayout(layer, layout)
    prepared = KERNEL.prepare(relaid)
    assert torch.equal(run(config(16, layer), prepared, b), run(config(16, layer), KERNEL.prepare(layer), b))
    # Those in the layout that the operator reads are used as they are.
    assert (prepared.w is relaid.gate_up) == (layout == KERNEL.weight_layout(layer.shape(TOP_K)).key)
    assert prepared.w2 is layer.down


@pytest.mark.usefixtures("emulated")
def test_one_workspace_serves_batches_of_any_size(layer: MoEWeights) -> None:
    workspace, prepared = Workspace(), KERNEL.prepare(layer)
    for tokens, block_m, routing in ((40, 8, "uniform"), (3, 128, "padded"), (17, 16, "skewed")):
        b = given(tokens, routing)
        check(run(config(block_m, layer), prepared, b, workspace), layer, b)


@pytest.mark.usefixtures("emulated")
def test_steps_are_the_launch_by_stages(layer: MoEWeights) -> None:
    b, c, prepared = given(9), config(16, layer), KERNEL.prepare(layer)
    out = torch.full_like(b.hidden_states, float("nan"))
    steps = KERNEL.steps(c, prepared, b, out, Workspace())
    assert next(steps) == "alpha_moe/prepare/bm16"
    assert not out.any(), "zeroed, and nothing added yet"
    assert [*steps] == [f"alpha_moe/{c.name}"]
    assert [s.key for s in c.stages] == ["alpha_moe/prepare/bm16", f"alpha_moe/{c.name}"]
    assert torch.equal(out, run(c, prepared, b))


@pytest.mark.usefixtures("emulated")
def test_all_skipped_gives_zeros(layer: MoEWeights) -> None:
    b = given(5)
    b.topk_ids.fill_(-1)
    assert not run(config(8, layer), KERNEL.prepare(layer), b).any()


@pytest.mark.usefixtures("emulated")
def test_output_in_place_of_the_input(layer: MoEWeights) -> None:
    b = given(9)
    wanted = run(config(8, layer), KERNEL.prepare(layer), b)
    KERNEL.launch(config(8, layer), KERNEL.prepare(layer), b, b.hidden_states, Workspace())
    assert torch.equal(b.hidden_states, wanted)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder on the path where alpha_moe is installed, or not."""
    real = alpha_moe_launch.importlib.util.find_spec

    def find(name: str):
        if name != "alpha_moe":
            return real(name)
        found = tmp_path / "alpha_moe.py"
        return alpha_moe_launch.importlib.util.spec_from_file_location(name, found) if found.exists() else None

    monkeypatch.setattr("importlib.util.find_spec", find)
    return tmp_path


@pytest.mark.usefixtures("emulated")
def test_a_layer_uses_it_where_it_is_installed(layer: MoEWeights, h200: Hardware, installed: Path) -> None:
    with pytest.raises(KernelError, match=r"no kernel can compute .*the package alpha_moe is missing; build"):
        MoELayer(layer, TOP_K, h200, [KERNEL])
    (installed / "alpha_moe.py").touch()
    assert KERNEL.unavailable() is None
    moe, b = MoELayer(layer, TOP_K, h200, [KERNEL]), given(9, "padded")
    check(moe(b.hidden_states, b.topk_ids, b.topk_weights), layer, b)
    none = moe(b.hidden_states[:0], b.topk_ids[:0], b.topk_weights[:0])
    assert none.shape == (0, HIDDEN)


@pytest.mark.usefixtures("emulated")
def test_one_copy_serves_it_and_the_triton_path(layer: MoEWeights, h200: Hardware, installed: Path) -> None:
    (installed / "alpha_moe.py").touch()
    triton, b = TritonMoE(), given(9)
    for kernels in ([KERNEL, triton], [triton, KERNEL]):
        moe = MoELayer(layer, TOP_K, h200, kernels)
        assert moe.layouts == ("gate-up-interleaved-8",)
        assert moe.dropped == {}
        for kernel in kernels:
            out = torch.full_like(b.hidden_states, float("nan"))
            candidate = Candidate(kernel.name, kernel.default_config(moe.shape, h200, 9))
            moe.launch(candidate, b, out)
            check(out, layer, b, kernel.name)


def test_absence_does_not_change_the_description(layer: MoEWeights, h200: Hardware, installed: Path) -> None:
    assert "alpha_moe is missing" in (KERNEL.unavailable() or "")
    assert len(usable_configs(KERNEL, layer.shape(TOP_K), h200)) == 152


def test_the_command_line_says_what_is_missing(installed: Path) -> None:
    def kernels(*options: str) -> str:
        return CliRunner().invoke(main, ["kernels", *options], env={"COLUMNS": "200"}, catch_exceptions=False).output

    rows = {row["name"]: row for row in json.loads(kernels("--json"))}
    assert rows["alpha_moe"]["unavailable"] == KERNEL.unavailable()
    assert rows["alpha_moe"]["unsupported"] is None
    shown = kernels()
    assert "runs here" in shown
    assert "alpha_moe cannot run here: the package alpha_moe is missing" in shown
    (installed / "alpha_moe.py").touch()
    assert "alpha_moe cannot run here" not in kernels()


def test_a_broken_plugin_s_complaint_is_shown() -> None:
    class Broken(AlphaMoE):
        def unavailable(self) -> str | None:
            raise ValueError("oops")

    assert why_unavailable(Broken()) == "broken: ValueError: oops"


def test_a_mere_folder_is_no_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if KERNEL.unavailable() is None:
        pytest.skip("alpha_moe is installed")
    (tmp_path / "alpha_moe").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "alpha_moe is missing" in (KERNEL.unavailable() or "")


def test_defaults_are_configurations_and_grow(layer: MoEWeights, h200: Hardware) -> None:
    shape = layer.shape(TOP_K)
    known, blocks = set(KERNEL.configs(shape, h200)), []
    for tokens in (1, 2, 8, 40, 64, 100, 250, 1000, 8000):
        found = KERNEL.default_config(shape, H200, tokens)
        assert found in known
        blocks.append(dict(found.params)["block_m"])
    assert blocks[0] == 8
    assert blocks[-1] == 80
    assert len(set(blocks)) >= 5


@pytest.mark.usefixtures("emulated")
def test_weights_it_refuses(layer: MoEWeights) -> None:
    bias = torch.zeros(EXPERTS, HIDDEN, device=DEVICE)
    mixed = relayout(layer, "gate-up-interleaved-8")
    for bad, message in (
        (replace(layer, activation="gelu_tanh"), "swiglu only, not gelu_tanh"),
        (replace(layer, down_bias=bias), "no biases"),
        (weights(2, 256, 128, "bf16", DEVICE), "fp8 block-scaled weights, not torch.bfloat16"),
        (weights(2, 384, 128, "fp8", DEVICE), "hidden_size 384 is not a multiple of 256"),
        (replace(layer, down=shifted(layer.down)), "down must be contiguous and start at a multiple of 16"),
        (replace(mixed, gate_up=shifted(mixed.gate_up)), "gate_up must be contiguous and start at a multiple of 16"),
    ):
        with pytest.raises(KernelError, match=message):
            KERNEL.prepare(bad)


def shifted(t: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous, 8 bytes off the alignment."""
    buffer = torch.empty(t.nbytes + 8, dtype=torch.uint8, device=t.device)[8:]
    return buffer.view(t.dtype).view(t.shape).copy_(t)


def test_other_devices_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(KernelError, match=r"Hopper \(sm_90\) only; the weights are on cpu"):
        KERNEL.prepare(weights(2, 256, 128, "fp8", "cpu"))


@pytest.mark.usefixtures("emulated")
def test_batches_it_refuses(layer: MoEWeights) -> None:
    prepared, b, c = KERNEL.prepare(layer), given(4), config(8, layer)
    half = Batch(b.hidden_states.half(), b.topk_ids, b.topk_weights)
    with pytest.raises(KernelError, match=r"writes bf16 only: hidden_states are torch.float16"):
        run(c, prepared, half)
    with pytest.raises(KernelError, match=r"must be \[T, 256\]"):
        run(c, prepared, batch(4, TOP_K, EXPERTS, 512, "uniform", DEVICE, torch.bfloat16))
    with pytest.raises(KernelError, match="out must be contiguous"):
        KERNEL.launch(c, prepared, b, shifted(b.hidden_states), Workspace())
    with pytest.raises(KernelError, match=r"out on meta"):
        KERNEL.launch(c, prepared, b, b.hidden_states.to("meta"), Workspace())
    many = Batch(
        torch.zeros(600_000 // TOP_K, HIDDEN, dtype=torch.bfloat16, device=DEVICE),
        torch.zeros(600_000 // TOP_K, TOP_K, dtype=torch.int32, device=DEVICE),
        torch.zeros(600_000 // TOP_K, TOP_K, device=DEVICE),
    )
    with pytest.raises(KernelError, match=r"alpha_moe: bm8-.* takes up to 174746 tokens here, not 200000; split"):
        run(c, prepared, many)


# --- the real operator -----------------------------------------------------------------------------------------------

real = pytest.mark.skipif(
    KERNEL.unavailable() is not None or DEVICE == "cpu" or torch.cuda.get_device_capability() != (9, 0),
    reason=KERNEL.unavailable() or "alpha_moe needs a Hopper GPU",
)


@pytest.fixture
def large() -> MoEWeights:
    return weights(32, 1024, 512, "fp8", "cuda")


def large_batch(tokens: int, routing: str, seed: int = 0) -> Batch:
    return batch(tokens, 8, 32, 1024, routing, "cuda", torch.bfloat16, seed)


@pytest.mark.gpu
@real
@pytest.mark.parametrize("routing", ["uniform", *ROUTINGS])
@pytest.mark.parametrize("tokens", [1, 2, 8, 33, 300, 2048])
def test_gpu_sizes_and_routings(large: MoEWeights, h200: Hardware, routing: str, tokens: int) -> None:
    moe, b = MoELayer(large, 8, h200, [KERNEL]), large_batch(tokens, routing)
    check(moe(b.hidden_states, b.topk_ids, b.topk_weights), large, b)


@pytest.mark.gpu
@real
def test_gpu_every_configuration(large: MoEWeights, h200: Hardware) -> None:
    prepared, b = KERNEL.prepare(large), large_batch(150, "skewed")
    wanted = expected(large, b, quantise=True)
    configs = usable_configs(KERNEL, large.shape(8), h200)
    assert len(configs) == 152
    for c in configs:
        assert error(run(c, prepared, b), wanted) < QUANTISED, c.name


@pytest.mark.gpu
@real
def test_gpu_operator_is_what_is_emulated(large: MoEWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    b = large_batch(24, "padded")
    c = KERNEL.default_config(large.shape(8), H200, 24)
    out = run(c, KERNEL.prepare(large), b)
    monkeypatch.setattr(alpha_moe_launch, "operator", lambda device: emulate)
    assert error(out, run(c, KERNEL.prepare(large), b).float()) < 1.5e-2  # the order of bf16 additions


@pytest.mark.gpu
@real
@pytest.mark.parametrize("tokens", [1, 24, 600])
def test_gpu_graph_follows_new_routings(large: MoEWeights, tokens: int) -> None:
    prepared, b, workspace = KERNEL.prepare(large), large_batch(tokens, "uniform"), Workspace()
    c, out = KERNEL.default_config(large.shape(8), H200, tokens), torch.empty_like(b.hidden_states)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        KERNEL.launch(c, prepared, b, out, workspace)  # loads its code, which a capture may not
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            KERNEL.launch(c, prepared, b, out, workspace)
    for seed, routing in enumerate(ROUTINGS):
        new = large_batch(tokens, routing, seed)
        for name in ("hidden_states", "topk_ids", "topk_weights"):
            getattr(b, name).copy_(getattr(new, name))
        out.fill_(float("nan"))
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        check(out, large, b, routing)
