"""A machine with a simulated GPU, for tests of the commands that measure on a GPU."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from ramp_moe import Kernel, Model, Registry
from ramp_moe.cli import compare, drift, gpu, main, profile
from ramp_moe.dispatch.profile_store import relative_path, user_data_dir
from ramp_moe.profiler import pool
from ramp_moe.profiler.gpu import GpuState
from simulated_bench import HARDWARE, SHAPE, Here, Script, Simulated, make_bench

IDLE = GpuState("NVIDIA H200", "580.1", "GPU-01234567-89ab", 100 * 2**30, 0, 0.0, ())


class Unavailable(Simulated):
    def unavailable(self) -> str | None:
        return "its package is missing: pip install it"


class Described(Kernel):
    name = "described"

    def configs(self, shape: Any, hardware: Any) -> Any:
        return Simulated().configs(shape, hardware)

    def weight_layout(self, shape: Any) -> Any:
        return Simulated().weight_layout(shape)


_recorded: dict[tuple[int, float], bytes] = {}


class Machine:
    """A registry and a GPU, which a test may change before it runs a command. Benches run in the same process."""

    def __init__(self, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.registry = Registry(load_entry_points=False)
        self.registry.models["tiny"] = Model(SHAPE, "a test")
        self.registry.kernels |= {"sim": Simulated()}
        self.state, self.log, self.patch = IDLE, log, monkeypatch
        for command in (compare, drift, profile):
            monkeypatch.setattr(command, "get_registry", lambda: self.registry)
        monkeypatch.setattr(gpu, "gpu_state", lambda: self.state)
        monkeypatch.setattr(pool, "Worker", Here)
        self.acts({})

    def acts(self, acts: dict[str, str], noise: float = 0.0) -> None:
        self.patch.setattr(gpu, "_make_bench", functools.partial(make_bench, Script(self.log, acts, noise)))

    def record(self, runs: int = 1, noise: float = 0.0) -> None:
        """Leave what this many runs of `ramp-moe profile` leave. They run for the first test that asks; the others get
        copies."""
        path = place(user_data_dir())
        if (runs, noise) not in _recorded:
            self.acts({}, noise)
            with self.patch.context() as patch:  # with stages, as longer runs have them
                patch.setattr(profile, "WITHOUT_STAGES", -1.0)
                for _ in range(runs):
                    result = self.run("profile", "--minutes", 0)
                    assert result.exit_code == 0, result.output
            self.acts({})
            self.log.unlink()
            assert [f for f in user_data_dir().rglob("*") if f.is_file()] == [path]
            _recorded[runs, noise] = path.read_bytes()
        else:
            path.parent.mkdir(parents=True)
            path.write_bytes(_recorded[runs, noise])

    def run(self, command: str, *args: object) -> Result:
        return CliRunner().invoke(main, [command, "--model", "tiny", "--dtype", "bf16", *map(str, args)])


def place(folder: Path, kernel: str = "sim") -> Path:
    return folder / relative_path(kernel, SHAPE, HARDWARE)
