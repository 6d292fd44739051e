"""`ramp-moe env`: everything that a bug report needs, whatever is broken."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ramp_moe
from click.testing import CliRunner
from ramp_moe import Registry
from ramp_moe.cli import env, main
from ramp_moe.errors import HardwareError, RampMoEError
from ramp_moe.measurements.calibration_file import CalibrationRecord, PlanRow, save
from ramp_moe.profiler import gpu

SECTIONS = ("versions", "gpus", "kernels", "caches", "profiles", "engines", "variables", "plugins")


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAMP_MOE_CACHE", "RAMP_MOE_VLLM"):
        monkeypatch.delenv(name, raising=False)


def no_gpu() -> list[tuple[str, str]]:
    raise HardwareError("cannot run nvidia-smi")


def found() -> dict[str, Any]:
    result = CliRunner().invoke(main, ["env", "--json"])
    assert result.exit_code == 0, result.output
    answer: dict[str, Any] = json.loads(result.stdout)
    assert tuple(answer) == SECTIONS
    text = CliRunner().invoke(main, ["env"])
    assert text.exit_code == 0, text.output
    assert [line for line in text.stdout.splitlines() if not line.startswith("  ")] == list(SECTIONS)
    return answer


def test_versions_of_what_is_installed() -> None:
    versions = {row["name"]: row["version"] for row in found()["versions"]}
    assert versions["ramp-moe"].startswith(f"{ramp_moe.__version__} (")
    assert versions["numpy"] == metadata.version("numpy")
    assert "vllm" not in versions or versions["vllm"] == metadata.version("vllm")


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "installed_gpus", no_gpu)
    monkeypatch.setattr(env, "AMD_DRIVER", Path("/nowhere"))
    answer = found()
    assert answer["gpus"] == [{"error": "none: cannot run nvidia-smi"}]
    kernels = {row["name"]: row for row in answer["kernels"]}
    assert kernels.keys() == Registry().kernels.keys()
    for row in kernels.values():
        assert (row["runs"] == "no") == bool(row["reason"])
    assert "yes" not in {row["runs"] for row in kernels.values()}


def test_gpus_and_the_kernels_that_know_them(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [("NVIDIA A100-SXM4-80GB", "580.1"), ("NVIDIA Unheard Of", "580.1")]
    monkeypatch.setattr(env, "installed_gpus", lambda: gpus)
    monkeypatch.setattr(env, "why_unavailable", lambda kernel: None)
    answer = found()
    known, unknown = answer["gpus"]
    assert (known["hardware"], known["problem"]) == ("a100-sxm", None)
    assert unknown["hardware"] is None
    assert "ramp_moe_hardware" in unknown["problem"]
    runs = {row["name"]: (row["runs"], row["reason"]) for row in answer["kernels"]}
    assert runs["triton"] == ("yes", None)
    assert runs["cute"][0] == "no"
    assert "sm_80" in runs["cute"][1]


def test_gpus_of_amd_are_named_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(device_count=lambda: 1, get_device_name=lambda i: "AMD Instinct MI300X")
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda, version=SimpleNamespace(hip="7.0")))
    monkeypatch.setattr(env, "installed_gpus", no_gpu)
    monkeypatch.setattr(env, "AMD_DRIVER", Path(__file__))
    (row,) = found()["gpus"]
    assert (row["hardware"], row["driver"]) == ("mi300x", "ROCm 7.0")


def test_nvidia_smi_names_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = SimpleNamespace(stdout="580.1, NVIDIA H200\n580.1, A, B\n", stderr="", returncode=0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *args, **options: answer)
    assert gpu.installed_gpus() == [("NVIDIA H200", "580.1"), ("A, B", "580.1")]


def test_caches_and_the_folder_of_profiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data_home: Path) -> None:
    (tmp_path / "cute" / "v1").mkdir(parents=True)
    (tmp_path / "cute" / "v1" / "a.so").write_bytes(b"12345")
    monkeypatch.setenv("RAMP_MOE_CACHE", str(tmp_path))
    place = data_home / "ramp-moe" / "profiles" / "h200" / "triton"
    place.mkdir(parents=True)
    for name in ("a.json", "b.json", "b.fit.json"):
        (place / name).write_text("{}")
    answer = found()
    assert {"name": "compiled objects", "folder": str(tmp_path), "files": 1, "bytes": 5} in answer["caches"]
    (profiles,) = answer["profiles"]
    assert (profiles["name"], profiles["files"], profiles["bytes"]) == ("2 sweeps, 1 fits", 3, 6)


@pytest.mark.parametrize(
    ("name", "value", "meaning"),
    [
        ("RAMP_MOE_VLLM", "Yes", "on"),
        ("RAMP_MOE_VLLM", "0", "off"),
        ("RAMP_MOE_VLLM", "perhaps", "neither on"),
        ("RAMP_MOE_CACHE", "/nowhere", "/nowhere"),
        ("RAMP_MOE_PLUGINS", "a,b", "third-party"),
        ("RAMP_MOE_VLM", "1", "did you mean RAMP_MOE_VLLM?"),
    ],
)
def test_variables_are_understood_or_not(name: str, value: str, meaning: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    (row,) = found()["variables"]
    assert (row["name"], row["value"]) == (name, value)
    assert meaning in row["meaning"]


def installed(version: Callable[[str], str], **versions: str) -> Callable[[str], str]:
    return lambda name: versions.get(name) or version(name)


@pytest.mark.parametrize(
    ("switch", "versions", "states"),
    [
        ("1", {"vllm": "0.40.0", "sglang": "0.6.0"}, ("left alone, although", "left alone")),
        ("", {"vllm": "0.33.0", "sglang": "0.5.23"}, ("set RAMP_MOE_VLLM=1", "--moe-runner-backend ramp_moe")),
    ],
)
def test_what_plugins_of_engines_would_do(
    switch: str, versions: dict[str, str], states: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAMP_MOE_VLLM", switch)
    monkeypatch.setattr(metadata, "version", installed(metadata.version, **versions))
    engines = found()["engines"]
    assert [row["name"] for row in engines] == [f"{name} {version}" for name, version in versions.items()]
    for row, state in zip(engines, states, strict=True):
        assert state in row["state"]


class Broken:
    """A plugin whose diagnostics end in an error, or are none."""

    @ramp_moe.hookimpl
    def ramp_moe_diagnostics(self) -> Iterator[object]:
        yield "no Diagnostic"


def test_a_broken_plugin_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry()
    registry._register(ramp_moe.registry.registry.Plugin("broken", "1", "here"), Broken)
    monkeypatch.setattr(env, "get_registry", lambda: registry)
    assert "is not a Diagnostic" in str(found()["plugins"][-1])


@pytest.mark.parametrize("error", [RampMoEError("it is gone"), ValueError("it is gone"), OSError("it is gone")])
@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_that_fails_says_so(section: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(registry: Registry) -> None:
        raise error

    monkeypatch.setattr(env, f"_{section}", fail)
    answer = found()
    assert "it is gone" in answer[section][0]["error"]
    assert not [name for name, rows in answer.items() if name != section and rows and "it is gone" in str(rows)]


def test_a_registry_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Registry:
        raise RuntimeError("no registry")

    monkeypatch.setattr(env, "get_registry", fail)
    assert found()["plugins"] == [{"error": "RuntimeError: no registry"}]


def test_it_imports_nothing_heavy() -> None:
    code = """
