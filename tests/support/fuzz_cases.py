"""Random layers on random batches, each judged by a plain reference in torch and float32 that is written here.

A Variant, which determines what is compiled, is drawn a few times per run, since compiling takes most of the time.
Sizes, tokens, routing and weights are drawn for every layer. The seed of the run and the number of a layer reproduce
it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from graph_cases import priced
from ramp_moe import Candidate, CostModel, Hardware, KernelConfig, MoEShape, RampMoEError
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.runtime.relayout import relayout
from ramp_moe.spec.kernel import LAYOUTS
from ramp_moe.spec.launchable import ACTIVATIONS, LaunchableKernel, MoEWeights
from ramp_moe.testing.launch import Filled
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "fp16": torch.float16}
TOP_K = (1, 2, 3, 4, 6, 8, 22, 32)
"""Values of top_k that are drawn. The combine is compiled for each."""
NAN_BYTE, GUARD = 0xFF, 7.0
LIMIT = 1.5
"""Limit of the clamped activation. Many values exceed it."""
REFERENCE_ELEMENTS = 2**27
SHAPES, FEW_SHAPES = 40, 4
"""Number of shapes per variant, and the number if a kernel is compiled, or a cost model made, for each shape."""

HALF_ULP = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
"""Largest relative error of rounding to a dtype."""
E4M3 = 0.026
"""Root mean square of the relative error of rounding to e4m3. With 3 mantissa bits, errors are evenly spread up to
2^-4."""


@dataclass(frozen=True)
class Size:
    """Bounds of the sizes that are drawn: multiples of 16, or of 128 if fp8 needs that."""

    most_experts: int = 512
    most_units: int = 40
    most_tokens: int = 5000
    most_weights: int = 2**26
    unit: int = 256
    """Unit of aligned hidden sizes."""


TINY = Size(most_experts=6, most_units=4, most_tokens=12, most_weights=2**18, unit=128)


@dataclass(frozen=True)
class Variant:
    """A kernel, and the properties that its compiled code depends on.

    config       name of the configuration to run, None for the static default
    dispatched   whether a cost model chooses among three configurations instead
    """

    kernel: LaunchableKernel
    dtype: str
    hidden_dtype: torch.dtype
    activation: str
    bias: bool
    layout: str
    shapes: tuple[MoEShape, ...]
    config: str | None = None
    dispatched: bool = False

    @property
    def name(self) -> str:
        how = "dispatched" if self.dispatched else self.config or "default"
        return f"{self.kernel.name} {how} {self.dtype} {self.activation} {self.layout}{' bias' if self.bias else ''}"


@dataclass
class Tally:
    right: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    worst: dict[str, float] = field(default_factory=dict)
    """The largest error over the allowed error, by kernel and dtype."""

    def __str__(self) -> str:
        refused = "; ".join(f"{n} {reason}" for reason, n in self.refused.most_common(8))
        worst = ", ".join(f"{name} {share:.2f}" for name, share in sorted(self.worst.items()))
        total = self.right + self.refused.total() + len(self.wrong)
        return (
            f"{total} layers: {self.right} right, {self.refused.total()} refused ({refused}), {len(self.wrong)} wrong; "
            f"largest error over the allowed: {worst}"
        )


def draw_shapes(rng: random.Random, dtype: str, size: Size, count: int, aligned: bool) -> tuple[MoEShape, ...]:
    """Draw `count` shapes from two pairs of hidden and intermediate sizes. The sizes of the first pair are odd
    multiples of 16, since kernels are compiled for whether tiles divide a size. For fp8, the first intermediate size is
    no multiple of the scale block, and the second is one. aligned: every kernel takes the sizes of the second pair."""
    units = size.most_units // 2 - 1
    odd, any_two = ([16 * f(rng.randint(0, units)) for _ in range(2)] for f in (lambda n: 2 * n + 1, lambda n: n + 1))
    wide = [size.unit * rng.randint(1, max(1, size.most_units // 8)) for _ in range(2)]
    if dtype == "fp8":
        odd, any_two = [wide[0], odd[1]], [wide[0], 128 * max(1, wide[1] // 256)]
    pairs = [odd, [wide[0], 128 * max(1, wide[1] // 256)] if aligned else any_two]
    found: list[MoEShape] = []
    while len(found) < count:
        hidden, inter = pairs[len(found) % 2]
        experts = min(size.most_experts, round(2 ** rng.uniform(0, 9.2)))
        experts = max(1, min(experts, size.most_weights // (3 * hidden * inter)))
        top_k = rng.choice([k for k in TOP_K if k <= experts])
        found.append(MoEShape(experts, top_k, hidden, inter, dtype))
    return tuple(found)


def draw_variants(
    rng: random.Random, kernels: Sequence[LaunchableKernel], hardware: Hardware, count: int, size: Size
) -> list[Variant]:
    """Draw two variants of every kernel, and `count` of the first."""
    found: list[Variant] = []
    for kernel in kernels:
        first = kernel is kernels[0]
        able = [d for d in DTYPES if kernel.unsupported(MoEShape(8, 2, 256, 128, d), hardware) is None]
        for i in range(count if first else 2):
            dtype = able[i % len(able)]
            halves = [torch.bfloat16, torch.float16] if first else [torch.bfloat16]
            hidden_dtype = DTYPES[dtype] if dtype != "fp8" else rng.choice(halves)
            dispatched = first and i % 4 == 3
            shapes = draw_shapes(rng, dtype, size, SHAPES if first and not dispatched else FEW_SHAPES, not first)
            variant = Variant(
                kernel, dtype, hidden_dtype,
                rng.choice(ACTIVATIONS) if first else "swiglu",
                first and rng.random() < 0.4,
                rng.choice([key for key in kernel.readable_layouts(shapes[0]) if key in LAYOUTS]),
                shapes, dispatched=dispatched,
            )  # fmt: skip
            taken = [s for s in shapes if kernel.unsupported(s, hardware) is None]
            if taken and i % 4 in (1, 2):
                variant = replace(variant, config=rng.choice(list(kernel.configs(taken[0], hardware))).name)
            found.append(variant)
    return found


def draw_weights(variant: Variant, shape: MoEShape, strided: bool, device: torch.device, seed: int) -> MoEWeights:
    """Draw weights that are scaled so that every layer's output is near one."""
    generator = torch.Generator(device).manual_seed(seed)
    e, h, i = shape.num_experts, shape.hidden_size, shape.intermediate_size

    def normal(*sizes: int, by: float) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device, dtype=torch.float32) * by

    def blocks(*sizes: int, by: float) -> Tensor:
        return (0.5 + torch.rand(*sizes, generator=generator, device=device, dtype=torch.float32)) * by

    fp8 = shape.dtype == "fp8"
    gate_up, down = normal(e, 2 * i, h, by=1.0 if fp8 else h**-0.5), normal(e, h, i, by=1.0 if fp8 else i**-0.5)
    given: dict[str, Any] = {"gate_up": gate_up.to(DTYPES[shape.dtype]), "down": down.to(DTYPES[shape.dtype])}
    if fp8:
        deep = -(-i // 128)
        given["gate_up_scale"] = blocks(e, 2 * deep, h // 128, by=h**-0.5)
        given["down_scale"] = blocks(e, h // 128, deep, by=i**-0.5)
    if variant.bias:
        given |= {"gate_up_bias": normal(e, 2 * i, by=0.5), "down_bias": normal(e, h, by=0.5)}
    if strided:
        wide = torch.empty(e, 2 * i, h + 16, dtype=given["gate_up"].dtype, device=device)
        given["gate_up"] = wide[..., :h].copy_(given["gate_up"])
    if variant.activation == "swiglu_clamped":
        given["limit"] = LIMIT
    return MoEWeights(**given, activation=variant.activation)


def draw_ids(rng: random.Random, tokens: int, shape: MoEShape, device: torch.device, generator: Any) -> Tensor:
    """Draw ids int32 or int64 `[T, k]`: even, skewed, or of few experts or one. Some tokens name an expert twice, and
    some ids belong to no expert."""
    e, k = shape.num_experts, shape.top_k
    weights = torch.ones(e, device=device, dtype=torch.float32)
    kind = rng.choice(["even", "skewed", "few", "one", "twice"])
    if kind == "skewed":
        order = torch.randperm(e, generator=generator, device=device)
        weights = (order + 1.0) ** -rng.uniform(0.5, 3)
    elif kind == "few":
        weights[rng.randint(k, e) :] = 0
    if not tokens:
        ids = torch.zeros(0, k, dtype=torch.int64, device=device)
    elif kind in ("one", "twice"):
        few = 1 if kind == "one" else rng.randint(1, e)
        ids = torch.randint(0, few, (tokens, k), generator=generator, device=device) + rng.randint(0, e - few)
    else:
        noise = torch.rand(tokens, e, generator=generator, device=device, dtype=torch.float32)
        ids = (noise.log() / weights.clamp(min=1e-30)).topk(k, -1).indices
    wide = rng.random() < 0.3
    outside = [-1, e, e + 1, -2, 2**31 - 1, -(2**31), *((2**32, -(2**40), 2**63 - 1) if wide else ())]
    for _ in range(rng.choice([0, 0, 1, 2])):
        drawn = torch.rand(ids.shape, generator=generator, device=device, dtype=torch.float32)
        ids = ids.masked_fill(drawn < rng.choice([0.01, 0.2, 1.0]), rng.choice(outside))
    return ids if wide else ids.int()


def expected(weights: MoEWeights, x: Tensor, ids: Tensor, scores: Tensor, rounded: bool) -> tuple[Tensor, Tensor]:
    """The output float32 `[T, H]`, and the scale of its error float32 `[T]`.

    The output is the sum of every expert for every token, times its routing weight or 0. The scale is the root of the
    summed squares of all terms of a token. Errors are proportional to the terms, even if these cancel out. rounded:
    activations are rounded to e4m3 in groups of 128, as the inputs of fp8 products are."""
    e, h, i = weights.down.shape
    gate_up, down = weights.gate_up.float(), weights.down.float()
    if weights.gate_up_scale is not None and weights.down_scale is not None:
        halves = _wide(weights.gate_up_scale.view(e, 2, -1, h // 128), i, h)
        gate_up = gate_up * halves.reshape(e, 2 * i, h)
        down = down * _wide(weights.down_scale, h, i)
    asked = torch.zeros(len(x), e + 1, dtype=torch.float32, device=x.device)
    asked.scatter_add_(1, torch.where((ids < 0) | (ids >= e), e, ids).long(), scores)
    out = torch.empty(len(x), h, dtype=torch.float32, device=x.device)
    squares = torch.empty(len(x), dtype=torch.float32, device=x.device)
    columns = down.transpose(1, 2).reshape(e * i, h)
    lengths = columns.square().sum(1)
    step = max(1, REFERENCE_ELEMENTS // (2 * e * i))
    for first in range(0, len(x), step):
        some = slice(first, first + step)
        hidden = through_e4m3(x[some].float()) if rounded else x[some].float()
        both = (hidden @ gate_up.reshape(2 * e * i, h).T).view(-1, e, 2 * i)
        if weights.gate_up_bias is not None:
            both = both + weights.gate_up_bias.float()
        act = activated(both[..., :i], both[..., i:], weights.activation)
        if rounded:
            act = through_e4m3(act)
        share = asked[some, :e]
        terms = (act * share[..., None]).flatten(1)
        out[some], squares[some] = terms @ columns, terms.square() @ lengths
        if weights.down_bias is not None:
            bias = weights.down_bias.float()
            out[some] += share @ bias
            squares[some] += share.square() @ bias.square().sum(1)
    return out, squares.sqrt()


def activated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    if kind == "swiglu":
        return gate * torch.sigmoid(gate) * up
    if kind == "gelu_tanh":
        return 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up
    if kind == "swiglu_clamped":
        return activated(gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT), "swiglu")
    assert kind == "swiglu_oai", f"the fuzz has no reference of {kind}: write it here"
    gate = gate.clamp(max=7)
    return gate * torch.sigmoid(1.702 * gate) * (up.clamp(-7, 7) + 1)


def through_e4m3(x: Tensor) -> Tensor:
    groups = x.unflatten(-1, (-1, 128))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / torch.full_like(groups[..., :1], 448.0)
    return ((groups / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).flatten(-2)


def _wide(scale: Tensor, rows: int, columns: int) -> Tensor:
    return scale.repeat_interleave(128, -2).repeat_interleave(128, -1)[..., :rows, :columns]


def allowed(variant: Variant, shape: MoEShape, rounded: bool) -> float:
    """Largest allowed error of a whole output, relative to its terms. A single token's error may be four times that.

    The activation, each expert's row and the sum are rounded to the output's dtype, each by at most half an ulp.
    Kernels that add in that dtype round once more per addition. The signs of these errors vary, so the square root of
    their number counts.

    For fp8 there are two cases. If the reference does not round activations, two roundings to e4m3 are added. Both
    factors of the activation have the first of them. If the reference rounds, some values fall on the other side of a
    boundary between e4m3 values, since they were first rounded to the output's dtype. That happens to 2^-9 / 2^-4 of
    the values, and changes them by at most 2^-3.

    The result is doubled, since the errors of few numbers scatter.
    """
    ulp = HALF_ULP[variant.hidden_dtype]
    parts = 0 if variant.kernel.name in ("triton", "deep_gemm") else -(-shape.intermediate_size // 128)
    additions = shape.top_k * parts
    error = ulp * (3 + additions**0.5)
    if shape.dtype == "fp8":
        error += (2.0**-9 / 2.0**-4) ** 0.5 * 2.0**-4 if rounded else (3 * E4M3**2) ** 0.5
    return 2 * error


class Fuzz:
    """One run. A layer is determined by the run's seed and the layer's number."""

    def __init__(
        self, seed: int, kernels: Sequence[LaunchableKernel], hardware: Hardware, device: torch.device,
        variants: int, size: Size = Size(),
    ) -> None:  # fmt: skip
        self.seed, self.hardware, self.device, self.size = seed, hardware, device, size
        self.variants = draw_variants(random.Random(f"{seed}"), kernels, hardware, variants, size)
        self.tally = Tally()
        self._models: dict[tuple[str, MoEShape], CostModel] = {}
        self._configs: dict[tuple[str, MoEShape], KernelConfig | None] = {}

    def run(self, number: int) -> None:
        """Run layer `number`, and count in `tally` whether it is right or refused."""
        rng = random.Random(f"{self.seed}/{number}")
        variant = rng.choice(self.variants)
        shape = rng.choice(variant.shapes)
        tokens = 0 if rng.random() < 0.02 else min(self.size.most_tokens, round(2 ** rng.uniform(0, 12.3)))
        here = f"layer {number} of seed {self.seed}: {variant.name}, {shape.slug}, {tokens} tokens"
        try:
            problem = self._problem(rng, variant, shape, tokens)
        except RampMoEError as e:
            cause = e.__cause__
            if cause is None or isinstance(cause, RampMoEError):
                self.tally.refused[_reason(e)] += 1
                return
            problem = f"raised {e!r} from {cause!r}"
        except Exception as e:
            problem = f"raised {e!r}"
        if problem is None:
            self.tally.right += 1
        else:
            self.tally.wrong.append(f"{here}: {problem}")

    def _problem(self, rng: random.Random, variant: Variant, shape: MoEShape, tokens: int) -> str | None:
        generator = torch.Generator(self.device).manual_seed(rng.getrandbits(32))
        weights = draw_weights(variant, shape, rng.random() < 0.05, self.device, rng.getrandbits(32))
        x = torch.randn(tokens, shape.hidden_size, generator=generator, device=self.device, dtype=torch.float32)
        x = x.to(variant.hidden_dtype)
        ids = draw_ids(rng, tokens, shape, self.device, generator)
        scores = torch.rand(ids.shape, generator=generator, device=self.device, dtype=torch.float32)
        valid = rng.choice([None, None, rng.randint(-2, tokens + 2)])
        given: Any = valid
        if valid is not None and rng.random() < 0.5:
            given = torch.tensor([valid], dtype=rng.choice([torch.int32, torch.int64]), device=self.device)
        if rng.random() < 0.02:
            x = x.T.contiguous().T  # which is refused, unless it makes no difference

        moe = self._layer(variant, relayout(weights, variant.layout), shape)
        guarded = torch.full((tokens + 2, shape.hidden_size), GUARD, dtype=x.dtype, device=self.device)
        guarded[1:-1] = torch.nan
        moe(x, ids, scores, guarded[1:-1], given)
        if raised := [r for r in moe.dropped.values() if r.startswith("raised") and "KernelError" not in r]:
            return f"a kernel {raised[0]}"
        if not (guarded[0] == GUARD).all() or not (guarded[-1] == GUARD).all():
            return "wrote outside its output"
        if valid is not None:
            padding = torch.arange(tokens, device=self.device)[:, None] >= valid
            ids = ids.masked_fill(padding, -1)
        exact = shape.dtype == "fp8" and shape.intermediate_size % 128 == 0
        exact = exact and variant.kernel.name in ("triton", "cute")
        wanted, size = expected(weights, x, ids, scores, exact)
        return self._judged(variant, shape, guarded[1:-1].float(), wanted, size, exact)

    def _layer(self, variant: Variant, weights: MoEWeights, shape: MoEShape) -> LayerRuntime:
        kernel, model = variant.kernel, None
        if kernel.unsupported(shape, self.hardware) is None:
            if variant.dispatched:
                model = self._model(variant, shape)
            if config := self._config(variant, shape):
                kernel = copy(kernel)
                kernel.default_config = lambda *of: config  # type: ignore[method-assign]
        moe = LayerRuntime(weights, shape.top_k, self.hardware, [kernel], cost_model=model)
        moe.workspace = Filled(NAN_BYTE)
        return moe

    def _config(self, variant: Variant, shape: MoEShape) -> KernelConfig | None:
        """The variant's configuration for this shape. None if there is none, or if the variant names none."""
        if variant.config is None:
            return None
        if (variant.name, shape) not in self._configs:
            every = variant.kernel.configs(shape, self.hardware)
            self._configs[variant.name, shape] = next((c for c in every if c.name == variant.config), None)
        return self._configs[variant.name, shape]

    def _model(self, variant: Variant, shape: MoEShape) -> CostModel:
        """A cost model of three configurations, each of which is predicted to win on some batches."""
        if (variant.name, shape) not in self._models:
            by_block: dict[int, KernelConfig] = {}
            for tokens in (4096, 64, 8, 1):
                config = variant.kernel.default_config(shape, self.hardware, tokens)
                by_block.setdefault(config.gemms[0].block_m, config)
            prices = {Candidate(variant.kernel.name, c): 50.0 + block for block, c in by_block.items()}
            self._models[variant.name, shape] = priced(self.hardware, prices, shape)
        return self._models[variant.name, shape]

    def _judged(
        self, variant: Variant, shape: MoEShape, out: Tensor, wanted: Tensor, size: Tensor, exact: bool
    ) -> str | None:
        if not out.numel():
            return None
        if not out.isfinite().all():
            return f"{int((~out.isfinite()).any(1).sum())} tokens are not finite"
        if out[size == 0].any():
            return "a token that no expert is asked for is not zero"
        if not size.any():
            return None
        wrong = (out - wanted).norm(dim=1)
        limit = allowed(variant, shape, exact)
        error = float(wrong.norm() / size.norm())
        worst = float((wrong / size.clamp(min=1e-20)).max())
        name = f"{variant.kernel.name}/{variant.dtype}"
        self.tally.worst[name] = max(self.tally.worst.get(name, 0.0), error / limit, worst / (4 * limit))
        if error <= limit and worst <= 4 * limit:
            return None
        return f"error {error:.3g}, of one token {worst:.3g}; allowed are {limit:.3g} and {4 * limit:.3g}"


def _reason(e: RampMoEError) -> str:
    """The message of an error, without the parts that differ between layers."""
    return "".join("#" if c.isdigit() else c for c in str(e))[:100]
