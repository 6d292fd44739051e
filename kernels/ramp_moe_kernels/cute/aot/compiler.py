"""The compiler of the cute kernel: the code that runs in workers, and its requirements."""

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
    """How workers compile.

    make: name of the function that makes a worker's Maker, as "module:function".
    variables: environment variables that it needs.
    check: raises KernelError if something is missing. It takes a folder in which to try it.
    """

    make: str
    variables: dict[str, str]
    check: Callable[[Path], object]


def make() -> Maker:
    """Import the DSL, and return a Maker. Raises KernelError if something is missing."""
    # Variables for debugging the DSL must not affect objects in the cache. The DSL reads them when it is imported.
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


# A GPU is hidden if there is one: objects are then the same everywhere, and no memory of it is taken.
CUTE = Compiler(f"{__name__}:make", {"CUTE_DSL_ARCH": ARCHITECTURE, "CUDA_VISIBLE_DEVICES": ""}, Linker)
