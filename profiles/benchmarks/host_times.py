"""Time the library's host code on this machine: `python host_times.py` prints milliseconds, the best of several runs.

No test depends on these times, since a machine may be slow or busy.
"""

from __future__ import annotations

import subprocess
import sys
import timeit
from collections.abc import Callable
from pathlib import Path

import ramp_moe_profiles
from ramp_moe import Dispatcher, expert_histogram, generate, get_registry, load_sweep
from ramp_moe.dispatch.shortlist import representative, shortlist
from ramp_moe.spec.versions import digest_of

MODEL, DEVICE = "olmoe-1b-7b", "h200"
OVERHEADS_US = {1: 0.0, 2: 4.0, 4: 4.3, 8: 5.0}


def python(*arguments: str) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


def jobs() -> dict[str, tuple[Callable[[], object], int]]:
    """The jobs by name, each with the number of calls that are timed in a row."""
    dispatcher = Dispatcher.for_model(MODEL, DEVICE)
    histogram = expert_histogram(generate("zipf1.2", 256, 64, 8), 64)
    sweep = max((Path(ramp_moe_profiles.__file__).parent / DEVICE).glob("*/*.json"), key=lambda f: f.stat().st_size)
    kernel = get_registry().kernel("triton")

    def listed() -> None:
        representative.cache_clear()
        shortlist(dispatcher.model, 512, OVERHEADS_US)

    def version() -> None:
        digest_of.cache_clear()
        kernel.version()

    return {
        "import ramp_moe": (python("-c", "import ramp_moe"), 1),
        f"ramp-moe compare --model {MODEL}": (
            python("-m", "ramp_moe.cli", "compare", "--model", MODEL, "--device", DEVICE),
            1,
        ),
        "read the largest shipped profile": (lambda: load_sweep(sweep), 5),
        "choose by a histogram, all kernels": (lambda: dispatcher.choose(histogram), 500),
        "shortlist for a batch size": (listed, 1),
        "version of the Triton kernel": (version, 1),
    }


def main() -> None:
    print("| what | ms |\n| --- | --- |")
    for name, (job, calls) in jobs().items():
        print(f"| {name} | {min(timeit.repeat(job, number=calls, repeat=5)) / calls * 1e3:.3g} |")


if __name__ == "__main__":
    main()
