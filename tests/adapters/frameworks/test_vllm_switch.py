"""vLLM's plugin where it is switched off, or vLLM is not what it was written for."""

from __future__ import annotations

import logging
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
from ramp_moe_adapters.frameworks import vllm
from ramp_moe_adapters.kernels.vllm_triton.kernel import VllmTriton


def test_the_entry_point_names_it() -> None:
    assert (
        EntryPoint("ramp_moe", "ramp_moe_adapters.frameworks.vllm:register", "vllm.general_plugins").load()
        is vllm.register
    )


def test_off_it_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(vllm.SWITCH, raising=False)
    code = (
        "import sys, ramp_moe_adapters.frameworks.vllm as v; v.register(); print({'torch', 'vllm'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "set()"


def test_another_version_is_left_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(vllm.SWITCH, "1")
    monkeypatch.setattr(VllmTriton, "unavailable", lambda self: "vllm 0.40 is not one of the versions")
    with caplog.at_level(logging.WARNING, "vllm.ramp_moe"):
        vllm.register()
    assert caplog.messages == ["RAMP_MOE_VLLM is set, but vllm 0.40 is not one of the versions"]