import sys
from ramp_moe.cli import main
main(["env"], standalone_mode=False)
print(sorted({"torch", "triton", "vllm", "sglang", "transformers", "pytest", "cutlass"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_version_is_the_installed_one() -> None:
    pyproject = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    assert ramp_moe.__version__ == pyproject["project"]["version"]
    assert ramp_moe.__version__ in CliRunner().invoke(main, ["--version"]).output


def test_sources_that_are_not_installed_have_a_version() -> None:
    code = """
from importlib import metadata
def missing(name):
    raise metadata.PackageNotFoundError(name)
metadata.version = missing
import ramp_moe
from ramp_moe.cli import main
print(ramp_moe.__version__)
main(["--version"], standalone_mode=False)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["0+unknown", "ramp-moe, version 0+unknown"]


@pytest.mark.parametrize(("engine", "version"), [("vLLM", "0.33.0"), ("SGLang", "0.5.23")])
def test_what_a_server_would_do_with_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, version: str
) -> None:
    """By what it measured here; of the model's shape, in any dtype, and of no other."""
    monkeypatch.setenv("RAMP_MOE_CACHE", str(tmp_path))
    nothing = CliRunner().invoke(main, ["env", "--model", "olmoe-1b-7b"])
    assert nothing.exit_code == 0
    assert f"no server has measured the model here yet: {tmp_path}/calibration has nothing of it" in nothing.output
    rows = [PlanRow(n, "triton/a" if n < 8 else "", "single", 1, 9.0, 9.5, 10.0, 0.1) for n in (1, 2, 4, 8)]
    for shape in ("E64-k8-h2048-i1024-bf16", "E8-k2-h4096-i14336-bf16"):
        key = {"engine": engine, "gpu": "NVIDIA H200", "driver": "580.1", "shape": shape, engine.lower(): version}
        save(CalibrationRecord(key=key, complete=True, seconds=1.0, timings=[], plan=rows, left=f"left of {shape}"))
    for model in ("olmoe-1b-7b", "E64-k8-h2048-i1024-bf16"):
        found = CliRunner().invoke(main, ["env", "--model", model])
        assert f"E64-k8-h2048-i1024-bf16 on NVIDIA H200, driver 580.1, in {engine} {version}: complete" in found.output
        lines = [line.split() for line in found.output.splitlines()]
        assert ["1-4", "triton/a", "single", "1", "9.0", "us", "9.5", "us", "10.0", "us", "0.1", "us"] in lines
        assert "left of E64" in found.output
        assert "left of E8" not in found.output
        (plan,) = json.loads(CliRunner().invoke(main, ["env", "--model", model, "--json"]).stdout)["plans"]
        assert [row["tokens"] for row in plan["plan"]] == [1, 2, 4, 8]
    unknown = CliRunner().invoke(main, ["env", "--model", "olmo"])
    assert unknown.exit_code == 2
    assert "unknown model 'olmo'" in unknown.output


def test_a_plan_whose_key_lacks_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAMP_MOE_CACHE", str(tmp_path))
    save(CalibrationRecord(key={"shape": "E64-k8-h2048-i1024-bf16"}, complete=False, seconds=1.0, timings=[]))
    path = tmp_path / "calibration" / "no-shape.json"
    path.write_text(
        '{"format": "ramp-moe/calibration", "version": 1, "key": {}, "complete": true, "seconds": 1, "timings": []}'
    )
    found = CliRunner().invoke(main, ["env", "--model", "olmoe-1b-7b"])
    assert found.exit_code == 0, found.output
    assert "E64-k8-h2048-i1024-bf16 on ?, driver ?, in ? : cut short" in found.output
