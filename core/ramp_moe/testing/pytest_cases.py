"""The checks of `ramp_moe.testing.description` as tests, for the author of a kernel:

    from ramp_moe.testing import KernelConformance

    class TestMyKernel(KernelConformance):
        kernel = MyKernel()

Without a GPU, this module lets Triton's kernels run in the interpreter, if it is imported before Triton.
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
    """One test per check; a test that fails shows the check's line.

    All tests run in this process. If a kernel ends the process or breaks its GPU, use `ramp-moe check-kernel` instead.

    kernel: the kernel to test.
    shapes: shapes to describe it for (default: olmoe-1b-7b in the first dtype that it supports).
    device: name of the registered hardware to describe it on.
    launch_shape: shape to launch it on (default: a small one that it supports).
    configs: number of configurations to launch, as for Conformance.
    """

    kernel: ClassVar[Kernel]
    shapes: ClassVar[Sequence[MoEShape]] = ()
    device: ClassVar[str] = "h200"
    launch_shape: ClassVar[MoEShape | None] = None
    configs: ClassVar[int | None] = None
    _made: ClassVar[Sequence[Conformance]]

    @classmethod
    def conformances(cls) -> Sequence[Conformance]:
        """One Conformance per shape. All tests of the class share them, and so their launches."""
        if "_made" not in vars(cls):
            hardware = get_registry().device(cls.device)
            shapes = cls.shapes or (supported_shape(cls.kernel, device=cls.device),)
            cls._made = [Conformance(cls.kernel, s, hardware, cls.launch_shape, cls.configs) for s in shapes]
        return cls._made

    def check(self, name: str) -> None:
        """Run one check for every shape. Fails if any shape fails, and skips if all shapes are skipped."""
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
