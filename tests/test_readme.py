"""What the README and the guides say is what the library computes."""

from __future__ import annotations

import itertools
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import RECORDED
from pages import assert_says
from ramp_moe import Hardware, Registry
from ramp_moe.cli.listing import describe_kernel
from ramp_moe.cost_model.model import DEFAULT_FORM
from ramp_moe.evaluation.comparison import Comparison, compare_recorded
from studies.shipped import replay

ROOT = Path(__file__).parents[1]
README = "\n".join(page.read_text() for page in (ROOT / "README.md", *sorted(ROOT.glob("core/docs/*.md"))))


ALL = ("alpha_moe", "cute", "deep_gemm", "flashinfer_cutlass", "triton")
KERNELS = (("alpha_moe",), ("cute",), ("deep_gemm",), ("triton",), ALL)


@cache
def compared(model: str, kernels: tuple[str, ...], form: str = DEFAULT_FORM) -> Comparison:
    return compare_recorded(replay(model, "fp8", kernels), form)


@pytest.mark.slow
@pytest.mark.xdist_group("pages")
@pytest.mark.parametrize("kernels", KERNELS, ids=" + ".join)
@pytest.mark.parametrize("model", RECORDED)
def test_the_table_is_recomputed(model: str, kernels: tuple[str, ...]) -> None:
    found = compared(model, kernels)
    s, best = found.speedup_over_static, found.best_over_static
    assert best is not None
    cells = [
        model,
        " + ".join(kernels),
        str(len(found.batches)),
        f"{s.geomean:.3f}x",
        f"{s.min:.3f}x to {s.max:.3f}x",
        f"{best.geomean:.3f}x",
        f"{found.baselines['histogram'].mean:.1%}",
        f"{found.baselines['static'].mean:.1%}",
    ]
    assert_says(README, f"| {' | '.join(cells)} |")


@pytest.mark.slow
@pytest.mark.xdist_group("pages")
def test_the_shares_of_gains_and_losses() -> None:
    found = [compared(m, k) for m in RECORDED for k in KERNELS]
    speedups = [b.speedup for c in found for b in c.batches]
    gain, loss = (sum(test) / len(speedups) for test in ([s > 1.1 for s in speedups], [s < 0.98 for s in speedups]))
    assert_says(README, f"{gain:.0%} of all {len(speedups)} gain more than 10%, {loss:.0%} lose more than 2%")


@pytest.mark.slow
@pytest.mark.xdist_group("pages")
def test_the_range_of_regrets_without_the_correction() -> None:
    cases = itertools.product(RECORDED, KERNELS)
    regrets = [compared(model, kernels, "active").baselines["histogram"].mean for model, kernels in cases]
    assert_says(README, f"the regret in these rows is {min(regrets):.1%} to {max(regrets):.1%}")


@pytest.mark.slow
@pytest.mark.xdist_group("pages")
def test_what_others_claim_stands_beside_what_is_recorded() -> None:
    found = [compared(model, ALL) for model in RECORDED]
    regrets = [c.baselines["histogram"].mean for c in found]
    gains = [c.speedup_over_static.geomean for c in found]
    assert_says(README, f"{min(regrets):.1%} to {max(regrets):.1%}, by model, over all kernels")
    assert_says(README, f"{min(gains):.3f}x to {max(gains):.3f}x, by model, over all kernels")


def test_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", *sorted(ROOT.glob("core/docs/*.md"))]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#]+)", page.read_text())]
    missing = [(page.name, link) for page, link in links if "://" not in link and not (page.parent / link).exists()]
    assert len(links) > 10
    assert not missing


def test_python_examples_run(registry: Registry, h200: Hardware, capsys: pytest.CaptureFixture[str]) -> None:
    dispatch, plugin = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(dispatch, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.startswith(("alpha_moe/bm", "cute/bm", "deep_gemm/bm", "triton/"))
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(plugin, "README.md", "exec"), names)
    (kernel,) = names["ramp_moe_kernels"]()
    count, layout, reason = describe_kernel(kernel, registry.shape("olmoe-1b-7b", "fp8"), h200)
    assert (count, reason) == (2, None)
    assert layout is not None
