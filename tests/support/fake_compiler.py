"""A compiler whose behaviour per configuration is scripted, in real worker processes. It logs each that it begins."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from ramp_moe_kernels.cute.aot.compiler import Compiler
from ramp_moe_kernels.cute.aot.cubin import Usage
from ramp_moe_kernels.cute.aot.worker import Maker

FOLDER = "FAKE_COMPILER"


@dataclass(frozen=True)
class Fake:
    name: str
    size: int = 0


class Machine:
    """A machine with the scripted compiler. `acts` gives the action of `make` by configuration; None keeps the actions
    that are set. Any other configuration compiles to a library of its name."""

    def __init__(self, folder: Path, acts: dict[str, str] | None = None) -> None:
        folder.mkdir(exist_ok=True)
        self._log = folder / "log"
        self._log.touch()
        if acts is not None:
            whole = folder / f"acts-{os.getpid()}"  # two processes may share the folder
            whole.write_text(json.dumps(acts))
            whole.replace(folder / "acts")
        self.compiler = Compiler(f"{__name__}:make", {FOLDER: str(folder)}, self._check)
        self.checks = 0

    def _check(self, folder: Path) -> None:
        self.checks += 1

    def compiled(self) -> list[str]:
        """The configurations in the order in which they were begun."""
        return self._log.read_text().split()


def make() -> Maker:
    folder = Path(os.environ[FOLDER])
    told = folder / "acts"
    acts = json.loads(told.read_text()) if told.exists() else {}
    if "start" in acts:
        raise ImportError(acts["start"])

    def compile_one(config: Fake, library: Path) -> Usage:
        with (folder / "log").open("a") as log:
            log.write(config.name + "\n")
        act = acts.get(config.name)
        if act == "raises":
            raise TypeError("\x1b[31mno such\n  tile\x1b[0m")
        if act == "dies":
            print("out of luck", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if act == "no room":
            raise OSError(28, "No space left on device")
        if act == "hangs":
            time.sleep(1000)
        if act == "is slow":
            time.sleep(0.3)
        library.write_bytes(config.name.encode() * 10)
        return Usage(168, 216 if act == "spills" else 0)

    return compile_one
