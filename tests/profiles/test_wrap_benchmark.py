"""The tables on wrapped models say what their files say; the benchmark says that it needs a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from pages import UNMEASURED, filled, load

FOLDER = Path(__file__).parents[2] / "profiles" / "benchmarks" / "wrap"
GPU = torch.cuda.is_available()
MADE_UP: dict[str, Any] = {
    "model": "olmoe-1b-7b", "dtype": "bf16", "device": "NVIDIA H200",
    "logits_apart": {"ramp_moe": 0.0042, "batched_mm": 0.0051},
    "memory": {"weights_bytes": 2**31, "wrap_seconds": 1.25, "wrapped_bytes": 2**24, "workspace_bytes": 2**25},
    "layer": [
        {"tokens": 8, "routing": "uniform",
         "us": {"ramp_moe": 20.0, "eager": "RuntimeError: capture", "grouped_mm": 50.0, "batched_mm": 40.0}},
        {"tokens": 16, "routing": "uniform", "us": {"ramp_moe": 25.0, "grouped_mm": "ImportError: no"}},
    ],
    "decode": [
        {"batch": 32, "way": "graph", "us": {"ramp_moe": 2000.0, "grouped_mm": 3000.0}},
        {"batch": 32, "way": "eager", "us": {"ramp_moe": "KernelError: broken", "grouped_mm": 3000.0}},
    ],
    "prefill": [{"tokens": 2048, "way": "eager", "us": {"ramp_moe": 10000.0, "eager": 30000.0, "grouped_mm": 9000.0}}],
}  # fmt: skip


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / f"{name}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_tables_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "h200.json").write_text(json.dumps(MADE_UP))
    page = filled((FOLDER / "README.md").read_text(), load(FOLDER / "tables.py").tables(tmp_path))
    for row in (
        "NVIDIA H200 | 2.00 | 0.78% | 1.56% | 1.2 | 4.2e-03 | 5.1e-03",
        "8 | uniform | 20 | 50 | grouped_mm | 2.50x | 40 | batched_mm | 2.00x",
        "16 | uniform | 25 |  |  |  |  |  | ",
        "32 | graph | 2000 | 3000 | grouped_mm | 1.50x",
        "32 | eager | KernelError: broken |  |  | ",
        "2048 | eager | 10000 | 9000 | grouped_mm | 0.90x",
    ):
        assert f"| olmoe-1b-7b | bf16 | {row} |" in page
    assert UNMEASURED not in page


@pytest.mark.slow
@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_without_a_gpu_the_benchmark_says_so() -> None:
    done = script("benchmark")
    assert done.returncode == 2
    assert "this needs a CUDA device, and torch sees none" in done.stderr


@pytest.mark.gpu
def test_gpu_the_benchmark_stops_in_time(tmp_path: Path) -> None:
    done = script("benchmark", "--minutes", "0.01", "--output", str(tmp_path / "h200.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "h200.json").read_text())
    assert found["finished"] is False
    assert 0 < found["logits_apart"]["ramp_moe"] < 2e-2
    assert found["memory"]["wrapped_bytes"] < 0.02 * found["memory"]["weights_bytes"]
    assert found["memory"]["wrap_seconds"] < 10
    filled((FOLDER / "README.md").read_text(), load(FOLDER / "tables.py").tables(tmp_path))
