"""Plugins made of real distributions in a folder on the path: loaded through entry points, as a stranger's are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ramp_moe import Registry
from ramp_moe.cli.listing import describe_kernel

HOOK = "from ramp_moe import *\nfrom ramp_moe import hookimpl\n"
KERNEL = (
    HOOK
    + """
class Mine(Kernel):
    name = "NAME"
    def configs(self, shape, hardware):
        return []
    def weight_layout(self, shape):
        return WeightLayout("gate-first", 1)

@hookimpl
def ramp_moe_kernels():
    return [Mine()]
"""
)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """install(name, source) makes an importable module with an entry point of that name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, source: str, module: str | None = None) -> None:
        module = module or f"ramp_test_{name}"
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{name}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[ramp_moe]\n{name} = {module}\n")
        sys.modules.pop(module, None)

    return write


def plugin(registry: Registry, name: str):
    return next(p for p in registry.plugins if p.name == name)


def test_built_ins_come_first_and_are_healthy(registry: Registry) -> None:
    assert [p.name for p in registry.plugins][:2] == ["built-in", "adapters"]
    assert all(p.loaded and not p.problems for p in registry.plugins[:2])
    assert {"alpha_moe", "vllm_triton"} <= registry.kernels.keys()


def test_a_plugin_adds_kernel_model_and_hardware(install) -> None:
    install(
        "good",
        KERNEL.replace("NAME", "mine")
        + """
import dataclasses
@hookimpl
def ramp_moe_models():
    yield Model(MoEShape(4, 2, 256, 128, name="tiny"), "a test")

@hookimpl
def ramp_moe_hardware():
    from ramp_moe.registry.gpus import GPUS
    yield dataclasses.replace(GPUS[0], name="my-gpu")
""",
    )
    registry = Registry()
    found = plugin(registry, "good")
    assert (found.loaded, found.problems, found.version) == (True, [], "1.2")
    assert found.origin == "good (ramp_test_good)"
    assert found.hooks == ["ramp_moe_hardware", "ramp_moe_kernels", "ramp_moe_models"]
    assert registry.kernel("mine").name == "mine"
    assert registry.shape("tiny").num_experts == 4
    assert registry.device("my-gpu").num_sms == 132


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("import nowhere_to_be_found", "loading: ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("raise SystemExit(3)", "loading: SystemExit: 3"),
        ("def broken(:", "loading: SyntaxError"),
        ("x = 1", "implements no hook of ramp_moe"),
        (HOOK + "@hookimpl\ndef ramp_moe_kernel(): return []", "implements ramp_moe_kernel, which is no hook"),
        (HOOK + "@hookimpl\ndef ramp_moe_kernels(): 1 / 0", "ramp_moe_kernels: ZeroDivisionError: division by zero"),
        (HOOK + "@hookimpl\ndef ramp_moe_kernels():\n yield 3", "ramp_moe_kernels: 3 is not a Kernel with a name"),
        (HOOK + "@hookimpl\ndef ramp_moe_profiles(): return ['/x']", "/x is not a folder"),
        (KERNEL.replace("NAME", "alpha_moe"), "'alpha_moe' is already given by plugin 'adapters'"),
        (
            KERNEL.replace("NAME", "alpha_moe").replace("@hookimpl", "@hookimpl(trylast=True)"),
            "'alpha_moe' is already given by plugin 'adapters'",
        ),
        (KERNEL.replace("NAME", "a b"), "is not a Kernel with a name of letters, digits"),
        (KERNEL.replace('name = "NAME"', "name = property(lambda self: 1 / 0)"), "ZeroDivisionError"),
        ("class Panic(BaseException): pass\nraise Panic('in rust')", "loading: Panic: in rust"),
        (
            HOOK + "class X:\n def __repr__(self): 1 / 0\n@hookimpl\ndef ramp_moe_models(): return [X()]",
            "its __str__ raises ZeroDivisionError",
        ),
        (HOOK + "@hookimpl\ndef ramp_moe_kernels():\n yield 3\n raise OSError('gone')", "kernels: OSError: gone"),
        ("import time; time.sleep(1.1)\n" + KERNEL.replace("NAME", "slow"), "s to load"),
    ],
)
def test_a_bad_plugin_is_reported_and_stops_nothing(install, source: str, problem: str) -> None:
    install("bad", source)
    install("zgood", KERNEL.replace("NAME", "mine"))
    registry = Registry()
    assert any(problem in p for p in plugin(registry, "bad").problems)
    assert plugin(registry, "zgood").problems == []
    assert {"alpha_moe", "mine"} <= registry.kernels.keys()
    assert registry.models.keys() >= {"olmoe-1b-7b"}


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("def configs(self, s, h): 1 / 0", "fails to describe itself: ZeroDivisionError"),
        ("def configs(self, s, h): return [3]", "something that is not a KernelConfig"),
        ("def configs(self, s, h): return [KernelConfig('a', ())] * 2", "names two configurations alike"),
        ("def unsupported(self, s, h): 1 / 0", "ZeroDivisionError"),
        ("def unsupported(self, s, h): return ''", "unsupported, without a reason"),
        ("def weight_layout(self, s): 1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_kernel_that_fails_to_describe_itself_is_listed_with_its_error(install, method: str, reason: str) -> None:
    source = (
        HOOK
        + f"""
class Mine(Kernel):
    name = "mine"
    def configs(self, s, h): yield KernelConfig("a", ())
    def weight_layout(self, s): return WeightLayout("gate-first", 1)
    {method}

@hookimpl
def ramp_moe_kernels(): yield Mine()
"""
    )
    install("bad", source)
    registry = Registry()
    shape, hardware = registry.shape("olmoe-1b-7b", "fp8"), registry.device("h200")
    count, _, found = describe_kernel(registry.kernel("mine"), shape, hardware)
    assert count == 0
    assert reason in (found or "")
    assert describe_kernel(registry.kernel("alpha_moe"), shape, hardware)[0] == 152


def test_what_a_plugin_prints_stays_out_of_json(install, capsys: pytest.CaptureFixture[str]) -> None:
    install("loud", "print('hello')\n" + KERNEL.replace("NAME", "mine"))
    Registry()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "hello" in captured.err


def test_names_are_found_in_any_case(install) -> None:
    install("case", KERNEL.replace("NAME", "My-Kernel"))
    assert Registry().kernel("my-kernel").name == "My-Kernel"


def test_a_second_entry_point_of_the_same_module_is_reported(install) -> None:
    install("one", KERNEL.replace("NAME", "mine"), module="ramp_test_shared")
    install("two", KERNEL.replace("NAME", "mine"), module="ramp_test_shared")
    registry = Registry()
    assert plugin(registry, "one").problems == []
    assert any("loading: ValueError" in p for p in plugin(registry, "two").problems)
    assert "mine" in registry.kernels


def test_allow_list(install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("first", KERNEL.replace("NAME", "mine"))
    install("second", KERNEL.replace("NAME", "other"))
    monkeypatch.setenv("RAMP_MOE_PLUGINS", "second, absent")
    registry = Registry()
    assert "other" in registry.kernels
    assert "alpha_moe" in registry.kernels
    assert "mine" not in registry.kernels
    assert plugin(registry, "absent").problems == ["named in RAMP_MOE_PLUGINS but not installed"]
    monkeypatch.setenv("RAMP_MOE_PLUGINS", "")
    assert "other" not in Registry().kernels


def test_the_command_shows_failures(install, tmp_path: Path) -> None:
    install("bad", "import nowhere_to_be_found")
    code = "from ramp_moe.cli import main; main(['plugins', '--json'])"
    path = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    run = subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, text=True, check=True)
    rows = {p["name"]: p for p in json.loads(run.stdout)}
    assert not rows["bad"]["loaded"]
    assert "nowhere_to_be_found" in rows["bad"]["problems"][0]
    assert rows["adapters"]["loaded"]
