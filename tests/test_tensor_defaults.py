"""Engines change torch's defaults while they load a model: no tensor of ours takes its dtype or device from them."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import fake_flashinfer
import fake_vllm
import pytest
import torch
from moe_cases import H200, batch, error, expected, weights
from ramp_moe import Candidate
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.runtime.relayout import relayout
from ramp_moe.runtime.warm import warm
from ramp_moe.spec.launchable import Batch, MoEWeights
from ramp_moe_adapters.kernels.flashinfer_cutlass import launch as flashinfer_cutlass_launch
from ramp_moe_adapters.kernels.flashinfer_cutlass.kernel import FlashInferCutlass
from ramp_moe_adapters.kernels.vllm_triton.kernel import VllmTriton
from ramp_moe_kernels.cute import launch as cute_launch
from ramp_moe_kernels.cute.kernel import CuteMoE
from ramp_moe_kernels.reference import experts
from ramp_moe_kernels.triton.kernel import TritonMoE
from ramp_moe_kernels.triton.router import LinearRouter

ROOT = Path(__file__).parents[1]
PACKAGES = ("core", "adapters", "kernels")
FACTORIES = {
    *("ones", "zeros", "empty", "full", "tensor", "arange", "range", "linspace", "logspace", "eye"),
    *("rand", "randn", "randint", "randperm", "normal", "empty_strided", "empty_permuted", "scalar_tensor"),
    *("as_tensor", "asarray", "sparse_coo_tensor", "tril_indices", "triu_indices"),
    *("bartlett_window", "blackman_window", "hamming_window", "hann_window", "kaiser_window"),
}
"""Functions of torch that take dtype and device, and torch's defaults without. `*_like` and `new_*` take another
tensor's, `from_numpy` the array's."""
LEGACY = {
    f"{kind}Tensor" for kind in ("", "Float", "Double", "Half", "BFloat16", "Byte", "Char", "Short", "Int", "Long")
}
"""Constructors that can be told neither."""


def implicit(source: str) -> list[tuple[int, str]]:
    """Lines, and what is called there without saying dtype and device; torch under another name, too."""
    found, nodes = [], list(ast.walk(ast.parse(source)))
    modules = {a.asname or a.name for n in nodes if isinstance(n, ast.Import) for a in n.names if a.name == "torch"}
    taken = {
        a.asname or a.name: a.name
        for n in nodes
        if isinstance(n, ast.ImportFrom) and n.module == "torch" and not n.level
        for a in n.names
    }
    for node in nodes:
        if not isinstance(node, ast.Call):
            continue
        match node.func:
            case ast.Attribute(value=ast.Name(id=module), attr=name) if module in {"torch", *modules}:
                pass
            case ast.Name(id=local) if local in taken:
                name = taken[local]
            case _:
                continue
        said = {k.arg for k in node.keywords}
        if name in LEGACY or (name in FACTORIES and not {"dtype", "device"} <= said):
            found.append((node.lineno, f"torch.{name}"))
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_every_tensor_states_dtype_and_device(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    found = [f"{f.relative_to(ROOT)}:{line}: {call}" for f in files for line, call in implicit(f.read_text())]
    assert not found, "say dtype= and device=: " + ", ".join(found)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("torch.ones(2, device=d)", [(1, "torch.ones")]),
        ("torch.as_tensor([1.0], dtype=t)", [(1, "torch.as_tensor")]),
        ("torch.Tensor([1.0])", [(1, "torch.Tensor")]),
        ("torch.scalar_tensor(1.0)", [(1, "torch.scalar_tensor")]),
        ("torch.rand(2, dtype=t, device=d, generator=g)", []),
        ("torch.empty_like(x); x.new_zeros(2)", []),
        ("import torch as t; t.zeros(2)", [(1, "torch.zeros")]),
        ("from torch import eye as unit; unit(2)", [(1, "torch.eye")]),
        ("from torch import Tensor; isinstance(x, Tensor)", []),
    ],
)
def test_the_search_finds(source: str, found: list[tuple[int, str]]) -> None:
    assert implicit(source) == found


def test_the_search_knows_all_of_torchs_factories() -> None:
    """A factory that torch adds shall be sought, too: those that a default device reaches are listed by torch."""
    from torch.utils._device import _device_constructors

    listed = {f.__name__ for f in _device_constructors() if f.__module__ == "torch"}
    assert {name for name in listed if not name.startswith(("sparse_", "empty_quantized"))} <= FACTORIES


# --- What torch's defaults leave as it is ----------------------------------------------------------------------------


@contextmanager
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


DEFAULTS: dict[str, Callable[[], Any]] = {
    "bf16": default_dtype,
    "inference": torch.inference_mode,
    "meta": default_device,
}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("dtype", ["fp16", "fp8"])
def test_a_layer_is_made_and_run_under(default: str, dtype: str) -> None:
    """From its weights to its output, built and run for the first time there."""
    given = relayout(weights(4, 128, 128, dtype, "cpu"), "up-first")
    x = batch(9, 2, 4, 128, "padded", "cpu", torch.float16)
    wanted = expected(given, x, quantise=dtype == "fp8")
    with DEFAULTS[default]():
        layer = LayerRuntime(given, 2, H200, [TritonMoE()])
        layer.warm_up(9, torch.float16)
        out = layer(x.hidden_states, x.topk_ids.long(), x.topk_weights, num_valid=torch.full_like(x.topk_ids[0, :1], 9))
    assert (out.dtype, out.device.type) == (torch.float16, "cpu")
    assert error(out, wanted) < 2e-2


@pytest.mark.parametrize("default", DEFAULTS)
def test_a_routed_layer_is_warmed_and_run_under(default: str) -> None:
    """With the router, every launch that a server warms, and one launch that is any of two configurations."""
    given, x = weights(4, 128, 128, "fp16", "cpu"), batch(9, 2, 4, 128, "uniform", "cpu", torch.float16)
    router = LinearRouter(given.down[:, :, 0].contiguous(), 2)
    ids, scores = router(x.hidden_states)
    wanted = expected(given, Batch(x.hidden_states, ids, scores), quantise=False)
    kernel, choice = TritonMoE(), torch.ones(1, dtype=torch.int32)
    with DEFAULTS[default]():
        layer = LayerRuntime(given, 2, H200, [kernel])
        first, second = (Candidate(kernel.name, kernel.default_config(layer.shape, H200, n)) for n in (9, 20))
        assert warm(layer, [first], 2, torch.float16) == {}
        out, other = layer(x.hidden_states, *router(x.hidden_states)), torch.empty_like(x.hidden_states)
        layer.launch_inline([first, second], choice, Batch(x.hidden_states, ids, scores), other)
    assert error(other, wanted) < 2e-2
    assert (out.dtype, out.device.type) == (torch.float16, "cpu")
    assert error(out, wanted) < 2e-2


@pytest.mark.parametrize("default", DEFAULTS)
def test_the_reference_is_the_same_under(default: str) -> None:
    given, x = weights(4, 128, 128, "bf16", "cpu"), batch(5, 2, 4, 128, "skewed", "cpu", torch.bfloat16)

    def out() -> torch.Tensor:
        return experts(x.hidden_states, given.gate_up, given.down, x.topk_ids, x.topk_weights, quantise=False)

    wanted = out()
    with DEFAULTS[default]():
        found = out()
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)


def tensors(prepared: Any) -> list[torch.Tensor]:
    """All that a kernel holds of its weights, in order."""
    if isinstance(prepared, torch.Tensor):
        return [prepared]
    if isinstance(prepared, dict):
        return [t for value in prepared.values() for t in tensors(value)]
    if isinstance(prepared, list | tuple):
        return [t for value in prepared for t in tensors(value)]
    if is_dataclass(prepared) and not isinstance(prepared, type):
        return [t for f in fields(prepared) for t in tensors(getattr(prepared, f.name))]
    return tensors(vars(prepared)) if hasattr(prepared, "__dict__") and not callable(prepared) else []


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize(
    ("kernel", "dtype", "bias"),
    [
        (TritonMoE(), "bf16", True),
        (CuteMoE(), "bf16", False),
        (CuteMoE(), "fp8", False),
        (VllmTriton(), "bf16", True),
        (VllmTriton(), "fp8", False),
        (FlashInferCutlass(), "bf16", True),
        (FlashInferCutlass(), "fp8", False),
    ],
    ids=lambda value: value.name if hasattr(value, "name") else str(value),
)
def test_weights_are_prepared_alike_under(
    kernel: Any, dtype: str, bias: bool, default: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cute_launch, "check_hopper", lambda kernel, device: None)
    monkeypatch.setattr(flashinfer_cutlass_launch, "check_hopper", lambda kernel, device: None)
    if kernel.name == "vllm_triton":
        fake_vllm.install(monkeypatch, tmp_path)
    if kernel.name == "flashinfer_cutlass":
        fake_flashinfer.install(monkeypatch, tmp_path)
    given = weights(4, 256, 128, dtype, "cpu", bias=bias)
    if bias:  # one alone, for which a kernel that takes both or none must make the other
        given = MoEWeights(given.gate_up, given.down, gate_up_bias=given.gate_up_bias)
    wanted = tensors(kernel.prepare(given))
    with DEFAULTS[default]():
        found = tensors(kernel.prepare(given))
    assert len(wanted) >= 2
    assert [(t.dtype, t.device, t.shape) for t in found] == [(t.dtype, t.device, t.shape) for t in wanted]
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine.double(), theirs.double())
