"""Fields of an engine's configuration that an adapter does not know, or whose value it does not compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, make_dataclass
from typing import Any, NamedTuple

import pytest
import torch
from ramp_moe_adapters.frameworks.known_fields import ANY, Known, misfit, misfit_arguments, new_parameters
from ramp_moe_adapters.frameworks.sglang import fields as sglang_fields
from ramp_moe_adapters.frameworks.vllm import fields as vllm_fields


@dataclass
class Config:
    size: int
    activation: str = "silu"
    limit: float | None = None
    scale: Any = None


KNOWN: Known = {"size": ANY, "activation": ("silu", "gelu"), "limit": (None,), "scale": (None, 1)}


class Pair(NamedTuple):
    size: int
    extra: Any = 3


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Config(1), None),
        (Config(1, "gelu"), None),
        (Config(1, "relu"), "Config.activation is 'relu'"),
        (Config(1, limit=0.0), "Config.limit is 0.0"),
        (Config(1, scale=1), None),
        (Config(1, scale=True), "Config.scale is True"),
        (Config(1, scale=torch.ones(2)), "Config.scale is Tensor"),
        (Pair(1), None),
        (Pair(1, 4), "Pair.extra is 4, which ramp_moe does not know"),
    ],
)
def test_values(config: Any, reason: str | None) -> None:
    assert misfit(config, KNOWN) == reason


@pytest.mark.parametrize(
    ("default", "value", "refused"),
    [
        (None, None, False),
        (False, False, False),
        (2.0, 2.0, False),
        (2.0, None, False),
        (None, True, True),
        (0, 1, True),
    ],
)
def test_a_field_that_a_newer_version_adds(default: Any, value: Any, refused: bool) -> None:
    newer = make_dataclass("Newer", [("added", Any, default)], bases=(Config,))
    expected = f"Newer.added is {value!r}, which ramp_moe does not know" if refused else None
    assert misfit(newer(1, added=value), KNOWN) == expected


def test_arguments() -> None:
    def older(size: int, limit: float | None = None) -> None: ...

    def newer(size: int, limit: float | None = None, *, swapped: bool = False) -> None: ...

    assert misfit_arguments(older, {"size": 2, "limit": None}, KNOWN) is None
    assert misfit_arguments(older, {"size": 2, "limit": 7.0}, KNOWN) == "the argument limit is 7.0"
    assert misfit_arguments(newer, {"size": 2, "swapped": False}, KNOWN) is None
    reason = "the argument swapped is True, which ramp_moe does not know"
    assert misfit_arguments(newer, {"size": 2, "swapped": True}, KNOWN) == reason
    assert new_parameters(newer, ("size", "limit", "gone")) == ["gone", "swapped"]


VLLM = "vllm.model_executor.layers.fused_moe"
SGLANG = "sglang.srt.layers.moe"
TABLES = [
    (f"{VLLM}.config", "FusedMoEConfig", vllm_fields.LAYER),
    (f"{VLLM}.config", "FusedMoEParallelConfig", vllm_fields.PARALLEL),
    (f"{VLLM}.config", "FusedMoEQuantConfig", vllm_fields.QUANTISATION),
    *((f"{VLLM}.config", "FusedMoEQuantDesc", known) for known in vllm_fields.TENSORS.values()),
    (f"{SGLANG}.moe_runner.base", "MoeRunnerConfig", sglang_fields.RUNNER),
    (f"{SGLANG}.moe_runner.triton", "TritonMoeQuantInfo", sglang_fields.WEIGHTS),
    (f"{SGLANG}.token_dispatcher.standard", "StandardDispatchOutput", sglang_fields.BATCH),
]


@pytest.mark.parametrize(("module", "name", "known"), TABLES, ids=[name for _, name, _ in TABLES])
def test_every_field_of_the_installed_engine_is_listed(module: str, name: str, known: Known) -> None:
    """Fails for the fields of a newer version: decide of each what the adapter computes."""
    _cases(module)
    config = getattr(pytest.importorskip(module), name)
    found = set(config._fields) if hasattr(config, "_fields") else {f.name for f in fields(config)}
    assert found == set(known)


def test_a_server_with_vllms_default_options_is_not_refused() -> None:
    """vLLM says here how many data-parallel ranks there are, one or more, in every server; its own default is None."""
    ranks = make_dataclass("FusedMoEConfig", [("elastic_ep_max_dp_size", Any, None)])
    for of in (None, 1, 8):
        assert misfit(ranks(of), vllm_fields.LAYER) is None


def test_the_values_that_vllm_makes_of_its_defaults_are_computed() -> None:
    """Options that vLLM derives when it is configured, and passes on to each layer."""
    _cases(VLLM)
    parallel = pytest.importorskip("vllm.config").ParallelConfig()
    layer = pytest.importorskip(f"{VLLM}.config").FusedMoEConfig
    shared = {f.name for f in fields(layer)} & {f.name for f in fields(parallel)}
    assert "elastic_ep_max_dp_size" in shared
    made = make_dataclass("Derived", [(name, Any, None) for name in sorted(shared)])
    assert misfit(made(**{name: getattr(parallel, name) for name in shared}), vllm_fields.LAYER) is None


def test_every_argument_of_vllms_routed_experts_is_listed() -> None:
    import inspect

    _cases(VLLM)
    routed = pytest.importorskip(f"{VLLM}.routed_experts").RoutedExperts
    assert set(inspect.signature(routed.__init__).parameters) - {"self"} == set(vllm_fields.CONSTRUCTOR)


def test_every_field_of_sglangs_routing_is_listed() -> None:
    topk = pytest.importorskip(f"{SGLANG}.topk")
    found = {*topk.StandardTopKOutput._fields, *topk.StandardTopKOutputPacked._fields}
    assert found == set(sglang_fields.ROUTING)


def _cases(module: str) -> None:
    """vLLM is told of a GPU before anything of it is imported."""
    if module.startswith("vllm"):
        pytest.importorskip("vllm")
        import vllm_cases  # noqa: F401


def test_neutral_values_are_told_apart_by_type() -> None:
    check: Callable[[Any], str | None] = lambda value: misfit(Config(1, scale=value), KNOWN)  # noqa: E731
    assert check(1.0) == "Config.scale is 1.0"
