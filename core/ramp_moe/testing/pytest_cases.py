"""The checks of `ramp_moe.testing.description` as tests, for the author of a kernel:

    from ramp_moe.testing import KernelConformance

    class TestMyKernel(KernelConformance):
        kernel = MyKernel()

Imported before Triton, this module lets its kernels run in the interpreter where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import pytest

from ..registry.registry import get_registry
from ..spec.kernel import Kernel
from ..spec.shapes import MoEShape
from .description import Conformance, interpret_without_gpu, supported_shape

interpret_without_gpu()


class KernelConformance:
    """One test for each check, which fails with the check's line. All run in this process: a kernel that ends it, or
    breaks its GPU, is better looked at with `ramp-moe check-kernel`.

    kernel: the kernel. shapes: what to describe it for (default: olmoe-1b-7b in the first dtype that it supports).
    device: the registered hardware to describe it on. launch_shape: what to launch on (default: something small).
    configs: how many configurations to launch, as Conformance takes it.
    """

    kernel: ClassVar[Kernel]
    shapes: ClassVar[Sequence[MoEShape]] = ()
    device: ClassVar[str] = "h200"
    launch_shape: ClassVar[MoEShape | None] = None
    configs: ClassVar[int | None] = None
    _made: ClassVar[Sequence[Conformance]]

    @classmethod
    def conformances(cls) -> Sequence[Conformance]:
        """One for each shape, the same for all tests of the class: runs are shared."""
        if "_made" not in vars(cls):
            hardware = get_registry().device(cls.device)
            shapes = cls.shapes or (supported_shape(cls.kernel, device=cls.device),)
            cls._made = [Conformance(cls.kernel, s, hardware, cls.launch_shape, cls.configs) for s in shapes]
        return cls._made

    def check(self, name: str) -> None:
        """Run one check for every shape. Fails where one fails, and is skipped where all are."""
        outcomes = [c.run(name) for c in self.conformances()]
        for outcome in outcomes:
            if outcome.result == "failed":
                pytest.fail(f"{name}: {outcome.detail}", pytrace=False)
        if all(outcome.result == "skipped" for outcome in outcomes):
            pytest.skip(outcomes[0].detail)

    def test_name(self) -> None:
        self.check("name")

    def test_reasons(self) -> None:
        self.check("reasons")

    def test_configs(self) -> None:
        self.check("configs")

    def test_layout(self) -> None:
        self.check("layout")

    def test_geometry(self) -> None:
        self.check("geometry")

    def test_default_config(self) -> None:
        self.check("default-config")

    def test_outputs(self) -> None:
        self.check("outputs")

    def test_layouts(self) -> None:
        self.check("layouts")

    def test_bounds(self) -> None:
        self.check("bounds")

    def test_inputs(self) -> None:
        self.check("inputs")

    def test_repeatable(self) -> None:
        self.check("repeatable")

    def test_workspace(self) -> None:
        self.check("workspace")

    def test_steps(self) -> None:
        self.check("steps")

    def test_asynchronous(self) -> None:
        self.check("asynchronous")

    def test_graph(self) -> None:
        self.check("graph")

    def test_threads(self) -> None:
        self.check("threads")
