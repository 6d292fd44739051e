"""What a plugin tells a bug report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One line of `ramp-moe env`, given through the hook `ramp_moe_diagnostics`.

    The kind says what `name` and `state` are:

    - "cache": what is kept, and the folder that holds it. The command counts its files.
    - "variable": an environment variable that the plugin reads, and what its present value does.
    - "engine": a server or framework, and what the plugin would do in it.
    """

    kind: Literal["cache", "variable", "engine"]
    name: str
    state: str
