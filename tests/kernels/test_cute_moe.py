"""The fused kernel on a Hopper GPU, with what is compiled in the cache (RAMP_MOE_CACHE names its folder).

Tests named `sanitize` are few tiny launches of every kind, for compute-sanitizer: one process, `-k sanitize`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import cycle

import pytest
import torch
from moe_cases import H200, ROUTINGS, batch, error, expected, weights
from ramp_moe import KernelError, MoEShape
from ramp_moe.runtime.relayout import relayout
from ramp_moe.spec.kernel import LAYOUTS, usable_configs
from ramp_moe.spec.launchable import Batch, MoEWeights, Workspace
from ramp_moe.testing import KernelConformance
from ramp_moe_adapters.kernels.alpha_moe.kernel import AlphaMoE
from ramp_moe_kernels.cute.aot import Cache, load
from ramp_moe_kernels.cute.aot.toolkit import dsl_folder
from ramp_moe_kernels.cute.config import ELEMENT, Config
from ramp_moe_kernels.cute.kernel import CuteMoE
from ramp_moe_kernels.cute.space import configurations, polymorphic

KERNEL = CuteMoE()
DTYPES = tuple(ELEMENT)
# Against the layer that rounds x and intermediates to fp8, too. 48 bf16 additions to an output make 0.009.
LIMITS = {"fp8": 0.035, "bf16": 0.015}
EXPERTS, TOP_K, HIDDEN, INTER = 16, 4, 1024, 1536  # for every split and every `wide`
BLOCKS = range(8, 129, 8)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(KERNEL.unavailable() is not None, reason=str(KERNEL.unavailable())),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]


@lru_cache
def _compiled(dtype: str) -> tuple[Config, ...]:
    """Every configuration that the cache has an object of, those of several blocks last."""
    shape, cache = MoEShape(EXPERTS, TOP_K, HIDDEN, INTER, dtype), Cache.current()
    found = [(c, cache.look_up(c)) for c in (*configurations(shape), *polymorphic(shape))]
    return tuple(c for c, entry in found if entry is not None and entry.reason is None)


def have(dtype: str, wanted: Sequence[Config] = ()) -> list[Config]:
    """Those of `wanted` that can be launched here, compiled first where the DSL is installed; without any wanted, all
    in the cache. Skips the test where there is none."""
    if not wanted and (cached := [c for c in _compiled(dtype) if not c.smaller]):
        return cached
    found, reason = [], f"no object of a {dtype} configuration in {Cache.current().folder}"
    for c in (replace(c, dtype=dtype) for c in wanted or KINDS):
        try:
            load(c)
            found.append(c)
        except KernelError as e:
            reason = str(e)
    if not found:
        pytest.skip(reason)
    return found


KINDS = (
    Config(8, 32, 8, 3),
    Config(16, 32, 8, 4, wide=2),
    Config(8, 32, 8, 4, split_k=4),
    Config(16, 32, 8, 2, ctas=2, split_k=2),
    Config(24, 64, 4, 2, ctas=2),
    Config(32, 64, 4, 2, ctas=2, pair=True),
    Config(48, 32, 8, 3, wide=2, pair=True),
    Config(64, 32, 8, 3, wide=2, group_m=8),
    Config(16, 32, 8, 3, combine="f32"),
    Config(16, 32, 8, 3, combine="rows"),
)
"""One of every kind."""


@lru_cache(maxsize=2)
def layer(dtype: str, experts: int = EXPERTS, hidden: int = HIDDEN, inter: int = INTER) -> MoEWeights:
    return weights(experts, hidden, inter, dtype, "cuda")


def given(
    tokens: int, routing: str = "uniform", seed: int = 0, top_k: int = TOP_K, of: MoEWeights | None = None
) -> Batch:
    experts, hidden = (EXPERTS, HIDDEN) if of is None else (len(of.down), of.down.shape[1])
    return batch(tokens, top_k, experts, hidden, routing, "cuda", torch.bfloat16, seed)


def run(config: Config, of: MoEWeights, b: Batch, workspace: Workspace | None = None) -> torch.Tensor:
    out = torch.full_like(b.hidden_states, float("nan"))
    described = KERNEL.describe(config, of.shape(b.top_k))
    KERNEL.launch(described, KERNEL.prepare(of), b, out, workspace or Workspace())
    return out


def wanted_of(of: MoEWeights, b: Batch) -> torch.Tensor:
    return expected(of, b, quantise=of.gate_up_scale is not None)


def check(config: Config, of: MoEWeights, b: Batch, what: str = "", workspace: Workspace | None = None) -> None:
    assert error(run(config, of, b, workspace), wanted_of(of, b)) < LIMITS[config.dtype], f"{config.name} {what}"


def single(config: Config) -> tuple[MoEWeights, Batch]:
    """A layer and a batch whose output is one CTA's sum an element: nothing is added in an order that may change."""
    of = layer(config.dtype, 5, 1024, 128 * config.wide)
    return of, given(150, "skewed", top_k=1, of=of)


