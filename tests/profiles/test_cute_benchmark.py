"""The fused CuTe kernel's benchmark: what it measures, over kernels that are made up, and what its tables say of it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from pages import UNMEASURED, filled, load
from ramp_moe import Hardware, KernelError, MoEShape
from ramp_moe.spec.launchable import Batch
from ramp_moe_adapters.kernels.alpha_moe import launch as alpha_moe_launch
from ramp_moe_kernels.cute import launch as cute_launch
from ramp_moe_kernels.cute.config import Config
from ramp_moe_kernels.triton import schedule

FOLDER = Path(__file__).parents[2] / "profiles" / "benchmarks"
PAGE = (FOLDER / "README.md").read_text()
TABLES = load(FOLDER / "cute_tables.py")


def cell(tokens: int, routing: str, rival: str, us: tuple[float, float], floor: float = 10.0) -> dict[str, Any]:
    ours, theirs = (
        {"config": c, "us": t, "error": e} | ({"clean_us": t - 1} if tokens <= 16 else {})
        for c, t, e in zip("ab", us, (0.02, 0.03), strict=True)
    )
    return {"tokens": tokens, "routing": routing, "active": 8, "floor_us": floor, "cute": ours, rival: theirs}


def made_up(model: str, dtype: str, cells: list[dict[str, Any]]) -> dict[str, Any]:
    errors = {"bf16": 0.03, "f32": 0.02, "rows": 0.02}
    times = {"bf16": (10.0, 20.0), "f32": (20.0, 20.0), "rows": (40.0, 20.0)}
    return {
        "device": "NVIDIA H200", "measured": "2026-11-22", "software": {"torch": "2"}, "kernels": {"cute": "1"},
        "model": model, "dtype": dtype, "configurations": 165, "skipped": {"c": "not compiled"},
        "first_launch": [{"config": "a", "load_ms": 90.4, "launch_ms": 3.0},
                         {"config": "b", "load_ms": 1.6, "launch_ms": 2.0}],
        "cells": cells,
        "combine": [{"tokens": 8, "config": config, "combine": how, "error": errors[how], "us": times[how][i]}
                    for i, config in enumerate("ab") for how in errors],
        "polymorphic": [{"tokens": 8, "config": "p", "block": 8, "us": 10.1, "alone_us": 10.0},
                        {"tokens": 64, "config": "p", "block": 8, "us": 10.3, "alone_us": 10.0},
                        {"tokens": 8, "config": "p", "block": 16, "us": 9.9, "alone_us": 10.0}],
    }  # fmt: skip


def test_nothing_is_measured(tmp_path: Path) -> None:
    assert {make() for make in TABLES.tables(tmp_path).values()} == {UNMEASURED}


def test_the_figures(tmp_path: Path) -> None:
    """olmoe: 0.5 and 1.0 up to 2,048 tokens, 1.0 and 2.0 from there; the aim at 16 tokens is 1.15 * 10 + 6 = 17.5."""
    fp8 = [
        cell(16, "uniform", "alpha_moe", (17.5, 35.0)),
        cell(2048, "zipf1.2", "alpha_moe", (50.0, 50.0)),
        cell(8192, "uniform", "alpha_moe", (200.0, 100.0)),
    ]
    other = [cell(1, "uniform", "alpha_moe", (17.6, 17.6)), cell(2048, "uniform", "alpha_moe", (20.0, 40.0))]
    bf16 = [cell(1, "uniform", "triton", (10.0, 40.0))]
    for model, dtype, cells in (("olmoe", "fp8", fp8), ("qwen3", "fp8", other), ("olmoe", "bf16", bf16)):
        (tmp_path / f"cute_h200_{model}_{dtype}.json").write_text(json.dumps(made_up(model, dtype, cells)))
    page = filled(PAGE, TABLES.tables(tmp_path))
    assert UNMEASURED not in page
    small, large = math.sqrt(0.5), math.sqrt(2)
    for row in (
        f"olmoe | {small:.3f} | {large:.3f} | 2.000 (8,192, uniform) | 1 of 3 | 1 of 1 | 1 of 1",
        f"qwen3 | {small:.3f} | 0.500 | 1.000 (1, uniform) | 1 of 2 | 0 of 1 | 1 of 1",
        "all | 0.707 | 1.000 | 2.000 (8,192, uniform) | 2 of 5 | 1 of 2 | 2 of 2",
        "olmoe | 16 | uniform | 17.5 | 35.0 | 0.500 | 10.0, near | 0.0200 | 0.0300 | a | b",
        "qwen3 | 1 | uniform | 17.6 | 17.6 | 1.000 | 10.0, not near | 0.0200 | 0.0300 | a | b",
        "olmoe | 8,192 | uniform | 200.0 | 100.0 | 2.000 | 10.0 | 0.0200 | 0.0300 | a | b",
        "olmoe | 0.250 | - | 0.250 (1, uniform) | 1 of 1",
        "olmoe | 1 | uniform | 10.0 | 40.0 | 0.250 | 10.0 | 0.0200 | 0.0300 | a | b",
        "olmoe | fp8 | 8 | 2 | 0.03000 | 0.02000 | 0.02000 | 1.414 | 2.000",
        "olmoe | fp8 | p | 8: +2.0%, 16: -1.0% | +1.0% | +3.0% | 2 of 3",
        "olmoe | bf16 | 2026-11-22 | NVIDIA H200 | torch 2, cute 1 | 165 | 1 | 90 + 3, 2 + 2",
    ):
        assert f"| {row} |" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_says_so() -> None:
    script = FOLDER / "cute_kernel.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "this needs a CUDA device, and torch sees none" in done.stderr


SHAPE = MoEShape(8, 2, 256, 256, "fp8", "tiny")
CONFIGS = [Config(8, 32, 8, 3), Config(8, 32, 8, 4), *(Config(8, 32, 8, 3, combine=c) for c in ("f32", "rows"))]
WRONG, ABSENT = Config(16, 32, 8, 3), Config(16, 32, 8, 4)
ANY = Config(16, 32, 8, 3, smaller=(8,))


class MadeUp:
    """Kernels that write the float32 layer of the batch that was made last; one of them is wrong."""

    batch: Batch
    layer: torch.Tensor

    def function(self, config: Config) -> Callable[..., None]:
        def launched(*arguments: Any) -> None:
            """The seventh is the output: `[T, H]`, or `[parts * T * k, H]`."""
            out, (tokens, hidden) = arguments[6], self.batch.hidden_states.shape
            each = out.view(-1, tokens, self.batch.top_k if config.combine == "rows" else 1, hidden)
            each.copy_(self.layer[None, :, None] * (2 if config == WRONG else 1) / (each.shape[0] * each.shape[2]))

        return launched

    def operator(self, *arguments: Any) -> None:
        """Alpha-MoE's."""
        arguments[10].copy_(self.layer)

    def in_order(self, rows: torch.Tensor, ids: torch.Tensor, out: torch.Tensor, num_experts: int) -> None:
        out.copy_(rows.float().sum(0).view(*ids.shape, -1).sum(1))


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, h200: Hardware) -> ModuleType:
    """The script over a made-up kernel on the CPU, a tiny model, and two batches."""
    module = load(FOLDER / "cute_kernel.py")
    contenders = sys.modules["cute_contenders"]
    made = MadeUp()
    missing = SimpleNamespace(look_up=lambda c: None if c == ABSENT else c)

    def prepared(weights: Any) -> cute_launch.PreparedCute:
        scale = weights.gate_up_scale[None]
        return cute_launch.PreparedCute(weights.gate_up, scale, weights.down.permute(1, 2, 0), scale, 0, "fp8")

    def alpha(weights: Any) -> alpha_moe_launch.PreparedAlphaMoE:
        own = weights.gate_up, weights.gate_up_scale, weights.down, weights.down_scale
        return alpha_moe_launch.PreparedAlphaMoE(*own, made.operator)

    def batch(self: Any, *cell: Any, plain: Any = module.Measurement.batch) -> Any:
        made.batch, out, made.layer = plain(self, *cell)
        return made.batch, out, made.layer

    def medians(launches: list[Callable[[], Any]], repeats: int, clean: bool = False) -> list[float]:
        for launch in launches:
            launch()
        return [float(20 - clean + i) for i in range(len(launches))]

    for target, name, value in (
        (contenders, "Cache", SimpleNamespace(current=lambda: missing)),
        (contenders, "load", made.function),
        (contenders, "DEVICE", "cpu"),
        (module, "DEVICE", "cpu"),
        (module, "get_registry", lambda: SimpleNamespace(shape=lambda *_: SHAPE, device=lambda _: h200)),
        (module, "configurations", lambda _: [*CONFIGS, WRONG, ABSENT]),
        (module, "polymorphic", lambda _: [ANY]),
        (module, "medians", medians),
        (module, "captured", lambda launch: launch),
        (module, "TOKENS", (1, 8)),
        (module, "COMBINE_TOKENS", (8,)),
        (module, "POLYMORPHIC_TOKENS", (8,)),
        (module.Measurement, "batch", batch),
        (cute_launch, "prepare", prepared),
        (cute_launch, "one_of", lambda _: ANY),
        (cute_launch, "schedule", lambda *_, **__: None),
        (cute_launch, "combine", made.in_order),
        (schedule, "schedule", lambda *_, **__: None),
        (alpha_moe_launch, "prepare", alpha),
        (torch.cuda, "synchronize", lambda: None),
        (torch.cuda, "device", lambda _: nullcontext()),
    ):
        monkeypatch.setattr(target, name, value)
    rival, first = module.RIVALS["fp8"], [{"config": "a", "load_ms": 1.0, "launch_ms": 1.0}]
    two = rival.configs(SHAPE, h200)[:2]
    monkeypatch.setattr(type(rival), "configs", lambda *_: two)
    monkeypatch.setattr(module.Measurement, "first_launch", lambda _: first)
    return module


