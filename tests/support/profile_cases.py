"""A bench without a GPU whose behaviour is scripted. A spawned process can import this module."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any


class FakeBench:
    """A bench whose methods `warm`, `check` and `time` act by the configuration's name. `open` keeps the ids."""

    def __init__(self) -> None:
        self.topk_ids: Any = None
        self.answers = True

    def open(self, topk_ids: Any) -> None:
        self.topk_ids = topk_ids

    def warm(self, kernel: str, config: str) -> None:
        self._do(config)

    def check(self, kernel: str, config: str) -> None:
        self._do(config)

    def time(self, kernel: str, config: str, launches: int, patience_us: float = 0.0) -> list[float]:
        self._do(config)
        return [float(self.topk_ids.sum())] * launches

    def time_stages(self, kernel: str, config: str, launches: int) -> dict[str, list[float]]:
        return {f"{kernel}/{config}": self.time(kernel, config, launches)}

    def healthy(self) -> bool:
        return self.answers

    def _do(self, what: str) -> None:
        if what == "raises":
            raise ValueError("\n  no such thing\nand more of it")
        if what == "raises silently":
            raise ValueError
        if what == "raises at length":
            raise ValueError("x" * 10_000)
        if what == "breaks the context":
            self.answers = False
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")
        if what == "exits":
            print("only a line on stdout")
            print("first words\nCUDA error: device-side assert triggered\n", file=sys.stderr)
            os._exit(3)
        if what == "segfaults":
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGSEGV)
        if what == "hangs":
            print("waiting for the GPU", file=sys.stderr)
            time.sleep(600)
        if what == "is interrupted":
            os.kill(os.getpid(), signal.SIGINT)


def cannot_be_made() -> FakeBench:
    raise MemoryError("the GPU is full")


def dies_while_made() -> FakeBench:
    os._exit(7)
