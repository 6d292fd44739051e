"""The cute kernel compiled, without a GPU, into a cache, and loaded by a process that has never seen the compiler."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cute_signature import SIGNATURE
from ramp_moe import Built
from ramp_moe_kernels.cute.aot import Cache, build, build_each
from ramp_moe_kernels.cute.aot import built as compiled
from ramp_moe_kernels.cute.aot.cache import VARIABLE
from ramp_moe_kernels.cute.config import Config

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("nvidia_cutlass_dsl") is None or shutil.which("cc") is None,
    reason="needs nvidia-cutlass-dsl and a C compiler",
)
WHOLE = [
    Config(8, 32, 8, 3),
    Config(16, 32, 8, 4, split_k=4, combine="f32"),
    Config(48, 64, 4, 2, ctas=2, pair=True),
    Config(24, 64, 4, 2, ctas=2, wide=2, combine="rows", dtype="bf16"),
    Config(32, 64, 4, 2, ctas=2, smaller=(8, 16)),
]
SPILLS = Config(128, 64, 4, 2)
LOAD = """
import sys
import tvm_ffi
from ramp_moe_kernels.cute.config import Config
from ramp_moe_kernels.cute.aot import load
for config in {configs!r}:
    function = load(config)
    try:
        function()
    except TypeError as e:
        print(e)
assert "cutlass" not in sys.modules
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def built(root: Path) -> Built:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(root))
        patch.setenv("CUTE_DSL_ARCH", "sm_100a")  # what somebody left there
        patch.setenv("CUTE_DSL_LINEINFO", "1")
        return build([*WHOLE, SPILLS])


def test_what_was_compiled(built: Built) -> None:
    assert sorted(built.compiled) == sorted(c.name for c in WHOLE)
    assert list(built.dropped) == [SPILLS.name]
    assert re.fullmatch(r"spills: \d+ bytes of local memory a thread, at \d+ registers", built.dropped[SPILLS.name])
    assert 0 < built.bytes < len(WHOLE) * 150_000
    cache = Cache(built.folder)
    found = {c.block_m: entry.usage for c in WHOLE if (entry := cache.look_up(c))}
    assert {block: (u.registers, u.local_bytes) for block, u in found.items() if u} == {
        8: (168, 0),
        16: (168, 0),
        48: (128, 0),
        24: (128, 0),
        32: (128, 0),
    }


def test_what_is_asked_for_one_by_one(built: Built, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the background: by processes that stand back behind others."""
    monkeypatch.setenv(VARIABLE, str(root))
    more = Config(16, 32, 8, 3)
    assert dict(build_each(iter([*WHOLE[:1], more, SPILLS]), jobs=1, nice=19)) == {
        WHOLE[0].name: None,
        more.name: None,
        SPILLS.name: built.dropped[SPILLS.name],
    }
    assert compiled([more, Config(8, 32, 8, 4)]) == {more.name: None}


def test_it_loads_without_the_compiler(built: Built, root: Path) -> None:
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    environment = os.environ | {"PYTHONPATH": path, VARIABLE: str(root), "CC": "/none"}
    command = [sys.executable, "-c", LOAD.format(configs=WHOLE)]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(printed) == len(WHOLE)
    for line in printed:
        told = re.findall(r"(\w+): (?:Tensor\(\[([^]]*)\]|int32)", line)
        assert {name: dims.replace(",", "") for name, dims in told} == SIGNATURE


def test_the_architecture_is_hoppers(built: Built) -> None:
    """From the last byte but one of the flags of the GPU's ELF file."""
    data = (built.folder / f"{WHOLE[0].name}.so").read_bytes()
    start = next(m.start() for m in re.finditer(b"\x7fELF\x02\x01", data) if data[m.start() + 18] == 190)
    assert data[start + 49] == 90
