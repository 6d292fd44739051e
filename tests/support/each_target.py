"""Runs code that compiles kernels for GPUs, without the GPUs, in one process without Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

TARGETS = ("cuda 80 32", "cuda 90 32", "hip gfx942 64")
"""Backend, architecture and threads per warp, as triton's GPUTarget takes them."""

RUN = """
import sys
code, *targets = sys.argv[1:]
for target in targets:
    print(target, file=sys.stderr)
    sys.argv[1:] = target.split()
    exec(code, {"__name__": "__main__"})
"""


def compile_for_each_target(code: str, **variables: str) -> None:
    """Run a script once for each of TARGETS, whose words are its arguments. `variables` are added to the environment.

    Raises AssertionError with the target and the output of the script if it fails.
    """
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    command = [sys.executable, "-c", RUN, textwrap.dedent(code), *TARGETS]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
