"""The compiler of the cute kernel: what runs in the workers, and what must be there for it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from ..config import Config
from .cache import ARCHITECTURE, Configuration
from .cubin import Usage, usage
from .toolkit import Linker
from .worker import Maker


@dataclass(frozen=True)
class Compiler:
    """`make` is the function that makes a worker's maker, as "module:function"; `variables` are the environment that
    it needs; `check` raises KernelError where something is missing, given a folder to try it in."""

    make: str
    variables: dict[str, str]
    check: Callable[[Path], object]


def make() -> Maker:
    """A maker, once the DSL is imported. Raises KernelError where something is missing."""
    # What someone debugs the DSL with must not get into the cache. It reads its variables when it is imported.
    for name in [n for n in os.environ if n.startswith("CUTE_DSL_") and n not in CUTE.variables]:
        del os.environ[name]
    from .. import moe

    linker = Linker(Path(tempfile.mkdtemp()))

    def compile_and_link(config: Configuration, library: Path) -> Usage:
        compiled = library.with_suffix(".o")
        moe.compile_config(cast(Config, config), config.name, compiled)
        found = usage(compiled.read_bytes())
        linker.link(compiled, library)
        return found

    return compile_and_link


# Without a GPU, there or not: the objects are then the same everywhere, and no memory of it is taken.
CUTE = Compiler(f"{__name__}:make", {"CUTE_DSL_ARCH": ARCHITECTURE, "CUDA_VISIBLE_DEVICES": ""}, Linker)
