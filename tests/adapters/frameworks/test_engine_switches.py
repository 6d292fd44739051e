"""Environment variables that switch a plugin on."""

from __future__ import annotations

import ast
import logging
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
from ramp_moe.spec.compiling import OFF, ON
from ramp_moe_adapters.frameworks import sglang, vllm
from ramp_moe_adapters.frameworks.switches import switched_on
from ramp_moe_adapters.kernels.vllm_triton import static_table as vllm_static
from ramp_moe_adapters.kernels.vllm_triton.kernel import VllmTriton

ROOT = Path(__file__).parents[3]
LOGGER = logging.getLogger("vllm.ramp_moe")


@pytest.mark.parametrize("value", [v for word in ON for v in (word, word.upper(), f" {word.title()} ")])
def test_words_that_switch_on(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, value: str) -> None:
    monkeypatch.setenv(vllm.SWITCH, value)
    monkeypatch.setattr(VllmTriton, "unavailable", lambda self: "reached")
    vllm.register()
    assert caplog.messages == ["RAMP_MOE_VLLM is set, but reached"]


@pytest.mark.parametrize("value", [None, "", *(v for word in OFF for v in (word, word.upper()))])
def test_words_that_switch_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, value: str | None
) -> None:
    if value is None:
        monkeypatch.delenv(vllm.SWITCH, raising=False)
    else:
        monkeypatch.setenv(vllm.SWITCH, value)
    assert not switched_on(vllm.SWITCH, LOGGER)
    assert not caplog.messages


@pytest.mark.parametrize("value", ["2", "enable", "ja", "1 1"])
def test_other_words_are_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, value: str) -> None:
    monkeypatch.setenv(vllm.SWITCH, value)
    vllm.register()
    (line,) = caplog.messages
    assert line == f"RAMP_MOE_VLLM={value} says neither on (1, true, yes, on) nor off (0, false, no, off): off"


def test_whatever_install_raises_the_server_lives(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """There is no vllm here, or it is the real one; either way its import is made to fail."""
    monkeypatch.setenv(vllm.SWITCH, "yes")
    monkeypatch.setattr(VllmTriton, "unavailable", lambda self: None)
    monkeypatch.setitem(sys.modules, "ramp_moe_adapters.frameworks.vllm.layer", None)
    vllm.register()
    (line,) = caplog.messages
    assert line.startswith("RAMP_MOE_VLLM is set, but vllm's experts cannot be replaced (ModuleNotFoundError:")


@pytest.mark.parametrize("version", ["0.4.9", "0.6.0", "0.50.1", "1.0.0", None])
def test_another_sglang_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, version: str | None
) -> None:
    def found(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", found)
    monkeypatch.setitem(sys.modules, "ramp_moe_adapters.frameworks.sglang.runner", None)  # not to be reached
    sglang.register()
    (line,) = caplog.messages
    assert line.startswith("ramp_moe is no backend of sglang")
    assert "import" not in line


def test_whatever_sglangs_runner_raises_the_server_lives(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "0.5.99")
    monkeypatch.setitem(sys.modules, "ramp_moe_adapters.frameworks.sglang.runner", None)
    monkeypatch.delattr(sglang, "runner", raising=False)
    sglang.register()
    (line,) = caplog.messages
    assert line.startswith("ramp_moe is no backend of sglang 0.5.99: ModuleNotFoundError: ")


@pytest.mark.parametrize(
    ("version", "fits"), [("0.33.0", True), ("0.33.4", True), ("0.34.0", False), ("1.33.0", False)]
)
def test_another_vllm_is_left_alone(monkeypatch: pytest.MonkeyPatch, version: str, fits: bool) -> None:
    monkeypatch.setattr(vllm_static, "package", lambda: ROOT)
    monkeypatch.setattr(metadata, "version", lambda name: version)
    assert (VllmTriton().unavailable() is None) == fits


READ = {
    "RAMP_MOE_VLLM": "a switch",
    "RAMP_MOE_PLUGINS": "a list of names",
    "RAMP_MOE_CACHE": "a folder",
    "RAMP_MOE_CALIBRATE_S": "seconds",
    "RAMP_MOE_RECORD": "a file",
    "RAMP_MOE_COMPILE": "on unless it is switched off",
}


def test_every_variable_is_known_and_switches_are_read_alike() -> None:
    """A switch that is added shall be read by `switched_on`, too."""
    found: dict[str, list[Path]] = {}
    for package in ("core", "adapters", "kernels"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    for name in re.findall(r"^RAMP_MOE_[A-Z_]+$", node.value):
                        found.setdefault(name, []).append(file)
    assert set(found) == set(READ)
    for name, kind in READ.items():
        if kind == "a switch":
            assert all("switched_on" in file.read_text() for file in found[name])
