"""An engine's parameters follow the layer that is made of them, however they are written."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from moe_cases import H200, batch, error, expected, weights
from ramp_moe import KernelError, RampMoEError, ShapeError
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.runtime.placeholder import Placeholder
from ramp_moe.spec.launchable import Batch, MoEWeights
from ramp_moe_adapters.frameworks import engine_weights
from ramp_moe_adapters.frameworks.engine_weights import Parameters, Repacked
from ramp_moe_kernels.triton.kernel import TritonMoE
from torch import Tensor, nn

E, K, H, I = 4, 2, 128, 128  # noqa: E741


class Plain(TritonMoE):
    """Computes with the plain reference."""

    def launch(self, config: Any, prepared: Any, batch: Batch, out: Tensor, workspace: Any) -> None:
        out.copy_(expected(prepared, batch, quantise=prepared.gate_up_scale is not None))


class Interleaved(Plain):
    def readable_layouts(self, shape: Any) -> tuple[str, ...]:
        return ("gate-up-interleaved-8",)


class Deriving(Plain):
    """Launches with copies of its own."""

    def prepare(self, given: MoEWeights) -> MoEWeights:
        copies = {f.name: t.clone() for f in fields(given) if isinstance(t := getattr(given, f.name), Tensor)}
        return replace(given, **copies)


KERNELS = {"in-place": Plain, "moved": Interleaved, "derived": Deriving}


class Engine(nn.Module):
    """Holds the tensors of MoEWeights as parameters of their names."""

    def __init__(self, given: MoEWeights) -> None:
        super().__init__()
        for name, tensor in named(given).items():
            self.register_parameter(name, nn.Parameter(tensor.clone(), requires_grad=False))

    @property
    def tensors(self) -> dict[str, Tensor]:
        return dict(self._parameters)  # type: ignore[arg-type]


def named(given: MoEWeights) -> dict[str, Tensor]:
    return {f.name: t for f in fields(given) if isinstance(t := getattr(given, f.name), Tensor)}


def drawn(dtype: str = "fp16") -> tuple[MoEWeights, MoEWeights]:
    """Weights, and others."""
    old = weights(E, H, I, dtype, "cpu", bias=dtype != "fp8")
    return old, replace(old, **{name: t.flip(0).contiguous() for name, t in named(old).items()})


def made(kernel: str, given: MoEWeights) -> tuple[Engine, Parameters]:
    engine = Engine(given)
    of = {name: t.detach() for name, t in engine.tensors.items()}
    layer = LayerRuntime(replace(given, **of), K, H200, [KERNELS[kernel]()])
    return engine, Parameters(engine, layer, engine.tensors)


def wrong(engine: Engine, parameters: Parameters, of: MoEWeights) -> float:
    """As an adapter computes a batch."""
    x = batch(4, K, E, H, "skewed", "cpu", torch.float16)
    parameters.meet(engine.tensors)
    out = parameters.layer(x.hidden_states, x.topk_ids, x.topk_weights)
    return error(out, expected(of, x, quantise=of.gate_up_scale is not None))


WAYS = ("copied", "by_expert", "loaded", "rebound", "exchanged")


@pytest.mark.parametrize(("dtype", "way"), [*(("fp16", way) for way in WAYS), ("fp8", "copied")])
@pytest.mark.parametrize("kernel", KERNELS)
def test_new_values_count(dtype: str, kernel: str, way: str) -> None:
    old, new = drawn(dtype)
    engine, parameters = made(kernel, old)
    places = [t.data_ptr() for t in named(parameters.layer.held[0]).values()]
    assert wrong(engine, parameters, old) < 2e-2
    if way == "loaded":
        engine.load_state_dict(named(new))
    for name, tensor in named(new).items():
        if way == "copied":
            engine.get_parameter(name).data.copy_(tensor)
        elif way == "by_expert":
            for e in range(E):
                engine.get_parameter(name).data[e].copy_(tensor[e])
        elif way == "rebound":
            engine.get_parameter(name).data = tensor.clone()
        elif way == "exchanged":
            setattr(engine, name, nn.Parameter(tensor.clone(), requires_grad=False))
    assert wrong(engine, parameters, new) < 2e-2
    assert places == [t.data_ptr() for t in named(parameters.layer.held[0]).values()], "CUDA graphs have the addresses"
    for name, tensor in named(old).items():
        engine.get_parameter(name).data.copy_(tensor)
    assert wrong(engine, parameters, old) < 2e-2, "what was exchanged follows the layer, too"


@pytest.mark.parametrize("kernel", KERNELS)
def test_parameters_read_as_the_engines(kernel: str) -> None:
    old, _ = drawn()
    engine, parameters = made(kernel, old)
    moved = {name for name, t in engine.tensors.items() if isinstance(t, Placeholder)}
    rows = {"gate_up", "gate_up_bias"}
    assert moved == {"in-place": set(), "moved": rows, "derived": set(named(old))}[kernel]
    values = parameters.values()
    for name, tensor in named(old).items():
        assert torch.equal(engine.get_parameter(name), tensor)
        assert torch.equal(getattr(values, name), tensor)
        assert type(getattr(values, name)) is Tensor
    assert values.layout == "gate-first"


def test_parts_of_an_expert_are_loaded_by_several_threads() -> None:
    old, new = drawn()
    engine, parameters = made("moved", old)
    with ThreadPoolExecutor(4) as threads:
        for e in range(E):
            for rows in torch.arange(2 * I, device="cpu", dtype=torch.int64).split(I // 2):
                part = slice(int(rows[0]), int(rows[-1]) + 1)
                threads.submit(lambda e=e, part=part: engine.gate_up.data[e][part].copy_(new.gate_up[e][part]))  # type: ignore[misc, union-attr, index]
    assert torch.equal(parameters.values().gate_up, new.gate_up)


@pytest.mark.parametrize("kernel", KERNELS)
def test_values_that_do_not_fit_are_an_error_until_others_come(kernel: str) -> None:
    old, new = drawn()
    engine, parameters = made(kernel, old)
    engine.down = nn.Parameter(new.down[:, : H // 2].contiguous(), requires_grad=False)
    for _ in range(2):
        with pytest.raises(RampMoEError):
            wrong(engine, parameters, new)
        with pytest.raises(KernelError, match="update"):
            parameters.values()
    for name, tensor in named(new).items():
        setattr(engine, name, nn.Parameter(tensor.clone(), requires_grad=False))
    assert wrong(engine, parameters, new) < 2e-2


def test_a_parameter_that_is_gone() -> None:
    old, _ = drawn()
    _, parameters = made("in-place", old)
    with pytest.raises(ShapeError, match="was made with down_bias, which the engine"):
        parameters.meet({name: t for name, t in named(old).items() if name != "down_bias"})


@pytest.mark.parametrize("step", [1, 2])
def test_an_exchange_that_fails_leaves_all_as_it_was(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    old, _ = drawn()
    engine = Engine(old)
    places = {name: t.data_ptr() for name, t in engine.tensors.items()}
    layer = LayerRuntime(old, K, H200, [Interleaved()])
    calls, become = [], engine_weights.become

    def failing(t: Tensor, new: Tensor) -> None:
        calls.append(t)
        if len(calls) == step:
            raise KernelError("something refers to it")
        become(t, new)

    monkeypatch.setattr(engine_weights, "become", failing)
    with pytest.raises(KernelError, match="something refers to it"):
        Parameters(engine, layer, engine.tensors)
    assert {name: t.data_ptr() for name, t in engine.tensors.items()} == places
    assert all(torch.equal(engine.get_parameter(name), t) for name, t in named(old).items())


# --- Parameters that are given up ------------------------------------------------------------------------------------


class Repacking(Deriving):
    """Reads the weights in a format of its own."""

    def readable_layouts(self, shape: Any) -> tuple[str, ...]:
        return ("repacking's",)


def of_copies(tensors: Any) -> MoEWeights:
    return MoEWeights(**{name: t.detach().clone() for name, t in tensors.items()})


@pytest.mark.parametrize("kernel", [Repacking, Plain], ids=["repacked", "copied"])
def test_a_layer_in_another_form_empties_the_parameters(kernel: type[TritonMoE]) -> None:
    """copied: its kernel reads the copies that the layer was made of."""
    old, new = weights(E, H, I, "bf16", "cpu", bias=True), weights(E, H, I, "bf16", "cpu", bias=True)
    new = replace(new, gate_up=new.gate_up.flip(0).contiguous(), down=new.down.flip(0).contiguous())
    engine = Engine(old)
    made = LayerRuntime(of_copies(engine.tensors), K, H200, [kernel()])
    follows = Repacked(made, torch.bfloat16, engine.tensors, of_copies)
    assert made.released is (kernel is Repacking)
    assert [list(engine.tensors[name].shape) for name in ("gate_up", "down")] == [[E, 2 * I, 0], [E, H, 0]]
    assert torch.equal(engine.tensors["gate_up_bias"], old.gate_up_bias)
    follows.meet(engine.tensors)  # nothing was loaded

    def wrong(of: MoEWeights) -> float:
        b = batch(5, K, E, H, "skewed", "cpu", torch.bfloat16)
        return error(made(b.hidden_states, b.topk_ids, b.topk_weights), expected(of, b, quantise=False))

    assert wrong(old) < 5e-3
    engine.gate_up.data = new.gate_up.clone()
    with pytest.raises(ShapeError, match="gate_up were loaded without the others"):
        follows.meet(engine.tensors)
    assert wrong(old) < 5e-3
    engine.down.data = new.down.clone()
    follows.meet(engine.tensors)
    assert wrong(new) < 5e-3
    assert engine.gate_up.numel() == engine.down.numel() == 0
    follows.check()
    with pytest.raises(KernelError, match="are held in a form of"):
        follows.values()
