"""The cache of compiled configurations, with a compiler that does as it is told."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_compiler import Fake, Machine
from ramp_moe import Built, KernelError
from ramp_moe.spec.versions import Place
from ramp_moe_kernels.cute.aot import cache as cache_module
from ramp_moe_kernels.cute.aot import toolkit
from ramp_moe_kernels.cute.aot.build import build, build_each, built
from ramp_moe_kernels.cute.aot.cache import VARIABLE, Cache, prune

ABC = [Fake("a"), Fake("b"), Fake("c")]
OTHER_BUILD = """
import sys
from pathlib import Path
from fake_compiler import Fake, Machine
from ramp_moe_kernels.cute.aot.build import build
from ramp_moe_kernels.cute.aot.cache import Cache
cache, folder, timeout, *names = sys.argv[1:]
machine = Machine(Path(folder), {n: "hangs" if n == "hangs" else "is slow" for n in names})
built = build(map(Fake, names), cache=Cache(Path(cache)), compiler=machine.compiler, jobs=2, timeout=float(timeout))
print(*built.compiled)
"""
BACKGROUND = """
import sys, threading, time
from pathlib import Path
from fake_compiler import Fake, Machine
from ramp_moe_kernels.cute.aot.build import build_each
from ramp_moe_kernels.cute.aot.cache import Cache
cache, folder = sys.argv[1:]
machine = Machine(Path(folder), {"hangs": "hangs"})
each = build_each(map(Fake, ["a", "hangs"]), jobs=1, nice=19, cache=Cache(Path(cache)), compiler=machine.compiler)
threading.Thread(target=list, args=(each,), daemon=True).start()
while "hangs" not in machine.compiled():
    time.sleep(0.05)
