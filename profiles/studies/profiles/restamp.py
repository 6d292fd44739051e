"""Write the version of today's code into shipped profiles whose times still hold, and change no other byte.

python restamp.py --check KERNEL...            on an H200: stamp what passes `ramp-moe check`, name the rest
python restamp.py --from DIGEST,... KERNEL...  without measuring: stamp the profiles that record one of these digests,
                                               after a change that leaves the code on the GPU as it was

A dtype may follow a kernel, as in triton/fp8.

Only the digest after the `+` changes. Run `python profiles/pages.py --write profiles` afterwards to renew the tables of
versions.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import ramp_moe_profiles
from ramp_moe import get_registry, load_sweep

SHIPPED = Path(ramp_moe_profiles.__file__).parent / "h200"
VERSION = re.compile(rb'"kernel_version": "([^"+]*)\+([0-9a-f]{8})"')


def outdated(
    kernels: Sequence[str], folder: Path = SHIPPED, before: Sequence[str] = ()
) -> Iterator[tuple[Path, bytes]]:
    """Profiles that record another digest than today's, each with its new content. A name in `kernels` is a kernel, or
    a kernel and a dtype. before: if given, only profiles that record one of these digests."""
    for path in sorted(folder.glob("*/*.json")):
        shape, name = load_sweep(path).shape, path.parent.name
        if name in kernels or f"{name}/{shape.dtype}" in kernels:
            today = get_registry().kernel(name).version().partition("+")[2].encode()
            found = VERSION.search(old := path.read_bytes())
            if found is None or (before and found[2].decode() not in before):
                continue
            stamped = VERSION.sub(rb'"kernel_version": "\1+%b"' % today, old, count=1)
            if stamped != old:
                yield path, stamped


def holds(path: Path) -> bool:
    """Whether a profile's times hold on this machine's GPU. Runs `ramp-moe check`, which prints what it finds."""
    shape = load_sweep(path).shape
    asked = ["--model", shape.name or shape.slug, "--dtype", shape.dtype, "--kernel", path.parent.name]
    return subprocess.run([sys.executable, "-m", "ramp_moe.cli", "check", *asked], check=False).returncode == 0


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="+", metavar="KERNEL[/DTYPE]")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--check", action="store_true")
    how.add_argument("--from", dest="before", metavar="DIGEST,...")
    asked = parser.parse_args(arguments)
    failed = 0
    for path, stamped in outdated(asked.kernels, before=asked.before.split(",") if asked.before else ()):
        if asked.check and not holds(path):
            failed += 1
            print(f"{path} does not hold: measure it again")
            continue
        path.write_bytes(stamped)
        print(f"{path} stamped")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
