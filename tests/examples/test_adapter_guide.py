"""The guide's code is a kernel that keeps the contract, as that of the example plugin does; its commands exist."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import click
from ramp_moe import MoEShape
from ramp_moe.cli import main
from ramp_moe.testing import KernelConformance

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES / "kernel_plugin"))

from ramp_moe_simple_triton import SimpleTriton  # noqa: E402 - the plugin is on the path, not installed

GUIDE = (EXAMPLES / "kernel_plugin" / "adapter_guide.md").read_text()
KERNEL, HOOK, TESTS = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
NAMES: dict[str, Any] = {"__name__": "guide"}
exec(compile(KERNEL + HOOK + TESTS, "adapter_guide.md", "exec"), NAMES)


class TestGuide(NAMES["TestGuide"]):
    launch_shape = MoEShape(4, 2, 128, 128, "fp8")


class TestSimpleTriton(KernelConformance):
    kernel = SimpleTriton()
    launch_shape = MoEShape(4, 2, 128, 128, "fp8")


def test_the_hook_gives_the_kernel() -> None:
    assert [kernel.name for kernel in NAMES["ramp_moe_kernels"]()] == ["guide"]
    assert len(KERNEL.splitlines()) <= 45


def test_the_commands_are_understood() -> None:
    commands = re.findall(r"^    ramp-moe (.*)$", GUIDE, re.MULTILINE)
    assert [line.split()[0] for line in commands] == ["check-kernel", "profile", "compare"]
    for line in commands:
        name, *args = shlex.split(line)
        command = main.commands[name]
        assert isinstance(command.make_context(name, args), click.Context)
