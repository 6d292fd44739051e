"""A whole model in SGLang's own classes, without a GPU: its layers are made and warmed up when it is loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang.srt.layers.moe.moe_runner")

import torch
from moe_cases import batch, error, expected, weights
from ramp_moe import KernelError
from ramp_moe.runtime.layer_factory import Builder
from ramp_moe_adapters.frameworks.sglang import model as whole
from ramp_moe_adapters.frameworks.sglang import runner as plugin
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang_cases import Experts, selected

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="of what is said and made, for which no GPU is needed"
)
E, K, H, I = 8, 2, 256, 128  # noqa: E741
CHUNK = 6
HALF = torch.float16


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Builder]:
    found = Builder("h200")
    monkeypatch.setattr(plugin, "_builder", found)
    monkeypatch.setattr(plugin, "_said", set())
    with selected(chunked_prefill_size=CHUNK):
        yield found


def served(number: int = 2, top_k: int | None = K, told: int | None = K) -> Any:
    """What SGLang calls a model runner, with a model of so many layers of experts. told: top_k of the model's
    configuration; top_k: of the layer's."""
    layers = [Experts(weights(E, H, I, "fp16", "cpu"), top_k).layer for _ in range(number)]
    text = SimpleNamespace(num_experts_per_tok=told)
    return SimpleNamespace(
        model=torch.nn.ModuleList(layers), model_config=SimpleNamespace(hf_text_config=text, dtype=HALF)
    )


def core(runner: Any, layer: int = 0) -> Any:
    return runner.model[layer].quant_method.runner.runner_core


def test_sglang_calls_both_hooks() -> None:
    whole.install()
    HookRegistry.apply_hooks()
    for target in (whole.LOADED, whole.CAPTURED):
        assert target in HookRegistry._patched, "SGLang has no such method"


@pytest.mark.parametrize("top_k", [K, None])
def test_layers_are_made_when_the_model_is_loaded(builder: Builder, top_k: int | None) -> None:
    """Some of SGLang's models do not tell their experts how many a token visits."""
    runner = served(top_k=top_k)
    whole.loaded(None, runner)
    assert [core(runner, i).made for i in (0, 1)] == [True, True]
    made = core(runner).layer
    whole.loaded(None, runner)
    assert core(runner).layer is made, "they are made once"


def test_what_was_made_computes(builder: Builder) -> None:
    given, of = batch(5, K, E, H, "uniform", "cpu", HALF), weights(E, H, I, "fp16", "cpu")
    experts = Experts(of, K)
    runner = SimpleNamespace(
        model=torch.nn.ModuleList([experts.layer]),
        model_config=SimpleNamespace(hf_text_config=SimpleNamespace(num_experts_per_tok=K), dtype=HALF),
    )
    whole.loaded(None, runner)
    made = core(runner).layer
    assert error(experts(given), expected(of, given, False)) < 4e-3
    assert core(runner).layer is made


def test_a_layer_that_cannot_be_made_is_sglangs(
    builder: Builder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is raised: the server starts, and the reason is said once."""
    for failure in (
        torch.OutOfMemoryError("none is left"),
        KernelError("no kernel"),
        RuntimeError("an illegal access"),
    ):
        runner = served()
        with monkeypatch.context() as patch:

            def fail(*_: Any, error: Exception = failure) -> Any:
                raise error

            patch.setattr(Builder, "layer", fail)
            whole.loaded(None, runner)
        assert not core(runner).made
        assert sum(str(failure) in line for line in caplog.messages) == 1
        caplog.clear()
        with caplog.at_level(logging.INFO, "ramp_moe"):
            whole.captured(None, runner)
        assert caplog.messages == ["ramp_moe: 2 of 2 layers are SGLang's own"]


def test_a_model_that_is_not_as_expected_ends_no_server(builder: Builder, caplog: pytest.LogCaptureFixture) -> None:
    whole.loaded(None, SimpleNamespace())
    assert "layers are made when they first run: AttributeError" in caplog.text
    whole.captured(None, SimpleNamespace())
    assert "what was chosen cannot be said: AttributeError" in caplog.text


def test_layers_of_which_nobody_says_top_k_are_made_when_they_run(builder: Builder) -> None:
    runner = served(top_k=None, told=None)
    whole.loaded(None, runner)
    assert not core(runner).made


def test_what_was_dropped_is_said_once(builder: Builder, caplog: pytest.LogCaptureFixture) -> None:
    runner = served()
    whole.loaded(None, runner)
    for i in (0, 1):
        core(runner, i).layer.dropped = {"alpha_moe": "it is not installed"}
    with caplog.at_level(logging.INFO, "ramp_moe"):
        whole.captured(None, runner)
    (line,) = [line for line in caplog.messages if " by triton; weights in " in line]
    assert line.startswith(f"ramp_moe: {core(runner).layer.shape.slug} by "), "once for the kind"
    said = [line for line in caplog.messages if "dropped" in line]
    assert said == ["ramp_moe: dropped alpha_moe: it is not installed"]