"""


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "machine")


def acts(tmp_path: Path, **does: str) -> Machine:
    return Machine(tmp_path / "machine", does)


def run(cache: Cache, machine: Machine, configs: list[Fake] | None = None, timeout: float = 60) -> Built:
    return build(configs or ABC, cache=cache, compiler=machine.compiler, jobs=1, timeout=timeout)


def other_build(cache: Cache, folder: Path, timeout: float, *names: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    command = [sys.executable, "-c", OTHER_BUILD, str(cache.folder), str(folder), str(timeout), *names]
    folder.mkdir(exist_ok=True)
    variables = {"PYTHONPATH": path, "TMPDIR": str(folder)}  # one that is killed leaves a folder there
    return subprocess.Popen(command, env=os.environ | variables, stdout=subprocess.PIPE, text=True)


def wait(condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_what_is_compiled_once_is_there(cache: Cache, machine: Machine) -> None:
    told: list[tuple[int, int, str]] = []
    first = build(ABC, report=lambda *at: told.append(at), cache=cache, compiler=machine.compiler, jobs=1)
    assert (first.compiled, first.reused, first.dropped, first.notes) == (("a", "b", "c"), (), {}, ())
    assert told == [(0, 3, ""), (1, 3, "a"), (2, 3, "b"), (3, 3, "c")]
    assert (first.bytes, first.folder) == (30, cache.folder)
    assert first.cpu_seconds > 0
    assert cache.library(ABC[0]).read_bytes() == b"a" * 10
    second = run(cache, machine)
    assert (second.compiled, second.reused, second.bytes, second.cpu_seconds) == ((), ("a", "b", "c"), 30, 0)
    assert (machine.compiled(), machine.checks) == (["a", "b", "c"], 1)
    assert run(cache, machine, [*ABC, Fake("d")]).compiled == ("d",)


def test_what_cannot_be_used_is_dropped_and_not_tried_again(cache: Cache, tmp_path: Path) -> None:
    machine = acts(tmp_path, a="spills", b="raises")
    for _ in range(2):
        built = run(cache, machine)
        assert built.dropped == {
            "a": "spills: 216 bytes of local memory a thread, at 168 registers",
            "b": "TypeError: no such tile",
        }
    assert (built.reused, built.bytes) == (("c",), 10)
    assert machine.compiled() == ["a", "b", "c"]
    assert not cache.library(ABC[0]).exists()


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        ("dies", "the compiler was killed by signal 9 (Killed); it last printed: out of luck"),
        pytest.param("hangs", "the compiler gave no answer within 3 s and was killed", marks=pytest.mark.slow),
        ("no room", "the compiler ended with code 1; it last printed: OSError: [Errno 28] No space left on device"),
    ],
)
def test_a_lost_compiler_loses_its_configuration_alone(act: str, reason: str, cache: Cache, tmp_path: Path) -> None:
    machine = acts(tmp_path, b=act)
    first = run(cache, machine, timeout=3)
    assert (first.compiled, first.dropped) == (("a", "c"), {"b": reason})
    assert run(cache, machine, timeout=3).dropped == {"b": reason}  # it may have been the machine's fault, once
    assert machine.compiled() == ["a", "b", "c", "b"]
    assert run(cache, machine).dropped == {"b": reason}
    assert machine.compiled() == ["a", "b", "c", "b"]


def test_the_second_attempt_may_succeed(cache: Cache, tmp_path: Path) -> None:
    run(cache, acts(tmp_path, b="dies"))
    built = run(cache, acts(tmp_path))
    assert (built.compiled, built.dropped) == (("b",), {})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "note"),
    [
        (lambda cache: cache.library(ABC[1]).write_bytes(b"bbbbb"), "is corrupt: its checksum is not"),
        (lambda cache: cache.library(ABC[1]).unlink(), "No such file"),
        (lambda cache: (cache.folder / "b.json").write_text('{"format": "ramp'), "is corrupt or truncated"),
        (
            lambda cache: (cache.folder / "b.json").write_text('{"format": "ramp-moe/object", "version": 9}'),
            "version 9",
        ),
        (lambda cache: (cache.folder / "b.json").write_bytes((cache.folder / "c.json").read_bytes()), "is of Fake"),
    ],
)
def test_damage_is_repaired_and_reported(
    damage: Callable[[Cache], object], note: str, cache: Cache, machine: Machine
) -> None:
    run(cache, machine)
    damage(cache)
    repaired = run(cache, machine)
    assert (repaired.compiled, repaired.reused) == (("b",), ("a", "c"))
    (told,) = repaired.notes
    assert note in told
    assert told.endswith("; compiled again")
    assert run(cache, machine).notes == ()


def test_a_configuration_that_changed_under_its_name_is_compiled_again(cache: Cache, machine: Machine) -> None:
    run(cache, machine)
    assert run(cache, machine, [Fake("a", size=1)]).compiled == ("a",)


@pytest.mark.slow
def test_builds_at_the_same_time_share_the_work(cache: Cache, tmp_path: Path) -> None:
    names = [f"c{i}" for i in range(8)]
    builds = [other_build(cache, tmp_path / "machine", 60, *names) for _ in range(3)]
    compiled = [b.communicate(timeout=300)[0].split() for b in builds]
    assert [b.returncode for b in builds] == [0, 0, 0]
    assert sorted(c for each in compiled for c in each) == names == sorted(Machine(tmp_path / "machine").compiled())
    assert all(cache.look_up(Fake(n)) for n in names)


def test_a_build_that_is_killed_blocks_nobody(cache: Cache, tmp_path: Path) -> None:
    killed = other_build(cache, tmp_path / "machine", 1, "a", "hangs")
    log = Machine(tmp_path / "machine")
    wait(lambda: cache.folder.is_dir() and (cache.folder / "a.json").exists() and "hangs" in log.compiled())
    workers = _children(killed.pid)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    with cache.lock(Fake("hangs")) as mine:
        assert mine
    built = run(cache, Machine(tmp_path / "mine"), [Fake("a"), Fake("hangs")])
    assert (built.compiled, built.reused) == (("hangs",), ("a",))
    wait(lambda: not any(map(_alive, workers)))  # nobody is left who would kill the one that hangs


def test_what_comes_next_is_decided_when_a_process_is_free(cache: Cache, tmp_path: Path) -> None:
    machine, asked = acts(tmp_path, b="spills"), list[str]()

    def wanted() -> Iterator[Fake]:
        for config in ABC:
            asked.append(f"{config.name} after {machine.compiled()}")
            yield config

    assert built(ABC, cache) == {}
    found = dict(build_each(wanted(), jobs=1, cache=cache, compiler=machine.compiler))
    reason = "spills: 216 bytes of local memory a thread, at 168 registers"
    assert found == {"a": None, "b": reason, "c": None} == built(ABC, cache)
    assert asked == ["a after []", "b after ['a']", "c after ['a', 'b']"]
    cache.library(ABC[0]).write_bytes(b"half")
    assert built(ABC, cache) == {"b": reason, "c": None}, "what is damaged is no object"


@pytest.mark.slow
def test_a_program_ends_whatever_it_compiles_in_the_background(cache: Cache, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    command = [sys.executable, "-c", BACKGROUND, str(cache.folder), str(tmp_path / "machine")]
    variables = {"PYTHONPATH": path, "TMPDIR": str(temporary)}
    subprocess.run(command, env=os.environ | variables, check=True, timeout=300)
    assert built([Fake("a"), Fake("hangs")], cache) == {"a": None}
    assert not list(temporary.iterdir())
    assert run(cache, Machine(tmp_path / "mine"), [Fake("a"), Fake("hangs")]).compiled == ("hangs",)


def _children(pid: int) -> list[int]:
    return [int(p) for task in Path(f"/proc/{pid}/task").iterdir() for p in (task / "children").read_text().split()]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_another_build_is_at_is_waited_for(cache: Cache, tmp_path: Path) -> None:
    other = other_build(cache, tmp_path / "machine", 60, "a")
    wait(lambda: Machine(tmp_path / "machine").compiled() == ["a"])
    assert run(cache, Machine(tmp_path / "mine")).compiled in [("b", "c"), ("b", "c", "a")]
    assert Machine(tmp_path / "mine").compiled() == ["b", "c"]
    other.communicate(timeout=300)


def test_an_error_while_reporting_ends_the_workers(cache: Cache, tmp_path: Path) -> None:
    def report(done: int, total: int, name: str) -> None:
        if name:
            raise KeyboardInterrupt

    machine, others = acts(tmp_path, b="hangs"), set(_children(os.getpid()))  # of other tests
    with pytest.raises(KeyboardInterrupt):
        build(ABC, report=report, cache=cache, compiler=machine.compiler, jobs=1)
    assert cache.look_up(Fake("a"))
    assert cache.look_up(Fake("b")) is None  # it is not to blame
    assert not [p for p in _children(os.getpid()) if p not in others and _alive(p)]


def test_a_compiler_that_does_not_start(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="the compiler cannot be started: ImportError: libfoo is missing"):
        run(cache, acts(tmp_path, start="libfoo is missing"))


def test_a_folder_that_cannot_be_made(tmp_path: Path, machine: Machine) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        KernelError, match=rf"cannot write to the cache folder .*file/cache: .*; name another with {VARIABLE}"
    ):
        run(Cache(tmp_path / "file" / "cache"), machine)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(cache: Cache, machine: Machine) -> None:
    run(cache, machine)
    cache.folder.chmod(0o500)
    try:
        assert run(cache, machine).reused == ("a", "b", "c")
        with pytest.raises(KernelError, match="cannot write to the cache folder"):
            run(cache, machine, [Fake("d")])
    finally:
        cache.folder.chmod(0o700)


def test_a_full_disk_leaves_nothing_half_written(
    cache: Cache, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("ramp_moe.measurements.json_file.os.fsync", full)
        with pytest.raises(KernelError, match=f"No space left on device; make room, or name another .* {VARIABLE}"):
            run(cache, machine)
    assert [f.suffix for f in cache.folder.iterdir()] == [".lock"]
    assert run(cache, machine).compiled == ("a", "b", "c")


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """What a kernel is compiled from; compiled by version 1.0, loaded by version 0.1."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "root"))
    monkeypatch.setattr(cache_module, "toolchain", lambda: "dsl1.0-cu13")
    monkeypatch.setattr(cache_module, "runtime_abis", lambda: ["ffi0.1-x86_64-v3", "ffi0.1-x86_64-v2"])
    return written(tmp_path / "sources", "x = 1\n")