# --- what it computes ------------------------------------------------------------------------------------------------


class Conformance(KernelConformance):
    kernel = KERNEL
    configs = 12

    @pytest.fixture(autouse=True)
    def objects(self) -> None:
        shape = self.launch_shape
        assert shape is not None
        if dsl_folder() is None and not _compiled(shape.dtype):
            pytest.skip(f"{Cache.current().folder} lacks objects; run ramp-moe kernels build --kernel cute")


class TestConformanceFp8(Conformance):
    launch_shape = MoEShape(16, 4, 512, 512, "fp8")


class TestConformanceBf16(Conformance):
    shapes = (MoEShape(64, 8, 2048, 1024, "bf16"),)
    launch_shape = MoEShape(16, 4, 512, 512, "bf16")


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_configuration(dtype: str, block: int) -> None:
    """Each on two batches, of which it takes routings and sizes in turn with the others."""
    of, workspace = layer(dtype), Workspace()
    batches = cycle(
        (routing, given(tokens, routing, tokens))
        for tokens in (1, 7, 64, 150, 701)
        for routing in ROUTINGS
        if tokens > 1 or routing in ("uniform", "padded")
    )
    own = [c for c in have(dtype) if c.block_m == block]
    if not own:
        pytest.skip(f"no object of a {dtype} configuration with block {block}")
    for config in own:
        for _ in range(2):
            what, b = next(batches)
            check(config, of, b, f"{what} {b.num_tokens}", workspace)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_routings_and_sizes(dtype: str, routing: str) -> None:
    of, workspace = layer(dtype), Workspace()
    for tokens in (1, 2, 33, 300, 2048):  # 2048 x 4 ids are scheduled in two launches
        b = given(tokens, routing, tokens)
        wanted = wanted_of(of, b)
        for config in have(dtype, KINDS):
            got = error(run(config, of, b, workspace), wanted)
            assert got < LIMITS[dtype], f"{config.name} on {tokens} tokens"


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_layers(dtype: str) -> None:
    """Sizes of which only the steps are prescribed, and the worst number of M-tiles: odd, for pairs."""
    for seed, (experts, top_k, hidden, inter) in enumerate(
        ((1, 1, 256, 128), (3, 2, 512, 384), (7, 3, 1280, 640), (60, 4, 256, 256), (128, 6, 768, 896))
    ):
        of = layer(dtype, experts, hidden, inter)
        for config in have(dtype, KINDS):
            if inter % (128 * config.wide) or config.split_k * config.block_k > hidden:
                continue
            for tokens in (1, 5, 97):
                check(config, of, given(tokens, "uniform", seed, top_k, of), f"{inter} x {hidden}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_ids_skipped(dtype: str) -> None:
    b = given(5)
    b.topk_ids.fill_(-1)
    for config in have(dtype, KINDS):
        assert not run(config, layer(dtype), b).any(), config.name


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_tokens(dtype: str) -> None:
    b = given(3)
    none = Batch(b.hidden_states[:0], b.topk_ids[:0], b.topk_weights[:0])
    for config in have(dtype, KINDS):
        assert run(config, layer(dtype), none).shape == (0, HIDDEN)


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place(dtype: str) -> None:
    of, workspace = layer(dtype), Workspace()
    for config in have(dtype, KINDS):
        b = given(40, "skewed")
        wanted = wanted_of(of, b)
        KERNEL.launch(KERNEL.describe(config, of.shape(TOP_K)), KERNEL.prepare(of), b, b.hidden_states, workspace)
        assert error(b.hidden_states, wanted) < LIMITS[dtype], config.name


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_in_any_layout_and_without_a_copy(dtype: str) -> None:
    of, b = layer(dtype, 5, 512, 256), given(60, "skewed", top_k=2, of=layer(dtype, 5, 512, 256))
    for config in have(dtype, [Config(16, 32, 8, 3, combine="rows")]):
        wanted = run(config, of, b)
        check(config, of, b)
        for order in LAYOUTS:
            relaid = relayout(of, order)
            before = torch.cuda.memory_allocated()
            prepared = KERNEL.prepare(relaid)
            assert torch.cuda.memory_allocated() - before < 4096
            assert prepared.down.data_ptr() == relaid.down.data_ptr()
            assert torch.equal(run(config, relaid, b), wanted), order


def test_prepared_weights_have_what_loads_objects() -> None:
    """A first launch does not wait for an import, which takes a tenth of a second."""
    KERNEL.prepare(layer("fp8"))
    assert "tvm_ffi" in sys.modules


# --- how exactly -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_float32_adds_more_exactly(dtype: str) -> None:
    """Twelve parts of four experts each."""
    of, b = layer(dtype), given(200)
    by = {c.combine: run(c, of, b) for c in have(dtype, [Config(16, 32, 8, 3, combine=k) for k in ("bf16", "f32")])}
    if len(by) < 2:
        pytest.skip("needs both combines")
    wanted = wanted_of(of, b)
    assert error(by["f32"], wanted) < error(by["bf16"], wanted)


def test_as_exact_as_alpha_moe() -> None:
    alpha = AlphaMoE()
    if reason := alpha.unavailable():
        pytest.skip(reason)
    of, b = layer("fp8"), given(150, "skewed")
    exact, theirs = expected(of, b, quantise=False), torch.empty_like(b.hidden_states)
    config = usable_configs(alpha, of.shape(TOP_K), H200)[0]
    alpha.launch(config, alpha.prepare(relayout(of, alpha.weight_layout(of.shape(TOP_K)).key)), b, theirs, Workspace())
    for config in have("fp8", KINDS):
        assert error(run(config, of, b), exact) < 1.1 * error(theirs, exact), config.name


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_added_in_order(dtype: str) -> None:
    """Bit by bit the same, again and again and on other streams at once."""
    of, b = layer(dtype), given(300, "skewed")
    rows = [Config(16, 32, 8, 3, combine="rows"), Config(32, 32, 8, 3, wide=2, combine="rows")]
    for config in have(dtype, rows):
        workspace = Workspace()
        wanted, outs = run(config, of, b), []
        for stream in [torch.cuda.Stream() for _ in range(4)]:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                outs += [run(config, of, b, workspace) for _ in range(3)]
        torch.cuda.synchronize()
        assert all(torch.equal(out, wanted) for out in outs), config.name


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cta_s_sums_repeat_bit_by_bit(dtype: str) -> None:
    """Also over clusters: the CTAs of a split reduction have the same intermediates, each time."""
    for config in have(dtype, KINDS):
        of, b = single(config)
        outs = [run(config, of, b) for _ in range(5)]
        assert all(torch.equal(out, outs[0]) for out in outs), config.name
        check(config, of, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_order_and_sharing_do_not_change_a_bit(dtype: str) -> None:
    """Pairs load weights together, and group_m M-tiles follow one another: the same sums all the same."""
    for kind in (Config(32, 32, 8, 3, pair=True), Config(64, 32, 8, 3, wide=2, group_m=8)):
        both = have(dtype, [kind, replace(kind, pair=False, group_m=1)])
        if len(both) < 2:
            pytest.skip(f"needs {kind.name} and the plain one")
        of, b = single(both[0])
        assert torch.equal(run(both[0], of, b), run(both[1], of, b)), kind.name


# --- graphs, and one launch of several blocks ------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 24, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_graph_follows_new_routings(dtype: str, tokens: int) -> None:
    of, side = layer(dtype), torch.cuda.Stream()
    prepared = KERNEL.prepare(of)
    for config in have(dtype, KINDS):
        described, b = KERNEL.describe(config, of.shape(TOP_K)), given(tokens)
        out, graph, workspace = torch.empty_like(b.hidden_states), torch.cuda.CUDAGraph(), Workspace()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            KERNEL.launch(described, prepared, b, out, workspace)  # loads its code, which a capture may not
            side.synchronize()
            with torch.cuda.graph(graph, stream=side):
                KERNEL.launch(described, prepared, b, out, workspace)
        for seed, routing in enumerate(ROUTINGS):
            new = given(tokens, routing, seed)
            for name in ("hidden_states", "topk_ids", "topk_weights"):
                getattr(b, name).copy_(getattr(new, name))
            out.fill_(float("nan"))
            torch.cuda.synchronize()
            graph.replay()
            torch.cuda.synchronize()
            assert error(out, wanted_of(of, new)) < LIMITS[dtype], f"{config.name} {routing}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_launch_is_any_of_its_blocks(dtype: str) -> None:
    """Bit by bit what each configuration alone computes; one workspace, so that each finds what another left."""
    whole = [c for c in _compiled(dtype) if c.smaller]
    if not whole:
        pytest.skip("no object of several blocks")
    for c in whole:
        of, b = single(c)
        prepared, workspace = KERNEL.prepare(of), Workspace()
        alone = have(dtype, [c.of(block) for block in (c.blocks[-1], *c.blocks[:-1])])
        described = [KERNEL.describe(a, of.shape(1)) for a in alone]
        for i, config in enumerate(alone):
            out = torch.full_like(b.hidden_states, float("nan"))
            choice = torch.tensor([i], dtype=torch.int32, device="cuda")
            KERNEL.launch_inline(described, choice, prepared, b, out, workspace)
            assert torch.equal(out, run(config, of, b)), config.name


# --- under compute-sanitizer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_sanitize_kinds(dtype: str) -> None:
    """Three tokens and an id skipped: padded rows, M-tiles without work, and a pair of two experts."""
    of = layer(dtype, 3, 1024, 256)
    b = given(3, "padded", top_k=2, of=of)
    for config in have(dtype, KINDS):
        check(config, of, b)


def test_sanitize_pairs() -> None:
    """M-tiles of one expert, which share their weights, and one that is left over."""
    of = layer("fp8", 2, 512, 256)
    b = given(70, "one-expert", top_k=1, of=of)
    for config in have("fp8", [c for c in KINDS if c.pair]):
        check(config, of, b)
