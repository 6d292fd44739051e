"""Shared fixtures. Every test sees an empty user data folder and no allow-list of plugins."""

from __future__ import annotations

import gc
import importlib.util
import itertools
import os
import signal
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Workers of pytest-xdist share the cores. Threads of torch and numpy beside them would only wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import pytest
from ramp_moe import Hardware, MoEShape, ProfileStore, Registry
from ramp_moe.evaluation.replay import Replay, load_replay
from ramp_moe.profiler import pool, worker

if TYPE_CHECKING:
    from simulated_bench import Call

DATA = Path(__file__).parent / "data"
RECORDED = ("olmoe-1b-7b", "qwen3-30b-a3b", "deepseek-v3-tp8", "mixtral-8x7b-tp4")


def _has_gpu() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-layers", type=int, default=200, help="Random layers that a GPU computes.")
    parser.addoption("--fuzz-seed", type=int, default=0, help="Of the random layers.")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and not _has_gpu():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Let the garbage collector pass over modules and collected tests, which are never garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


# Helpers that tests in several folders share, and the studies; and, without a GPU, Triton's kernels run in its
# interpreter, which must be said before Triton is imported.
TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS / "support"), str(TESTS.parent / "profiles")]
if not _has_gpu():
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is not None:
        from interpreter import quicken

        quicken()


# Examples take as long as the machine is busy.
hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("busy")

# A shell's background jobs ignore Ctrl-C, and so would what tests send it to.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def data_homes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folders, each a new one. pytest's own take longer the more there are: they are listed for the next number."""
    root = tmp_path_factory.mktemp("data")
    return (root / str(i) for i in itertools.count())


@pytest.fixture(autouse=True)
def data_home(data_homes: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The parent of the user's data folder, which nobody has made."""
    home = next(data_homes)
    monkeypatch.setenv("XDG_DATA_HOME", str(home))
    monkeypatch.delenv("RAMP_MOE_PLUGINS", raising=False)
    return home


@pytest.fixture(scope="session")
def registry() -> Registry:
    return Registry()


@pytest.fixture(scope="session")
def h200(registry: Registry) -> Hardware:
    return registry.device("h200")


@pytest.fixture(scope="session")
def olmoe(registry: Registry) -> MoEShape:
    return registry.shape("olmoe-1b-7b", "fp8")


@pytest.fixture
def store() -> ProfileStore:
    """One recorded sweep, the same for as long as the tests need it: 152 configurations of Alpha-MoE on 78 batches."""
    return ProfileStore(shipped=[DATA / "profiles"])


@pytest.fixture
def shipped(registry: Registry) -> ProfileStore:
    """What ships: its figures change whenever something is measured again."""
    return ProfileStore(shipped=registry.profile_dirs)


EXHAUSTIVE = Path(__file__).parents[1] / "profiles" / "archive" / "h200" / "alpha_moe"


def exhaustive(shape: MoEShape) -> ProfileStore:
    """Alpha-MoE's launch alone on 78 batches, all 152 configurations, for each of RECORDED."""
    (file,) = EXHAUSTIVE.glob(f"{shape.slug}.2026-11-20.json")
    return ProfileStore([file])


@pytest.fixture
def replay(registry: Registry, store: ProfileStore, olmoe: MoEShape, h200: Hardware) -> Replay:
    return load_replay(registry, store, olmoe, h200, ["alpha_moe"])


@pytest.fixture
def sweep_file(registry: Registry, store: ProfileStore, olmoe: MoEShape, h200: Hardware, tmp_path: Path) -> Path:
    """A copy of the shipped OLMoE sweep that a test may damage."""
    source, _ = store.require("alpha_moe", olmoe, h200)
    copy = tmp_path / "sweep.json"
    copy.write_bytes(source.read_bytes())
    return copy


# Of tests of a profiling run over simulated kernels, whose modules cannot be found before the path above is set.


@pytest.fixture
def quick_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "GRACE_SECONDS", 0.5)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    from simulated_bench import Here

    monkeypatch.setattr(pool, "Worker", Here)


@pytest.fixture
def call(tmp_path: Path) -> Call:
    from simulated_bench import Call, Script, settings

    return Call(Script(tmp_path / "calls"), settings(tmp_path / "profiles"))