def written(folder: Path, moe: str) -> Place:
    """A kernel's sources in a new folder."""
    folder.mkdir()
    (folder / "moe.py").write_text(moe)
    return Place(folder / "moe.py", "x")


def test_another_version_has_another_folder(
    sources: Place, tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Cache.current(sources)
    assert first.folder.is_relative_to(tmp_path / "root")
    assert run(first, machine).compiled == ("a", "b", "c")
    assert Cache.current(written(tmp_path / "same", "# why\ny = 0\nx = 1\n")) == first
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "toolchain", lambda: "dsl1.1-cu13")
        assert run(Cache.current(sources), machine).compiled == ("a", "b", "c")
    assert run(Cache.current(written(tmp_path / "other", "x = 2\n")), machine).compiled == ("a", "b", "c")
    assert run(Cache.current(sources), machine).reused == ("a", "b", "c")


def test_pruning_leaves_the_present_version(sources: Place, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    current = Cache.current(sources)
    run(current, machine)
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "toolchain", lambda: "dsl0.9-cu13")
        run(Cache.current(sources), machine, ABC[:1])
    old = current.folder.parent.with_name("v1-sm_90a-01234567")
    (old / "dsl0.9").mkdir(parents=True)
    (old / "dsl0.9" / "a.so").write_bytes(b"0" * 1000)
    stranger = old.with_name("mine")
    stranger.mkdir()
    for name, age in (("left", 7200), ("new", 0)):
        path = current.folder / f".{name}.tmp"
        path.touch()
        os.utime(path, (time.time() - age, time.time() - age))
    assert 1010 < prune(sources) < 2000
    assert sorted(f.name for f in current.folder.parent.parent.iterdir()) == sorted(
        [current.folder.parent.name, "mine"]
    )
    assert [f.name for f in current.folder.parent.iterdir()] == [current.folder.name]
    assert [f.name for f in current.folder.glob(".*")] == [".new.tmp"]
    assert run(current, machine).reused == ("a", "b", "c")


