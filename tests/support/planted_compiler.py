"""A kernel that is compiled ahead, by a compiler that waits to be told."""

from __future__ import annotations

import queue
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from layer_cases import FakeKernel
from ramp_moe import KernelConfig, KernelError
from ramp_moe.spec.kernel import BuildableKernel, Built


class Planted(BuildableKernel):
    """`allow` has one more configuration compiled.

    objects: the reason of each that is compiled, as `built` says. asked: what was to be compiled, in that order.
    """

    def __init__(self, objects: Iterable[str] = (), spills: Iterable[str] = (), fails: str | None = None) -> None:
        super().__init__()
        self.objects: dict[str, str | None] = dict.fromkeys(objects, None)
        self.asked: list[str] = []
        self._spills, self._fails, self._tickets = {*spills}, fails, queue.SimpleQueue[None]()

    def __deepcopy__(self, memo: dict[int, Any]) -> Planted:
        return self

    def build(self, *_: Any) -> Built:
        raise NotImplementedError

    def prune(self) -> int:
        return 0

    def allow(self, count: int = 1) -> None:
        for _ in range(count):
            self._tickets.put(None)

    def built(self, configs: Sequence[KernelConfig]) -> dict[str, str | None]:
        return {c.name: self.objects[c.name] for c in configs if c.name in self.objects}

    def build_each(
        self, configs: Iterable[KernelConfig], jobs: int | None = None, nice: int = 0
    ) -> Iterator[tuple[str, str | None]]:
        if self._fails is not None:
            raise KernelError(self._fails)
        for config in configs:
            self.asked.append(config.name)
            self._tickets.get(timeout=60)
            reason = self.objects[config.name] = "it spills" if config.name in self._spills else None
            yield config.name, reason


class Compiled(Planted, FakeKernel):
    """It refuses to run what is not compiled."""

    def __init__(self, objects: Iterable[str] = (), spills: Iterable[str] = (), fails: str | None = None) -> None:
        super().__init__(objects, spills, fails)
        self.name = "compiled"

    def run(self, config: KernelConfig, *given: Any) -> None:
        assert self.objects.get(config.name, "absent") is None, f"{config.name} is not compiled"
        super().run(config, *given)
