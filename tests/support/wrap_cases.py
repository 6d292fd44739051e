"""Modules whose experts are laid out otherwise than a layer holds them, and checks of their tensors."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from layer_cases import SHAPE, FakeKernel, inputs
from layer_cases import E as E
from layer_cases import H as H
from layer_cases import I as I
from layer_cases import K as K
from ramp_moe import Candidate, Experts, ProfileError, get_registry
from ramp_moe.runtime import layer_factory as building
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.runtime.relayout import relayout
from ramp_moe.runtime.wrapped_experts import WrappedExperts
from ramp_moe.spec.launchable import Batch, MoEWeights
from torch import Tensor, nn

MIXED = "gate-up-interleaved-8"
TENSORS = ("w13", "w2", "b13", "b2")
FIELDS = ("gate_up", "down", "gate_up_bias", "down_bias")
X, IDS, SCORES = inputs(5)
assert SHAPE.num_experts == E


class InPlace(FakeKernel):
    """A FakeKernel whose prepared weights share the memory of the weights given, and which launches from it."""

    def prepare(self, weights: MoEWeights) -> Any:
        super().prepare(weights)
        return weights, torch.zeros(2, 1).expand(2, 7), torch.full((1,), 3.0).float()

    def launch(self, config: Any, prepared: Any, batch: Batch, out: Tensor, workspace: Any) -> None:
        plain = relayout(prepared[0], "gate-first")
        super().launch(config, (plain.gate_up.float(), plain.down.float()), batch, out, workspace)


class Bank(nn.Module):
    """Experts as a framework calls them. turned: as in gpt-oss, matrices are transposed, and gate and up columns
    alternate."""

    def __init__(self, seed: int = 0, turned: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in zip(TENSORS, ((E, 2 * I, H), (E, H, I), (E, 2 * I), (E, H)), strict=True):
            shape = (shape[0], *reversed(shape[1:])) if turned else shape
            value = torch.randn(shape, generator=generator) * 0.2
            self.register_parameter(name, nn.Parameter(value.bfloat16()))

    def forward(self, x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Turned(Experts):
    """The adapter of a turned Bank."""

    def weights(self, module: nn.Module) -> MoEWeights:
        given = {
            f: self.given(None, f, getattr(module, n).detach()).contiguous() for f, n in self.names(module).items()
        }
        return MoEWeights(**given)

    def given(self, order: Any, field: str, tensor: Tensor) -> Tensor:
        tensor = tensor.transpose(1, 2) if tensor.ndim == 3 else tensor
        if "gate_up" not in field:
            return tensor
        return torch.cat([tensor[:, 0::2], tensor[:, 1::2]], 1)

    def own(self, order: Any, field: str, tensor: Tensor) -> Tensor:
        if "gate_up" in field:
            tensor = torch.stack(tensor.chunk(2, 1), 2).flatten(1, 2)
        return tensor.transpose(1, 2) if tensor.ndim == 3 else tensor


class OneLayer:
    """Stands in for a Builder."""

    def __init__(self, kernels: list[FakeKernel], copies: int) -> None:
        self.kernels, self.copies = kernels, copies

    def layer(self, weights: MoEWeights, top_k: int) -> LayerRuntime:
        return LayerRuntime(weights, top_k, get_registry().device("h200"), self.kernels, copies=self.copies)


@dataclass(frozen=True)
class Case:
    """A way in which a Bank's tensors differ from the layer's."""

    turned: bool
    layouts: tuple[str, ...]
    """Layouts that the kernels read, and the layer holds: one copy per layout."""
    derives: bool = False

    def adapter(self) -> Experts:
        kind = Turned if self.turned else Experts
        return kind(Bank, "w13", "w2", K, gate_up_bias="b13", down_bias="b2")

    def builder(self) -> OneLayer:
        kind = FakeKernel if self.derives else InPlace
        return OneLayer([kind(layout, layouts=(layout,)) for layout in self.layouts], len(self.layouts))

    def wrapped(self, seed: int = 0) -> Bank:
        bank = Bank(seed, self.turned)
        experts = WrappedExperts(bank, self.adapter(), K, self.builder())  # type: ignore[arg-type]
        experts.take(bank)
        experts.install(bank)
        return bank

    def check(self, bank: Bank, expected: dict[str, Tensor]) -> None:
        """Assert that the bank reads as expected, and that every kernel computes with these tensors."""
        experts = bank._ramp_moe
        assert isinstance(experts, WrappedExperts)
        plain = Bank(0, self.turned)
        for name, tensor in expected.items():
            assert getattr(bank, name).shape == tensor.shape
            assert torch.equal(getattr(bank, name).detach().clone(), tensor), name
            getattr(plain, name).data = tensor
        layer = experts.current()
        wanted = self.adapter().weights(plain)
        for held in layer.held:
            found = relayout(held, "gate-first")
            assert all(torch.equal(getattr(found, f), getattr(wanted, f)) for f in FIELDS)
        for name in layer.configs():
            _, prepared = layer.kernel(name)
            if self.derives:
                assert torch.equal(prepared[0], wanted.gate_up.float())
                assert torch.equal(prepared[1], wanted.down.float())
        for out in outputs(layer)[:1]:
            fresh = self.builder().layer(wanted, K)
            assert torch.equal(out, outputs(fresh)[0])


def outputs(layer: LayerRuntime) -> list[Tensor]:
    """The output of every kernel."""
    found = []
    for name in layer.configs():
        kernel, _ = layer.kernel(name)
        out = torch.full_like(X, float("nan"))
        layer.launch(Candidate(name, kernel.config(8)), Batch(X, IDS, SCORES), out)  # type: ignore[attr-defined]
        found.append(out)
    return found


CASES = {
    "turned": Case(True, ("gate-first",)),
    "turned and mixed": Case(True, (MIXED,)),
    "rows moved": Case(False, ("up-first",)),
    "two copies": Case(False, ("gate-first", MIXED)),
    "derived": Case(False, ("gate-first",), derives=True),
    "all of it": Case(True, ("up-first", MIXED), derives=True),
}


def register_kernel(monkeypatch: pytest.MonkeyPatch, layout: str) -> FakeKernel:
    """Make it the only kernel, without a profile, and let it read weights in this layout alone."""
    kernel = InPlace("only", layouts=(layout,))
    registry = copy.copy(get_registry())
    registry.kernels = {kernel.name: kernel}

    def no_profile(*given: Any) -> Any:
        raise ProfileError("none")

    monkeypatch.setattr(building, "get_registry", lambda: registry)
    monkeypatch.setattr(building, "load_model", no_profile)
    monkeypatch.setattr(building, "UNMEASURED", kernel.name)
    return kernel