def test_without_the_compiler_any_folder_of_the_sources_will_do(
    sources: Place, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = Cache.current(sources)
    run(built, machine)
    monkeypatch.setattr(cache_module, "toolchain", lambda: None)
    assert Cache.current(sources) == built
    monkeypatch.setattr(cache_module, "runtime_abis", lambda: ["ffi0.1-x86_64-v4", "ffi0.1-x86_64-v3"])
    assert Cache.current(sources) == built
    monkeypatch.setattr(cache_module, "runtime_abis", lambda: ["ffi0.1-x86_64-v2"])
    assert Cache.current(sources) != built


def test_the_cache_is_the_users(sources: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert Cache.current(sources).folder.is_relative_to(tmp_path / "xdg" / "ramp-moe" / "cute")


def test_without_the_dsl_building_says_what_to_install(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(toolkit, "dsl_folder", lambda: None)
    with pytest.raises(KernelError, match=r"needs nvidia-cutlass-dsl: pip install 'ramp-moe\[cute\]'"):
        build(ABC, cache=cache)
    assert not cache.folder.exists()


def test_manifests_can_be_read_by_a_person(cache: Cache, tmp_path: Path) -> None:
    run(cache, acts(tmp_path, a="spills"))
    found = json.loads((cache.folder / "a.json").read_text())
    assert found["usage"] == {"registers": 168, "local_bytes": 216}
    assert found["config"] == "Fake(name='a', size=0)"