def test_what_is_measured(bench: ModuleType, tmp_path: Path, capsys: Any) -> None:
    bench.measure("tiny", "fp8", tmp_path, math.inf)
    record = json.loads((tmp_path / "cute_h200_tiny_fp8.json").read_text())
    assert record["skipped"].keys() == {WRONG.name, ABSENT.name}
    assert record["skipped"][ABSENT.name] == "not compiled"
    assert "relative error 1 of output" in record["skipped"][WRONG.name]
    assert [(c["tokens"], c["routing"]) for c in record["cells"]] == [
        (tokens, routing) for tokens in (1, 8) for routing in ("uniform", "zipf1.2")
    ]
    for c in record["cells"]:
        assert c["screened"]["cute"].keys() == {CONFIGS[0].name, CONFIGS[1].name}
        assert len(c["screened"]["alpha_moe"]) == 2
        assert c["cute"]["us"] == 20
        assert c["alpha_moe"]["us"] == 22
        assert [c[kernel]["clean_us"] for kernel in ("cute", "alpha_moe")] == [19, 20]
        assert c["cute"]["error"] < 0.005
        assert c["floor_us"] == pytest.approx(c["active"] * SHAPE.expert_bytes / 4.3e6, abs=0.01)
    assert [r["combine"] for r in record["combine"]] == ["bf16", "f32", "rows"]
    (row,) = record["polymorphic"]  # the other block's configuration is wrong
    assert (row["block"], row["us"], row["alone_us"]) == (8, 20, 21)
    assert capsys.readouterr().out.count("tiny fp8 cells") == 4
    assert "| tiny | 8 | uniform | 20.0 | 22.0 | 0.909 |" in filled(PAGE, TABLES.tables(tmp_path))


def test_time_is_up(bench: ModuleType, tmp_path: Path, capsys: Any) -> None:
    bench.measure("tiny", "fp8", tmp_path, 0)
    assert not list(tmp_path.iterdir())
    assert "out of time before first_launch" in capsys.readouterr().err


def test_what_fails_is_named(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise KernelError("no such thing")

    monkeypatch.setattr(bench.Measurement, "combine", fails)
    bench.measure("tiny", "fp8", tmp_path, math.inf)
    record = json.loads((tmp_path / "cute_h200_tiny_fp8.json").read_text())
    assert record["skipped"]["combine 8"] == "KernelError: no such thing"
    assert record["combine"] == []
    assert len(record["polymorphic"]) == 1
