"""The benchmark figures in the documents are those of the files beside them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from pages import assert_says

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "benchmarks"


def ratios(dtype: str) -> dict[tuple[str, int, str], float]:
    """Time over vLLM's, by cell."""
    peers = {
        (c["shape"], c["tokens"], c["routing"]): c
        for c in json.loads((FOLDER / "peers_h200.json").read_text())["cells"]
    }
    ours = json.loads((FOLDER / f"triton_h200_{dtype}.json").read_text())
    assert ours["device"] == "NVIDIA H200"
    found = {(c["shape"], c["tokens"], c["routing"]): c["us"] for c in ours["cells"]}
    assert found.keys() == peers.keys()
    return {cell: us / peers[cell][f"vllm_{dtype}"] for cell, us in found.items()}


def summary(values: list[float]) -> list[str]:
    return [f"{math.exp(sum(map(math.log, values)) / len(values)):.3f}", f"{max(values):.3f}"]


@pytest.mark.parametrize("tokens", [1, 8, 32, 128, 512, 2048])
def test_the_table_is_recomputed(tokens: int) -> None:
    cells = [s for d in ("fp8", "bf16") for s in summary([r for c, r in ratios(d).items() if c[1] == tokens])]
    name = f"{tokens:,} token{'s' * (tokens > 1)}"
    assert_says((FOLDER / "README.md").read_text(), f"| {name} | {' | '.join(cells)} |")


def test_the_headline_is_recomputed() -> None:
    cells = [summary([r for c, r in ratios(d).items() if c[1] <= 512]) for d in ("fp8", "bf16")]
    assert_says((FOLDER / "README.md").read_text(), f"| up to 512 tokens | {' | '.join([*cells[0], *cells[1]])} |")
    (fp8, _), (bf16, _) = cells
    said = f"take {fp8} of the time of vLLM 0.33's Triton path in fp8 and {bf16} in bf16"
    assert_says((ROOT / "README.md").read_text(), said)
