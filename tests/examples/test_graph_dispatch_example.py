"""The page on choosing inside CUDA graphs says what its files say; without a GPU its scripts say that they need one."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from pages import assert_same

FOLDER = Path(__file__).parents[2] / "examples" / "graph_dispatch"
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


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"graph_dispatch_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_files() -> None:
    page = (FOLDER / "README.md").read_text()
    assert_same(load("tables").filled(page), page)


def test_tables_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "h200_made-up-1b.json").write_text(json.dumps(MADE_UP))
    page = load("tables").filled((FOLDER / "README.md").read_text(), tmp_path)
    for row in (
        "made-up-1b | 64 | 8 | 2.50 | 3.00 | 3.25",
        "made-up-1b | 32 | nodes | 2 | 4.40 | 6.00 | 40 | 2",
        "made-up-1b | 32 | gated | 2 | 8.00 |  | 9 | 3",
        "made-up-1b | 32 | single, 1 | 1.414x (1.00 to 2.00) | nodes, 4 | 1.414x (1.00 to 2.00) | 40.0",
    ):
        assert f"| {row} |" in page
    assert "Not measured yet" not in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["one_graph_two_kernels", "benchmark"])
def test_without_a_gpu_the_scripts_say_so(script: str) -> None:
    done = subprocess.run([sys.executable, str(FOLDER / f"{script}.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "this needs a CUDA device, and torch sees none" in done.stderr


@pytest.mark.gpu
def test_gpu_one_graph_runs_two_configurations() -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "one_graph_two_kernels.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "one graph, 2 configurations" in done.stdout
