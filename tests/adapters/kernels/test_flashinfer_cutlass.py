"""FlashInfer's tactics by their numbers and grids, its launch over a fake of its package, how its module is compiled;
the real one on a Hopper GPU that has it."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import fake_flashinfer
import pytest
import torch
from click.testing import CliRunner
from fake_flashinfer import FakeFlashInfer
from moe_cases import H200, ROUTINGS, batch, error, expected, weights
from ramp_moe import Hardware, KernelError, MoEShape, Registry, expert_histogram, generate
from ramp_moe.cli import main
from ramp_moe.runtime.relayout import relayout
from ramp_moe.spec.kernel import usable_configs
from ramp_moe.spec.launchable import Batch, MoEWeights, Workspace
from ramp_moe_adapters.kernels.flashinfer_cutlass import build as flashinfer_cutlass_build
from ramp_moe_adapters.kernels.flashinfer_cutlass import kernel as flashinfer_cutlass
from ramp_moe_adapters.kernels.flashinfer_cutlass import launch as flashinfer_cutlass_launch
from ramp_moe_adapters.kernels.flashinfer_cutlass.config import fp8_tile, pairs, tactics, worthwhile
from ramp_moe_adapters.kernels.flashinfer_cutlass.kernel import FlashInferCutlass

KERNEL = FlashInferCutlass()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXPERTS, TOP_K, HIDDEN, INTER = 6, 3, 256, 128
ROUNDED = 5e-3


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeFlashInfer:
    monkeypatch.setattr(flashinfer_cutlass_launch, "check_hopper", lambda kernel, device: None)
    fake_flashinfer.tools(tmp_path, monkeypatch)
    monkeypatch.setenv("TRTLLM_DG_CACHE_DIR", str(tmp_path / "cubins"))
    return fake_flashinfer.install(monkeypatch, tmp_path)


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder whose flashinfer is the installed one, nothing of it compiled, with a toolkit."""
    fake_flashinfer.write(tmp_path)
    fake_flashinfer.tools(tmp_path, monkeypatch)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(tmp_path / "base"))
    monkeypatch.setenv("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
    monkeypatch.delenv("FLASHINFER_DISABLE_JIT", raising=False)
    monkeypatch.setattr(flashinfer_cutlass_build, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(flashinfer_cutlass_build, "version_of", lambda package: fake_flashinfer.VERSION)
    return tmp_path


def layer(dtype: str = "bf16", **given) -> MoEWeights:
    return weights(EXPERTS, HIDDEN, INTER, dtype, DEVICE, **given)


def given(tokens: int, routing: str = "uniform") -> Batch:
    return batch(tokens, TOP_K, EXPERTS, HIDDEN, routing, DEVICE, torch.bfloat16)


def run(of: MoEWeights, b: Batch, prepared=None, workspace: Workspace | None = None) -> torch.Tensor:
    config = KERNEL.default_config(of.shape(b.top_k), H200, b.num_tokens)
    out = torch.full_like(b.hidden_states, float("nan"))
    KERNEL.launch(config, prepared or KERNEL.prepare(of), b, out, workspace or Workspace())
    return out


# --- tactics and grids -----------------------------------------------------------------------------------------------


def test_tactics_are_as_many_as_flashinfer_has_and_numbered_as_there() -> None:
    one, two = tactics(1), tactics(2)
    assert (len(one), len(two)) == (45, 81)
    assert [t.index for t in one] == list(range(45))
    assert [t.index for t in two] == list(range(45, 126))
    assert len({t.name for t in one}) == 45
    assert len({t.name for t in two}) == 81
    # The order that its source has: tiles, of each the clusters; plain, finalised, then both swapped; Ampere last.
    assert [one[i].name for i in (0, 1, 6, 9, 14, 18, 19, 35, 36, 44)] == [
        *("t128w16-c1x1", "t128w16-c2x1", "t128w128-c1x1", "t128w128-c2x2", "t256w128-c1x1"),
        *("t16w128-c1x1-swap", "t16w128-c1x2-swap", "t128w256-c2x2-swap", "t32w128-sm80-st2", "t128w128-sm80-st4"),
    ]
    assert [two[i].name for i in (0, 18, 36, 54, 72)] == [
        *("t128w16-c1x1", "t128w16-c1x1-fin", "t16w128-c1x1-swap", "t16w128-c1x1-swap-fin", "t32w128-sm80-st2"),
    ]
    assert Counter(t.finalised for t in two) == {False: 45, True: 36}


def test_pairs_that_are_measured() -> None:
    kept = list(pairs(ampere=True))
    assert len(kept) == 123
    assert len(list(pairs(ampere=False))) == 114
    assert all(up.tokens == down.tokens for up, down in kept)
    assert {up.tokens for up, _ in kept} == {16, 32, 64, 128, 256}
    assert all(t.weights >= 128 and t.cluster != (2, 2) for pair in kept for t in pair)
    for gemm in (1, 2):  # what is left out has another's geometry, too few weight rows or four CTAs a cluster
        left = set(tactics(gemm)) - set(worthwhile(gemm))
        twins = {(t.tokens, t.weights, t.cluster, t.finalised) for t in worthwhile(gemm) if not t.stages}
        for t in left:
            twin = t.swapped and (t.tokens, t.weights, t.cluster, t.finalised) in twins
            assert t.weights < 128 or t.cluster == (2, 2) or twin


def test_grids_count_the_tiles(registry: Registry, h200: Hardware) -> None:
    shape = registry.shape("qwen3-30b-a3b", "bf16")
    configs = usable_configs(KERNEL, shape, h200)
    assert len(configs) == 123
    histogram = expert_histogram(generate("zipf1.2", 500, 128, 8, seed=1), 128)
    for config in configs:
        up, down = (
            tactics(gemm)[i - first] for (_, i), gemm, first in zip(config.params, (1, 2), (0, 45), strict=True)
        )
        for tactic, grid, rows in ((up, config.gemms[0], 2 * 768), (down, config.gemms[1], 2048)):
            # Of gate and up, 768 rows each, an Ampere CTA takes so many of both.
            columns = 768 if tactic.stages and rows == 2 * 768 else rows
            tiles = sum(-(-h // tactic.tokens) * -(-columns // tactic.weights) for h in histogram.tolist())
            assert int(grid.logical(histogram)) == tiles
            assert grid.launched(500 * 8, 128) == grid.ctas_per_sm * 132
        kinds = [s.kind for s in config.stages]
        assert ("zero" in kinds) == down.finalised == ("combine" not in kinds)
        assert ("activation" in kinds) == (up.stages == 0)


def test_ampere_kernels_share_an_sm_where_they_fit(registry: Registry, h200: Hardware) -> None:
    resident = {
        dict(c.params)["gemm1"]: [g.ctas_per_sm for g in c.gemms]
        for c in KERNEL.configs(registry.shape("olmoe-1b-7b", "bf16"), h200)
        if "sm80" in c.name
    }
    assert len(resident) == 9
    assert resident[36] == [2, 2]  # 32 tokens, two stages
    assert resident[44] == [1, 1]  # 128 tokens, four stages


def test_ampere_is_left_out_where_it_would_not_apply_the_activation(h200: Hardware) -> None:
    configs = KERNEL.configs(MoEShape(8, 2, 72, 200, "bf16"), h200)
    assert len(configs) == 114
    assert not [c for c in configs if "sm80" in c.name]


@pytest.mark.parametrize(
    ("tokens", "n", "experts", "tile"),
    [
        (1, 2048, 64, (16, 128, True)),
        (16, 2048, 64, (16, 128, True)),
        (24, 2048, 64, (24, 128, True)),
        (31, 2048, 64, (32, 128, True)),
        (32, 2048, 64, (64, 128, False)),
        (64, 2048, 64, (64, 128, False)),
        (65, 2048, 64, (128, 128, False)),
        (100, 7168, 8, (128, 112, False)),  # 512 tiles in 4 waves instead of 448 in 4: the fuller last one
    ],
)
def test_fp8_tile(tokens: int, n: int, experts: int, tile: tuple[int, int, bool]) -> None:
    found = fp8_tile(tokens, n, experts, 132)
    assert (found.tokens, found.weights, found.swapped) == tile


@pytest.mark.parametrize("model", ["olmoe-1b-7b", "qwen3-30b-a3b", "deepseek-v3-tp8", "mixtral-8x7b-tp4"])
def test_the_fp8_grid_has_the_tokens_tiles_of_any_batch(model: str, registry: Registry, h200: Hardware) -> None:
    """The described tile is that of many tokens; where there are fewer, one tile has room for all of an expert's."""
    shape = registry.shape(model, "fp8")
    (config,) = KERNEL.configs(shape, h200)
    for tokens in (1, 7, 20, 31, 40, 64, 100, 128, 600):
        for kind in ("uniform", "one-hot"):
            ids = generate(kind, tokens, shape.num_experts, shape.top_k, seed=tokens)
            histogram = expert_histogram(ids, shape.num_experts).clip(max=tokens)
            for grid in config.gemms:
                tile = fp8_tile(tokens, grid.n, shape.num_experts, h200.num_sms)
                assert int(grid.m_tiles(histogram)) == sum(-(-h // tile.tokens) for h in histogram.tolist())


def test_fp8_without_its_deep_gemm(registry: Registry, h200: Hardware, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = registry.shape("olmoe-1b-7b", "fp8")
    assert [c.name for c in KERNEL.configs(shape, h200)] == ["deepgemm"]
    monkeypatch.setenv("TRTLLM_DG_ENABLED", "0")
    (config,) = KERNEL.configs(shape, h200)
    assert config.name == "t128w64"
    assert config == KERNEL.default_config(shape, h200, 17)
    assert [g.launched(100, 64) for g in config.gemms] == [64 * 2048 // 64] * 2


@pytest.mark.parametrize(
    ("shape", "device", "reason"),
    [
        (MoEShape(8, 2, 256, 256, "bf16"), "a100-sxm", "described for Hopper"),
        (MoEShape(8, 2, 256, 256, "fp16"), "h200", "bf16 or fp8 block-scaled weights, not fp16"),
        (MoEShape(8, 2, 256, 100, "bf16"), "h200", "intermediate_size 100 is not a multiple of 8"),
        (MoEShape(8, 2, 260, 256, "bf16"), "h200", "hidden_size 260 is not a multiple of 8"),
        (MoEShape(8, 2, 256, 192, "fp8"), "h200", "intermediate_size 192 is not a multiple of the fp8 scale block"),
    ],
)
def test_reasons(shape: MoEShape, device: str, reason: str, registry: Registry) -> None:
    assert reason in (KERNEL.unsupported(shape, registry.device(device)) or "")


@pytest.mark.parametrize(("tokens", "block"), [(1, 16), (128, 16), (256, 32), (600, 128), (8192, 128)])
def test_default_is_one_of_the_configurations(tokens: int, block: int, registry: Registry, h200: Hardware) -> None:
    shape = registry.shape("olmoe-1b-7b", "bf16")
    config = KERNEL.default_config(shape, h200, tokens)
    assert config in KERNEL.configs(shape, h200)
    assert {g.block_m for g in config.gemms} == {block}
    assert "zero" in [s.kind for s in config.stages]


# --- launch over the fake --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.usefixtures("fake")
def test_launch_over_the_fake(dtype: str, routing: str) -> None:
    of, b = layer(dtype), given(70, routing)
    for layout in ("gate-first", "up-first"):
        assert error(run(relayout(of, layout), b), expected(of, b, quantise=dtype == "fp8")) < ROUNDED


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.usefixtures("fake")
def test_biases_are_passed_on(dtype: str) -> None:
    of, b = layer(dtype, bias=True), given(9)
    assert error(run(of, b), expected(of, b, quantise=dtype == "fp8")) < ROUNDED
    of = MoEWeights(of.gate_up, of.down, of.gate_up_scale, of.down_scale, None, of.down_bias)
    assert error(run(of, b), expected(of, b, quantise=dtype == "fp8")) < ROUNDED


def test_a_launch_forces_its_tactics(fake: FakeFlashInfer, h200: Hardware) -> None:
    of, b = layer(), given(5)
    prepared, out = KERNEL.prepare(of), torch.empty_like(b.hidden_states)
    for config in usable_configs(KERNEL, of.shape(TOP_K), h200)[::20]:
        assert list(KERNEL.steps(config, prepared, b, out, Workspace())) == []
        assert fake.calls[-1] == [i for _, i in config.params]


def test_all_memory_is_the_workspaces(fake: FakeFlashInfer) -> None:
    workspace = Workspace()
    run(layer(), given(5), workspace=workspace)
    owned = {t.data_ptr() for t in workspace._buffers.values()}
    assert {t.data_ptr() for t in fake.allocated} <= owned
    before = workspace.bytes
    run(layer(), given(5), workspace=workspace)
    assert workspace.bytes == before


def test_fp8_asks_for_the_workspace_each_time(fake: FakeFlashInfer) -> None:
    """Since a larger batch before makes a smaller one's larger, whichever layer it was of."""
    of = layer("fp8")
    prepared = KERNEL.prepare(of)
    for tokens in (4, 300, 4):
        run(of, given(tokens), prepared)
    assert fake.largest == 300


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "alone"),
    [(256, 8, 64, True), (257, 8, 64, False), (8, 3, 64, False), (128, 8, 256, True), (200, 8, 256, False)],
)
def test_routing_in_one_block(tokens: int, top_k: int, experts: int, alone: bool) -> None:
    assert flashinfer_cutlass_launch.routed_in_one_block(tokens, top_k, experts) == alone


def test_experts_that_a_token_names_twice_are_merged() -> None:
    b = given(3)
    b.topk_ids.copy_(torch.tensor([[4, 4, 4], [0, -1, 0], [5, 0, 1]]))
    ids, weight = flashinfer_cutlass_launch.merged(b, Workspace())
    assert ids.tolist() == [[4, -1, -1], [0, -1, -1], [5, 0, 1]]
    torch.testing.assert_close(weight[0, 0], b.topk_weights[0].sum())
    torch.testing.assert_close(weight[1, 0], b.topk_weights[1, [0, 2]].sum())
    assert torch.equal(weight[2], b.topk_weights[2])


def test_other_tactics_are_refused_with_both_numbers(fake: FakeFlashInfer) -> None:
    fake.counts = 45, 72
    with pytest.raises(KernelError, match=r"45 \+ 72 tactics for bf16, this adapter knows the order of 45 \+ 81"):
        KERNEL.prepare(layer())
    KERNEL.prepare(layer("fp8"))  # which has none


def test_another_interface_is_refused(fake: FakeFlashInfer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake, "cutlass_fused_moe", lambda input, output: None)
    with pytest.raises(KernelError, match=r"cutlass_fused_moe does not take .*profile_ids"):
        KERNEL.prepare(layer())


@pytest.mark.usefixtures("fake")
def test_weights_that_it_cannot_take() -> None:
    with pytest.raises(KernelError, match="swiglu only, not gelu_tanh"):
        KERNEL.prepare(layer(activation="gelu_tanh"))
    with pytest.raises(KernelError, match=r"bf16 or fp8 block-scaled weights, not torch\.float16"):
        KERNEL.prepare(layer("fp16"))
    with pytest.raises(KernelError, match="intermediate_size 100 must be multiples of 8"):
        KERNEL.prepare(weights(2, 64, 100, "bf16", DEVICE))


@pytest.mark.usefixtures("fake")
def test_fp8_compiles_its_tiles_when_it_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRTLLM_DG_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(KernelError, match=r"cannot write its cache .*; set TRTLLM_DG_CACHE_DIR"):
        KERNEL.prepare(layer("fp8"))
    monkeypatch.setenv("TRTLLM_DG_NVCC_COMPILER", "/nowhere/nvcc")
    with pytest.raises(KernelError, match="its fp8 GEMMs with nvcc, and does not find /nowhere/nvcc"):
        KERNEL.prepare(layer("fp8"))
    KERNEL.prepare(layer())
    monkeypatch.setenv("TRTLLM_DG_ENABLED", "0")
    KERNEL.prepare(layer("fp8"))


@pytest.mark.usefixtures("fake")
def test_batches_that_it_cannot_take() -> None:
    of = layer()
    prepared, b = KERNEL.prepare(of), given(4)
    config = KERNEL.default_config(of.shape(TOP_K), H200, 4)
    half = Batch(b.hidden_states.half(), b.topk_ids, b.topk_weights)
    with pytest.raises(KernelError, match="writes bf16 only"):
        KERNEL.launch(config, prepared, half, torch.empty_like(half.hidden_states), Workspace())
    with pytest.raises(KernelError, match=r"must be \[T, 256\]"):
        KERNEL.launch(config, prepared, b, b.hidden_states[:2], Workspace())
    odd = torch.empty(4 * HIDDEN + 1, dtype=torch.bfloat16, device=DEVICE)[1:].view(4, HIDDEN)
    with pytest.raises(KernelError, match="out must be contiguous and start at a multiple of 16 bytes"):
        KERNEL.launch(config, prepared, b, odd, Workspace())


def test_without_hopper() -> None:
    if DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0):
        pytest.skip("this is Hopper")
    with pytest.raises(KernelError, match=r"Hopper \(sm_90\) only"):
        KERNEL.prepare(layer())


# --- the module and its compilation ----------------------------------------------------------------------------------


def test_unavailable(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reason() -> str:
        return KERNEL.unavailable() or ""

    monkeypatch.setattr(flashinfer_cutlass, "is_installed", lambda name: name != "flashinfer")
    assert reason() == "flashinfer missing; pip install 'ramp-moe[flashinfer]'"
    monkeypatch.setattr(flashinfer_cutlass, "is_installed", lambda name: True)
    monkeypatch.setattr(flashinfer_cutlass, "version_of", lambda package: "0.8.0")
    assert "the tactics of flashinfer 0.8.0 are not known" in reason()
    monkeypatch.setattr(flashinfer_cutlass, "version_of", lambda package: fake_flashinfer.VERSION)
    assert reason() == ""

    (source / "file").touch()
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(source / "file"))
    assert "cannot write its cache" in reason()
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(source / "base"))
    (source / "toolkit/bin/nvcc").unlink()
    assert "with nvcc, and finds none" in reason()
    monkeypatch.setenv("FLASHINFER_DISABLE_JIT", "1")
    assert "FLASHINFER_DISABLE_JIT forbids" in reason()
    prebuilt = source / "flashinfer/data/aot/fused_moe_90/fused_moe_90.so"
    prebuilt.parent.mkdir(parents=True)
    prebuilt.touch()
    assert reason() == ""


@pytest.mark.slow
def test_build(source: Path, registry: Registry, h200: Hardware) -> None:
    shape = registry.shape("olmoe-1b-7b", "bf16")
    names, told = tuple(c.name for c in KERNEL.configs(shape, h200)), []
    built = KERNEL.build(shape, h200, lambda *progress: told.append(progress), jobs=3)
    assert (built.compiled, built.reused, built.dropped) == (names, (), {})
    assert built.folder.name == "fused_moe_90"
    assert {f.read_text() for f in built.folder.glob("*.o")} == {"3"}
    assert all(total == 4 for _, total, _ in told)
    again = KERNEL.build(shape, h200, lambda *progress: None)
    assert (again.compiled, again.reused) == ((), names)
    assert again.bytes == len("library")
    assert flashinfer_cutlass_build.ready()


@pytest.mark.slow
def test_build_from_the_command_line(source: Path) -> None:
    args = ["kernels", "build", "--model", "olmoe-1b-7b", "--dtype", "fp8", "--kernel", "flashinfer_cutlass", "--json"]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert row["compiled"] == ["deepgemm"]
    (source / "toolkit/bin/nvcc").unlink()
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 2
    assert "finds none" in result.output


def test_a_build_without_the_package_says_how_to_install_it(
    source: Path, registry: Registry, h200: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flashinfer_cutlass_build, "is_installed", lambda name: name != "flashinfer")
    with pytest.raises(KernelError, match=r"^flashinfer missing; pip install 'ramp-moe\[flashinfer\]'$"):
        KERNEL.build(registry.shape("olmoe-1b-7b", "bf16"), h200, lambda *progress: None)


@pytest.mark.slow
def test_a_unit_that_does_not_compile(source: Path, registry: Registry, h200: Hardware) -> None:
    (source / "base").mkdir()
    (source / "base" / "bad").touch()
    with pytest.raises(KernelError, match=r"(?s)cannot be compiled:.*unit0.cu: error: no such thing"):
        KERNEL.build(registry.shape("olmoe-1b-7b", "bf16"), h200, lambda *progress: None)
    assert not flashinfer_cutlass_build.ready()


@pytest.mark.slow
def test_an_interrupted_build_goes_on(source: Path, registry: Registry, h200: Hardware) -> None:
    fake_flashinfer.write(source, units=50, seconds=0.1)
    command = [sys.executable, "-m", "ramp_moe.cli", "kernels", "build", "--model", "olmoe-1b-7b"]
    process = subprocess.Popen([*command, "--kernel", "flashinfer_cutlass"], stderr=subprocess.PIPE, text=True)
    folder = source / "base/.cache/flashinfer" / fake_flashinfer.VERSION / "90a/cached_ops/fused_moe_90"
    deadline = time.monotonic() + 300
    while len(list(folder.glob("*.o"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert "the same command goes on from it" in errors
    left = {f.name: f.stat().st_mtime_ns for f in folder.glob("*.o")}
    assert 3 <= len(left) < 50, "it went on compiling"
    time.sleep(0.3)
    assert len(list(folder.glob("*.o"))) == len(left), "it went on compiling"

    fake_flashinfer.write(source, units=50)
    KERNEL.build(registry.shape("olmoe-1b-7b", "bf16"), h200, lambda *progress: None)
    now = {f.name: f.stat().st_mtime_ns for f in folder.glob("*.o")}
    assert len(now) == 50
    assert {name: now[name] for name in left} == left


@pytest.mark.slow
def test_the_first_use_says_what_takes_so_long(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    core = FakeFlashInfer()
    importer = SimpleNamespace(import_module={"flashinfer.fused_moe.core": core}.__getitem__)
    monkeypatch.setattr(flashinfer_cutlass_launch, "importlib", importer)
    assert flashinfer_cutlass_launch.library() is core
    told = capsys.readouterr().err
    assert "ramp-moe kernels build --kernel flashinfer_cutlass" in told
    assert "of 4 units compiled" in told
    assert flashinfer_cutlass_launch.library() is core
    assert capsys.readouterr().err == ""


def test_prune_deletes_what_other_versions_compiled(source: Path) -> None:
    ops = source / "base/.cache/flashinfer"
    for version in ("0.6.1", fake_flashinfer.VERSION):
        for name in ("fused_moe_90", "norm"):
            folder = ops / version / "90a/cached_ops" / name
            folder.mkdir(parents=True)
            (folder / "a.o").write_bytes(b"1234")
    assert KERNEL.prune() == 4
    left = sorted(str(f.relative_to(ops)) for f in ops.rglob("*.o"))
    assert left == [
        "0.6.1/90a/cached_ops/norm/a.o",
        *(f"{fake_flashinfer.VERSION}/90a/cached_ops/{name}/a.o" for name in ("fused_moe_90", "norm")),
    ]


# --- the real one ----------------------------------------------------------------------------------------------------

real = pytest.mark.skipif(KERNEL.unavailable() is not None, reason=str(KERNEL.unavailable()))


def real_layer(dtype: str) -> MoEWeights:
    return weights(16, 512, 256, dtype, DEVICE)


@real
@pytest.mark.gpu
def test_every_pair_of_tactics_computes_the_layer(h200: Hardware) -> None:
    """Of those that are measured, over the batch sizes where the routing changes."""
    of = real_layer("bf16")
    shape, prepared, workspace = of.shape(4), KERNEL.prepare(of), Workspace()
    for tokens in (3, 200, 300):
        b = batch(tokens, 4, 16, 512, "skewed", DEVICE, torch.bfloat16)
        wanted = expected(of, b, quantise=False)
        for config in usable_configs(KERNEL, shape, h200):
            out = torch.full_like(b.hidden_states, float("nan"))
            KERNEL.launch(config, prepared, b, out, workspace)
            assert error(out, wanted) < 0.01, config.name


@real
@pytest.mark.gpu
def test_tactics_are_what_their_numbers_say(h200: Hardware) -> None:
    """By the kernels that they launch: the MMA's N, and who finalises."""
    of = real_layer("bf16")
    shape, prepared, workspace = of.shape(4), KERNEL.prepare(of), Workspace()
    b = batch(100, 4, 16, 512, "uniform", DEVICE, torch.bfloat16)
    out = torch.empty_like(b.hidden_states)
    ups, downs = tactics(1)[:36], tactics(2)[:72]
    for up, down in zip(itertools.cycle(ups), downs, strict=False):
        config = KERNEL.describe(up, down, shape, h200)
        KERNEL.launch(config, prepared, b, out, workspace)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            KERNEL.launch(config, prepared, b, out, workspace)
            torch.cuda.synchronize()
        names = [e.name for e in sorted(profile.events(), key=lambda e: e.time_range.start)]
        found = [int(mma[1]) for name in names if (mma := re.search(r"MMA_64x(\d+)x16_F32BF16BF16", name))]
        assert found == [t.tokens if t.swapped else t.weights for t in (up, down)], config.name
        assert any("finalizeMoeRouting" in name for name in names) != down.finalised, config.name


@real
@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 20, 40, 100, 300])
def test_fp8_computes_the_layer(tokens: int) -> None:
    """One batch for each of its tiles."""
    of, b = real_layer("fp8"), batch(tokens, 4, 16, 512, "uniform", DEVICE, torch.bfloat16)
    assert error(run(of, b), expected(of, b, quantise=False)) < 0.06


@real
@pytest.mark.gpu
def test_biases() -> None:
    of = weights(16, 512, 256, "bf16", DEVICE, bias=True)
    b = batch(50, 4, 16, 512, "uniform", DEVICE, torch.bfloat16)
    prepared, workspace, wanted = KERNEL.prepare(of), Workspace(), expected(of, b, quantise=False)
    for config in usable_configs(KERNEL, of.shape(4), H200)[::7]:
        out = torch.full_like(b.hidden_states, float("nan"))
        KERNEL.launch(config, prepared, b, out, workspace)
        assert error(out, wanted) < 0.01, config.name
