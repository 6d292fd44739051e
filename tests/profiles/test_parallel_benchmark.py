"""The benchmark of expert and tensor parallelism runs on two processes: on the CPU with gloo and Triton's interpreter,
on two GPUs with NCCL."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "profiles" / "benchmarks" / "parallel" / "measure.py"
GPUS = torch.cuda.device_count()
BATCHES = {"uniform", "skewed", "uneven tokens", "one rank's experts", "one token"}
CLOSE = {"bf16": 1.5e-2, "fp8": 3e-2}
"""How far the outputs of two may be from those of one: partial sums are rounded, another kernel rounds otherwise."""


def ran(folder: Path, *arguments: str) -> tuple[str, list[dict[str, Any]]]:
    """What two processes print, and the cells of their file."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    output = folder / "found.json"
    done = subprocess.run(
        [*command, *arguments, "--output", str(output)], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(output.read_text())["cells"]


def check(printed: str, cells: list[dict[str, Any]], dtypes: set[str]) -> None:
    assert {(c["way"], c["dtype"], c["batch"]) for c in cells} == {
        (way, dtype, batch) for way in ("ep", "tp") for dtype in dtypes for batch in BATCHES
    }
    for cell in cells:
        assert cell["apart"] < CLOSE[cell["dtype"]], cell
        assert len(re.findall(rf"^{cell['way']}, {cell['dtype']}, {cell['batch']}, ", printed, re.MULTILINE)) == 1
        first, second = cell["ranks"]
        if cell["batch"] == "uneven tokens":
            assert cell["tokens"][0] == 0 < cell["tokens"][1]
        if cell["way"] == "tp":
            assert first["ids"] == second["ids"]
            assert first["chosen"] == second["chosen"], "the same histogram"
        elif cell["batch"] == "one rank's experts":
            assert "chosen" in first
            assert (second["rows"], second["ids"], "chosen" in second) == (0, 0, False)


@pytest.mark.slow
@pytest.mark.skipif(GPUS > 0, reason="there is a GPU")
def test_two_processes_on_the_cpu(tmp_path: Path) -> None:
    printed, cells = ran(tmp_path)
    check(printed, cells, {"fp8"})
    assert "note: E2-k2-h128-i256-fp8 has no profile on h200: what is chosen is guessed from other shapes" in printed
    for cell in cells:
        for did in cell["ranks"]:
            assert did["experts"] <= (2 if cell["way"] == "ep" else 4)
            assert not did["rows"] or did["chosen"].startswith("triton/")
        if cell["way"] == "ep":
            assert sum(did["ids"] for did in cell["ranks"]) == 2 * sum(cell["tokens"]), "every id is somebody's"
            assert all(did["rows"] <= sum(cell["tokens"]) for did in cell["ranks"]), "a token travels once to a rank"


@pytest.mark.gpu
@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_gpu_two_gpus(tmp_path: Path) -> None:
    printed, cells = ran(tmp_path, "--tokens", "64")
    check(printed, cells, {"bf16", "fp8"})
    for cell in cells:
        assert cell["one_gpu_us"] > 0
        for did in cell["ranks"]:
            assert did["all_us"] > max(did["send_us"], did["experts_us"], did["collect_us"]) > 0
            assert did["rows"] == 0 or min(did["chosen_us"], did["static_us"]) > 0
