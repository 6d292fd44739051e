"""The guide to layers tells the Triton path's figures as its benchmark's files have them."""

from __future__ import annotations

from pathlib import Path

from pages import assert_says, load

GUIDE = Path(__file__).parents[2] / "core" / "docs" / "layer.md"


def test_the_headline_is_recomputed() -> None:
    tables = load("benchmarks/triton_tables.py")
    fp8, bf16 = (tables.summary(dtype, lambda tokens: tokens <= tables.FEW)[0] for dtype in tables.DTYPES)
    said = f"take {fp8} of the time of vLLM 0.33's Triton path in fp8 and {bf16} in bf16"
    assert_says(GUIDE.read_text(), said)
