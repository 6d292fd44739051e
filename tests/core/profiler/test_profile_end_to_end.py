"""A profiling run on a GPU, in worker processes: profile, fit, live comparison, and a kernel that runs wild."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import wild_kernel
from ramp_moe import Hardware, Kernel, KernelConfig, MoEShape, ProfileStore, get_registry, load_sweep
from ramp_moe.dispatch.load_model import fit_recorded, view
from ramp_moe.evaluation.repeatability import stage_bias
from ramp_moe.measurements.sweep import path_key
from ramp_moe.profiler.live import compare_live
from ramp_moe.profiler.plan import PlannedBatch, plan
from ramp_moe.profiler.session import FIRST_ROWS, profile
from ramp_moe.profiler.settings import Environment, Settings
from ramp_moe.profiler.worker import BenchLike, make_gpu_bench
from ramp_moe.spec.kernel import usable_configs
from simulated_bench import Silent

pytestmark = pytest.mark.gpu

SHAPE = MoEShape(16, 2, 512, 256, "fp8", "small")
ENVIRONMENT = Environment("a GPU", "", "GPU-00000000", {})


KINDS = (
    (16, False, False),
    (16, True, True),
    (32, False, True),
    (64, False, False),
    (64, False, True),
    (128, False, False),
)
"""Token block, whether the path is direct, whether operands are swapped."""


def of_each_kind(kernel: Kernel, hardware: Hardware) -> list[KernelConfig]:
    """One configuration of each of KINDS, in the kernel's order."""
    found: dict[object, KernelConfig] = {}
    for config in usable_configs(kernel, SHAPE, hardware):
        params = dict(config.params)
        found.setdefault((params["up_block_m"], params["direct"], params["up_swap"]), config)
    return [c for kind, c in found.items() if kind in KINDS]


def gpu_bench(hardware: Hardware) -> Callable[[], BenchLike]:
    return functools.partial(make_gpu_bench, SHAPE, hardware.name, ["triton"])


def test_profile_fit_and_compare(tmp_path: Path, h200: Hardware) -> None:
    kernel = get_registry().kernel("triton")
    configs = of_each_kind(kernel, h200)
    names, silent = [c.name for c in configs], Silent()
    assert len(configs) == len(KINDS) == 6
    batches = plan(SHAPE)[:12]
    # nothing is that slow everywhere, so that all are kept, but what is pruned is looked for
    settings = Settings(0.5, tmp_path, prune=100.0, warmers=2)
    result = profile(SHAPE, h200, [kernel], settings, ENVIRONMENT, gpu_bench(h200), silent, batches, {"triton": names})
    (profiled,) = result.profiles
    assert (profiled.failed, profiled.pruned, profiled.configs) == ({}, [], 6)
    assert [name for name, _ in silent.phases] == ["compile", "check", "probe", "measure"]
    assert result.batches >= FIRST_ROWS
    sweep = load_sweep(tmp_path / h200.name / "triton" / f"{SHAPE.slug}.json")
    assert sweep.record.kernel_version == kernel.version()
    paths = [c.key for c in sweep.record.columns if c.stage == "path"]
    assert paths == [path_key("triton", n) for n in names]
    # the direct path is far behind on large batches: it may have bounds there, and no times of stages
    often = [c for c in configs if not dict(c.params)["direct"]]
    stages = {(s.kind, s.key) for c in configs for s in c.stages}
    measured = {(c.stage, c.key) for c in sweep.record.columns[6:]}
    assert {(s.kind, s.key) for c in often for s in c.stages} <= measured <= stages
    of_path, bounded = sweep.only(["path"]).times_us, sweep.only(["path"]).bounded[0]
    assert (of_path > 0).all()
    assert not bounded[:, [names.index(c.name) for c in often]].any()
    of_stages = view(sweep, [k for k in sweep.stages if k != "path"])
    assert len(of_stages.labels) >= 3
    assert {*np.sign(of_stages.times_us[np.isfinite(of_stages.times_us)])} == {1.0}
    bias = stage_bias(sweep, configs)
    assert len(bias) >= 3 * len(of_stages.labels)
    assert -0.7 < np.median(bias) < 4
    tokens = np.array([n for n, _ in sweep.labels])
    assert of_path[tokens.argmax()].min() > of_path[tokens.argmin()].min()

    model = fit_recorded(sweep, configs, h200)
    fitted = [c.config.name for c in model.candidates]
    assert {c.name for c in often} <= {*fitted} <= {*names}
    error = np.abs(model.cost(sweep.histograms) / of_path[:, [names.index(n) for n in fitted]] - 1)
    assert np.median(error) < 0.5

    found = compare_live(
        get_registry(),
        ProfileStore([tmp_path]),
        SHAPE,
        h200,
        ["triton"],
        0.0,
        1,
        ENVIRONMENT,
        gpu_bench(h200),
        silent,
    )
    assert (found.mode, found.kernels, len(found.batches)) == ("live", ["triton"], 8)
    for batch in found.batches:
        for pick in (batch.static, batch.histogram, batch.best):
            assert pick is not None
            assert pick.config in names
            assert 1 < pick.us < 1e5
    assert found.noise is not None
    assert found.noise.batches == 8
    assert found.noise.selection.mean < 0.2
    assert found.baselines["histogram"].mean < 0.5


def test_an_illegal_access_is_isolated(tmp_path: Path, h200: Hardware) -> None:
    """It ends the worker's CUDA context; another worker goes on with what is left."""
    kernel = wild_kernel.Wild()
    batches: Sequence[PlannedBatch] = [PlannedBatch(n, "uniform", n, "tune") for n in (16, 512, 64)]
    result = profile(
        SHAPE,
        h200,
        [kernel],
        Settings(0.0, tmp_path, warmers=1),
        ENVIRONMENT,
        functools.partial(wild_kernel.make_bench, SHAPE, h200.name),
        Silent(),
        batches,
    )
    (profiled,) = result.profiles
    ((reason, failed),) = profiled.failed.items()
    assert failed == [wild_kernel.WILD]
    assert reason.startswith("cannot be timed: ")
    assert "illegal memory access" in reason
    assert (result.batches, profiled.pruned) == (3, [])
    sweep = load_sweep(tmp_path / h200.name / "wild" / f"{SHAPE.slug}.json")
    sane = [c.name for c in kernel.configs(SHAPE, h200) if c.name != wild_kernel.WILD]
    assert [c.key for c in sweep.record.columns if c.stage == "path"] == [path_key("wild", n) for n in sane]
    assert (sweep.only(["path"]).times_us > 0).all()
    assert [o.configs for o in sweep.record.left_out] == [[wild_kernel.WILD]]
