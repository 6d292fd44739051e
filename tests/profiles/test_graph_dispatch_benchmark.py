"""The tables on choosing inside CUDA graphs say what their files say; the benchmark says that it needs a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pages import UNMEASURED, filled, load

FOLDER = Path(__file__).parents[2] / "profiles" / "benchmarks" / "graph_dispatch"
MADE_UP = {
    "model": "made-up-1b",
    "selection": [{"tokens": 64, "candidates": 8, "select_us": 2.5, "recorded_us": 3.0, "schedule_us": 3.25}],
    "bodies": [
        {"tokens": 32, "mode": "nodes", "bodies": 2, "overhead_us": 4.4, "changing_us": 6.0, "layer_kib": 40.4,
         "buffers_mib": 2.0},
        {"tokens": 32, "mode": "gated", "bodies": 2, "overhead_us": 8.0, "changing_us": None, "layer_kib": 9.0,
         "buffers_mib": 3.0},
    ],
    "end_to_end": [
        {"tokens": 32, "static": "triton/a", "mode": "single", "why": "one is best", "bodies": ["triton/b"],
         "choosing": ["nodes", 4], "routings": ["zipf1.2", "zipf2.0"], "static_us": [20.0, 80.0],
         "planned_us": [10.0, 80.0], "choosing_us": [20.0, 40.0]},
    ],
}  # fmt: skip


def test_tables_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "h200_made-up-1b.json").write_text(json.dumps(MADE_UP))
    page = filled((FOLDER / "README.md").read_text(), load(FOLDER / "tables.py").tables(tmp_path))
    for row in (
        "made-up-1b | 64 | 8 | 2.50 | 3.00 | 3.25",
        "made-up-1b | 32 | nodes | 2 | 4.40 | 6.00 | 40 | 2",
        "made-up-1b | 32 | gated | 2 | 8.00 |  | 9 | 3",
        "made-up-1b | 32 | single, 1 | 1.414x (1.00 to 2.00) | nodes, 4 | 1.414x (1.00 to 2.00) | 40.0",
    ):
        assert f"| {row} |" in page
    assert UNMEASURED not in page


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_benchmark_says_so() -> None:
    done = subprocess.run([sys.executable, str(FOLDER / "benchmark.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "this needs a CUDA device, and torch sees none" in done.stderr
